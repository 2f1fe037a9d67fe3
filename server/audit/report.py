"""What an audit finds, as values: violations by kind, replay outcomes, agreement, offers and staleness."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import datetime
from enum import Enum
from typing import Any

from server.recommend.slate import Place

KINDS: Mapping[str, str] = {
    "tampered_slate": "a slate's order, items or scores are not what its versions give",
    "second_model": "what is shown or pointed to comes from another model than the one named or active",
    "other_catalogue": "the answer is what another index epoch gives, not the one it names",
    "other_state": "the answer is what another version of the customer gives, not the one it names",
    "other_features": "the answer is what another profile snapshot gives, not that of its epoch",
    "shown_differs": "the items or scores shown are not those of the slate the answer names",
    "item_left_out": "an item of the slate was not shown although the channel could have shown it",
    "future_state": "the answer or the online store holds a version that PostgreSQL never gave out",
    "stale_price": "a price the catalogue once had, not the one it has at the answer's offer_version or by now",
    "wrong_price": "a price the catalogue never had",
    "stale_stock": "a stock flag that was true once, not at the answer's offer_version",
    "wrong_stock": "a stock flag the catalogue contradicts",
    "not_sold_there": "an item shown in a channel that does not sell it",
    "unversioned_offer": "the catalogue holds a price, stock or channel list that no offer_version brought",
    "order_differs": "two channels or replicas order the same items differently under equal versions",
    "score_differs": "two channels or replicas score an item differently under equal versions",
    "price_differs": "two channels or replicas price an item differently under equal versions",
    "prefix_broken": "a smaller limit shows other items than the beginning of a larger one",
    "tampered_state": "a customer's online state is not what PostgreSQL gives for its version",
    "torn_state": "a customer's online state mixes two versions",
    "forged_pointer": "a pointer in Redis is ahead of PostgreSQL",
    "config_differs": "a replica makes slates by other rules",
    "no_answer": "a replica did not answer a probe",
}


@dataclass(frozen=True)
class Violation:
    """One broken promise: what, in which check, of whom, and what was expected and seen."""

    kind: str
    check: str
    expected: str
    seen: str
    customer: str = ""
    slate_id: str = ""
    item_id: str = ""
    channel: str = ""
    replica: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"{self.kind!r} is not a kind of violation")


class Outcome(Enum):
    """What a replay of one answer gave."""

    EQUAL = "equal"
    DIFFERS = "differs"
    NOT_REPLAYABLE = "not_replayable"


@dataclass(frozen=True)
class Answered:
    """An answer to be audited: logged, probed live, or standing in Redis.

    Attributes:
        source: ``journal``, ``probe`` or ``redis``.
        positions: the place of each shown item in the slate.
        scores: float32 values of the shown items.
        query: what was searched for (normalized), empty for a recommendation.
        page_start, page_limit, filtered: what page was asked for; they decide which items may be missing.
    """

    source: str
    user_id: str
    slate_id: str
    channel: str
    surface: str
    context_item_ids: tuple[str, ...]
    user_version: int
    model_version: str
    index_version: int
    offer_version: int
    as_of: datetime
    item_ids: tuple[str, ...]
    positions: tuple[int, ...]
    scores: tuple[float, ...]
    prices_micros: tuple[int | None, ...] = ()
    currencies: tuple[str, ...] = ()
    in_stock: tuple[bool, ...] = ()
    page_start: int = 0
    page_limit: int = 0
    filtered: bool = True
    stale: bool = False
    degraded_reasons: tuple[str, ...] = ()
    answered_at: datetime | None = None
    replica: str = ""
    query: str = ""

    @property
    def place(self) -> Place:
        """Where the slate was shown."""
        return Place(self.surface, self.context_item_ids, self.query)

    @property
    def offers_known(self) -> bool:
        """True when prices and stock of every shown item are recorded."""
        return len(self.item_ids) == len(self.prices_micros) == len(self.currencies) == len(self.in_stock)


@dataclass(frozen=True)
class Replayed:
    """The outcome of one replay; ``reason`` says why it could not be replayed, ``slate_items`` the whole expected order."""

    answer: Answered
    outcome: Outcome
    reason: str = ""
    violation: Violation | None = None
    slate_items: tuple[str, ...] = ()


@dataclass
class Agreement:
    """How many answers of one channel or replica agreed with the others under equal versions."""

    asked: int = 0
    agreed: int = 0

    @property
    def ratio(self) -> float:
        """Share that agreed, 1 when nothing was asked."""
        return self.agreed / self.asked if self.asked else 1.0


@dataclass
class Staleness:
    """How far answers and online state lag behind PostgreSQL.

    Attributes:
        answer_seconds: for each logged answer, age of the oldest event it did not reflect yet; 0 where it reflected all.
        customers_checked, customers_lagging: customers whose online version was compared with PostgreSQL, and those behind.
        versions_behind: the largest such distance, in versions.
        outbox_size, outbox_seconds: customers waiting to be written online, and the age of the oldest.
        offers_behind, index_behind: pointers in Redis behind PostgreSQL, in versions.
        visible_seconds: from a canary event in one channel until every other channel showed it; None when none was written.
    """

    answer_seconds: list[float] = field(default_factory=list)
    customers_checked: int = 0
    customers_lagging: int = 0
    versions_behind: int = 0
    outbox_size: int = 0
    outbox_seconds: float = 0.0
    offers_behind: int = 0
    index_behind: int = 0
    visible_seconds: float | None = None

    def quantile(self, share: float) -> float:
        """Returns a quantile of ``answer_seconds`` (nearest rank), 0 when there are none."""
        ordered = sorted(self.answer_seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


@dataclass
class AuditReport:
    """Everything one run found; filled in by the checks as they go."""

    run_id: str
    ran_at: datetime
    seconds: float = 0.0
    replays: dict[str, Counter[str]] = field(default_factory=dict)  # source → outcome → answers
    not_replayable: Counter[str] = field(default_factory=Counter)
    timeline: dict[str, Counter[str]] = field(default_factory=dict)  # minute (ISO 8601) → outcome → logged answers
    probed_customers: int = 0
    probes: int = 0
    probes_moving: int = 0
    by_channel: dict[str, Agreement] = field(default_factory=dict)
    by_replica: dict[str, Agreement] = field(default_factory=dict)
    offers: Counter[str] = field(default_factory=Counter)  # equal, violations by kind, unknown
    states: Counter[str] = field(default_factory=Counter)  # equal, absent, regrouped (not comparable), violations by kind
    staleness: Staleness = field(default_factory=Staleness)
    notes: list[str] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)

    def replayed(self, results: Sequence[Replayed]) -> None:
        """Counts replays and keeps their violations, each slate's once per source."""
        seen: set[tuple[str, str]] = set()
        for result in results:
            answer = result.answer
            self.replays.setdefault(answer.source, Counter())[result.outcome.value] += 1
            if result.reason:
                self.not_replayable[result.reason] += 1
            if answer.source == "journal" and answer.answered_at is not None:
                minute = answer.answered_at.replace(second=0, microsecond=0).isoformat()
                self.timeline.setdefault(minute, Counter())[result.outcome.value] += 1
            if result.violation and (result.violation.kind, answer.slate_id) not in seen:
                seen.add((result.violation.kind, answer.slate_id))
                self.violations.append(result.violation)

    def replay_count(self, outcome: Outcome) -> int:
        """How many answers of all sources had this outcome."""
        return sum(counts[outcome.value] for counts in self.replays.values())

    @property
    def kinds(self) -> Counter[str]:
        """Violations by kind."""
        return Counter(violation.kind for violation in self.violations)

    @property
    def agreement(self) -> float:
        """Share of probes that agreed with the others."""
        asked = sum(part.asked for part in self.by_channel.values())
        return sum(part.agreed for part in self.by_channel.values()) / asked if asked else 1.0

    def summary(self) -> dict[str, Any]:
        """Returns the counts of the run: one flat mapping, the last line a program reads."""
        return {
            "run_id": self.run_id,
            "replayed": self.replay_count(Outcome.EQUAL) + self.replay_count(Outcome.DIFFERS),
            "differs": self.replay_count(Outcome.DIFFERS),
            "not_replayable": self.replay_count(Outcome.NOT_REPLAYABLE),
            "probes": self.probes,
            "agreement": round(self.agreement, 6),
            "offers_checked": self.offers.total(),
            "price_mismatches": self.offers.total() - self.offers["equal"] - self.offers["unknown"],
            "states_checked": self.states.total(),
            "staleness_p99_seconds": round(self.staleness.quantile(0.99), 3),
            "violations": len(self.violations),
            "kinds": dict(self.kinds),
        }

    def as_dict(self, *, names: bool = True) -> dict[str, Any]:
        """Returns everything as plain values, ready for JSON; without ``names`` no customer is named."""
        whole: dict[str, Any] = _plain(self)
        for name in ("by_channel", "by_replica"):
            for key, part in getattr(self, name).items():
                whole[name][key]["ratio"] = part.ratio
        times = whole["staleness"].pop("answer_seconds")
        shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
        whole["staleness"]["answers"] = {
            "count": len(times),
            "stale": sum(seconds > 0 for seconds in times),
            "max": max(times, default=0.0),
            **{name: self.staleness.quantile(share) for name, share in shares.items()},
        }
        if not names:
            whole["violations"] = [violation | {"customer": ""} for violation in whole["violations"]]
        whole["summary"] = self.summary()
        return whole


def _plain(value: Any) -> Any:
    # Not dataclasses.asdict: it copies a Counter by counting its pairs.
    if is_dataclass(value):
        return {part.name: _plain(getattr(value, part.name)) for part in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value.isoformat() if isinstance(value, datetime) else value
