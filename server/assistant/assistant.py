"""The way of a question: record it, read the conversation, plan, look facts up, phrase, and commit the turn that all answer with."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING
from uuid import UUID

from server.assistant.answer import Answer, Format, Kind
from server.assistant.article_library import ArticleLibrary
from server.assistant.conversations import Conversations, Line, Talk, Turn
from server.assistant.facts import offered, order_lines, quotes, suggested
from server.assistant.plan import Plan, planned
from server.assistant.reading import Reading, read
from server.assistant.rules import AssistantRules
from server.assistant.words import in_words
from server.catalog.offers import Offers
from server.domain import IncomingEvent, Stored, Subject, Token, Versions
from server.errors import ConflictError, unknown_customer
from server.ingest.identities import Identities, Known
from server.ingest.personas import refuse_forgotten
from server.ingest.recorder import EventRecorder
from server.metrics import Metrics
from server.online.states import ahead
from server.recommend.clock import StageClock
from server.recommend.computing import Computing
from server.recommend.slate import Place
from server.recommend.slates import Slates
from server.recommend.snapshot import Snapshot
from server.recommend.standing import Stand, Standings
from server.understand.classifiers import Classification, Classifiers
from server.understand.intents import INTENT

if TYPE_CHECKING:
    from server.assistant.phrasing import Phraser

# Each turn follows a message of the same customer, or a pointer, that overtook this one; more than a few in one call are a crowd.
_TURNS = 6
_SURFACE = Place("chat")  # suggestions that start from no item are the customer's own slate for a conversation
_LINES, _LOOKED_AT = 5, 200  # order lines shown; looked at where an order is named
_ACTIONS = {Kind.ORDERS: "purchase", Kind.RETURNS: "return"}


@dataclass(frozen=True)
class Question:
    """A validated message of a customer."""

    subject: Subject
    channel: str
    text: str
    event_id: UUID
    how: Format = Format.PLAIN
    token: Token | None = None


@dataclass(frozen=True)
class Reply:
    """An answer as its channel shows it.

    Attributes:
        turn: as it was committed, the same for whoever asks with the same event id.
        shown: of the turn's answer what the channel may show.
        text: that in words.
    """

    user_id: str
    turn: Turn
    shown: Answer
    text: str
    token: Token


class Assistant:
    """Answers a message once: the first to commit its turn decides, whatever channel, replica or generator the others have."""

    def __init__(
        self,
        *,
        recorder: EventRecorder,
        identities: Identities,
        conversations: Conversations,
        standings: Standings,
        slates: Slates,
        offers: Offers,
        library: ArticleLibrary,
        classifiers: Classifiers,
        computing: Computing,
        phraser: "Phraser | None",
        rules: AssistantRules,
        hide_out_of_stock: bool,
        metrics: Metrics,
        now: Callable[[], datetime],
    ) -> None:
        self._recorder = recorder
        self._identities = identities
        self._conversations = conversations
        self._standings = standings
        self._slates = slates
        self._offers = offers
        self._library = library
        self._classifiers = classifiers
        self._computing = computing
        self._phraser = phraser
        self._rules = rules
        self._hide_out_of_stock = hide_out_of_stock
        self._metrics = metrics
        self._now = now

    async def ask(self, question: Question) -> Reply:
        """Records a message and answers it.

        Raises:
            PreconditionError: the customer was forgotten.
            NotFoundError: an explicit user id that does not exist.
            InvalidRequestError: the token belongs to another customer.
            ConflictError: other messages of the customer kept overtaking this one.
            StaleStateError: the state the token asks for does not exist.
            UnavailableError, OverloadedError: as for a recommendation.
            psycopg.Error: PostgreSQL is away.
        """
        asked_at = self._now()
        recorded = await self._recorded(question, asked_at)
        clock = StageClock()

        async def act(known: Known) -> Reply:
            minimum = await self._identities.minimum_version(known.user_id, question.token)
            turn = await self._turn(question, known, recorded, minimum, asked_at, clock)
            shown = turn.answer.in_channel(question.channel)
            self._metrics.assistant_answered(shown.kind.value, shown.reason.value)
            return Reply(known.user_id, turn, shown, in_words(shown, question.how), Token(known.user_id, turn.versions.user_version))

        reply = await self._identities.following(question.subject, await self._identities.customer_of(question.subject), act)
        for stage, seconds in clock.stages.items():
            self._metrics.observe_assistant_stage(stage, seconds)
        return reply

    async def _recorded(self, question: Question, asked_at: datetime) -> Token:
        """Stores the message once and returns the version that holds it."""
        event = IncomingEvent(question.subject, question.event_id, question.channel, "message", asked_at, text=question.text)
        recorded = await self._recorder.record([event])
        outcome = recorded.outcomes[0]
        if outcome.status is Stored.REJECTED:
            raise refuse_forgotten("subject") if outcome.reason == "SUBJECT_FORGOTTEN" else unknown_customer()
        return recorded.tokens[0]

    async def _turn(self, question: Question, known: Known, recorded: Token, minimum: int, asked_at: datetime, clock: StageClock) -> Turn:
        reading = read(question.text)
        for _ in range(_TURNS):
            with clock("conversation"):
                talk = await self._conversations.read(known.user_id, question.event_id, asked_at=asked_at)
                known.checked(None, talk.membership)
            if talk.answered is not None:
                return talk.answered
            # The version that Redis was seen to hold, where the customer is still the one it is of: nobody shall see it go back.
            version = recorded.version if recorded.user_id == known.user_id else talk.user_version
            if version < minimum:
                raise ahead()
            answer, versions, article_version = await self._answered(question, reading, talk, known.user_id, version, clock)
            turn = Turn(talk.count + 1, question.channel, question.text, answer, versions, article_version, asked_at)
            with clock("turn"):
                persona_id = known.persona_id or known.user_id
                committed = await self._conversations.commit(known.user_id, persona_id, question.event_id, turn, seen=talk.count)
            if committed is not None:
                return committed
        raise ConflictError("other messages of the customer came first; try again", reason="CONCURRENT_CHANGE")

    async def _answered(
        self, question: Question, reading: Reading, talk: Talk, user_id: str, version: int, clock: StageClock
    ) -> tuple[Answer, Versions, int]:
        """Returns the answer, the versions it was made from, and that of the articles."""
        stand = await self._standings.of_nobody()
        snapshot = stand.snapshot
        with clock("articles"):
            articles = await self._library.at_least(talk.article_version, snapshot.model)
        with clock("plan"):
            intent = await self._intent(reading, snapshot)
            plan = await self._computing.run(
                partial(planned, reading, talk.before, intent, snapshot=snapshot, articles=articles.index, rules=self._rules)
            )
        with clock("facts"):
            answer, versions = await self._with_facts(plan, user_id, version, stand, clock)
        if self._phraser is not None:
            with clock("phrase"):
                shown = answer.in_channel(question.channel)
                if phrased := await self._phraser.phrased(reading.text, shown):
                    answer = replace(answer, phrased=phrased, phrased_for=shown.facts)
        return answer, versions, articles.article_version

    async def _with_facts(self, plan: Plan, user_id: str, version: int, stand: Stand, clock: StageClock) -> tuple[Answer, Versions]:
        """Returns the answer with live facts, and the versions they are of."""
        snapshot = stand.snapshot
        slate: list[int] = []
        if plan.kind is Kind.SUGGESTIONS and not plan.rows and not plan.topic:
            found = await self._slates.find(user_id, _SURFACE, version, clock)
            if found.snapshot is snapshot:  # else an epoch or a model moved just now: the popular ones do for once
                slate = found.slate.rows.tolist()
        offers = await self._offers.at_least(stand.offer_version)
        answer = Answer(plan.kind, plan.language, round(plan.confidence, 4), plan.reason, quotes(plan.hits), asks_item=plan.asks_item)
        if plan.kind in (Kind.PRICE, Kind.STOCK):
            answer = replace(answer, items=tuple(offered(plan.rows, snapshot, offers)))
        elif plan.kind is Kind.SUGGESTIONS:
            suggest = partial(suggested, plan, slate, snapshot=snapshot, offers=offers, hide_out_of_stock=self._hide_out_of_stock)
            answer = replace(answer, items=await self._computing.run(suggest))
        elif plan.kind in _ACTIONS:
            lines = await self._lines(plan, user_id, version)
            answer = replace(answer, orders=order_lines(lines, plan, snapshot, returned=plan.kind is Kind.RETURNS, limit=_LINES))
        return answer, Versions(version, snapshot.model_version, snapshot.index_version, offers.offer_version)

    async def _lines(self, plan: Plan, user_id: str, version: int) -> list[Line]:
        limit = _LOOKED_AT if plan.order_ids else _LINES
        return await self._conversations.history(user_id, _ACTIONS[plan.kind], user_version=version, limit=limit)

    async def _intent(self, reading: Reading, snapshot: Snapshot) -> Classification | None:
        if snapshot.model is None or INTENT not in snapshot.model.classifiers or not reading.readable:
            return None
        (found,) = await self._classifiers.classify(snapshot.model, INTENT, [reading.text])
        return found
