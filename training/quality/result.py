"""What a quality run hands back: rankings for the judge, and what the run measured and was."""

from dataclasses import dataclass

from training.card import ModelCard


@dataclass(frozen=True)
class QualityResult:
    """One run on one set.

    Attributes:
        rankings: each customer's items, best first, 20 to 100 of them unless the catalogue has fewer left; none of a set of texts.
        validation: metrics on the part that the run was tuned on, never on the judge's targets.
        details: configuration, counts and weights, as JSON can hold them.
        seconds: wall-clock time of the whole run.
        card: the model card, where the set has one.
    """

    rankings: dict[str, list[str]]
    validation: dict[str, float]
    details: dict[str, object]
    seconds: float
    card: ModelCard | None = None
