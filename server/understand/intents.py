"""What the writer of a text wants and speaks of, by the active model's intent classifier and the catalogue's names."""

from dataclasses import dataclass
from functools import partial

from server.recommend.standing import Standings
from server.understand.classifiers import Classifiers, require_classifier
from server.understand.entities import Entity, find_entities
from server.understand.text_runs import TextRuns

INTENT = "intent"
"""Name of the classifier in a bundle."""


@dataclass(frozen=True)
class IntentQuery:
    """A validated request: the text, and how many intents to return."""

    text: str
    top_k: int


@dataclass(frozen=True)
class Understood:
    """What a text is about; the same for equal texts and versions, to the bit.

    Attributes:
        intents: likeliest first, with calibrated probabilities; none where there was nothing to read.
        in_scope: whether the likeliest one is probable enough to be acted on.
        entities: what it speaks of, in the order it stands there.
        token_count, truncated: how much of it the classifier read, and whether it went on.
        model_version, index_version: what read it, and whose names were looked for.
    """

    intents: tuple[tuple[str, float], ...]
    in_scope: bool
    entities: tuple[Entity, ...]
    token_count: int
    truncated: bool
    model_version: str
    index_version: int


class Intents:
    """Answers with the model and the epoch that the fleet's pointers name."""

    def __init__(self, standings: Standings, runs: TextRuns) -> None:
        self._standings = standings
        self._runs = runs
        self._classifiers = Classifiers(runs)

    async def detect(self, query: IntentQuery) -> Understood:
        """Returns what a text is about.

        Raises:
            PreconditionError: no model is active, or the active one has no intent classifier.
            OverloadedError: too many texts wait.
            UnavailableError: the active model cannot be loaded here.
        """
        snapshot = (await self._standings.of_nobody()).snapshot
        model = snapshot.require_model()
        require_classifier(model, INTENT)
        entities = await self._runs.read(partial(find_entities, query.text, snapshot.names))
        (found,) = await self._classifiers.classify(model, INTENT, [query.text])
        return Understood(
            intents=tuple(found.top(query.top_k)),
            in_scope=found.in_scope,
            entities=tuple(entities),
            token_count=found.token_count,
            truncated=found.truncated,
            model_version=model.model_version,
            index_version=snapshot.index_version,
        )
