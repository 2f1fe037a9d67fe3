"""The history of a run: what every client asked, was told and when, one JSON line each; a ranking is written once."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TextIO


class Row(NamedTuple):
    """One item of an answer, all that must be equal to the bit. ``price_micros`` is None for what is not for sale."""

    position: int
    item_id: str
    score: float
    price_micros: int | None
    currency: str
    in_stock: bool


class Read(NamedTuple):
    """One call of Recommend. Times are seconds of the machine's monotonic clock, which all processes share.

    ``place`` is surface and context; ``filtered`` names the filter, empty for none; ``token`` is the version that the carried
    token asked for, 0 without one; versions, ``slate`` and ``body`` (a digest of the rows) are empty when the call failed.
    """

    client: str
    replica: int
    channel: str
    user: str
    place: str
    limit: int
    filtered: str
    start: float
    end: float
    status: str
    token: int
    user_version: int = 0
    model_version: str = ""
    index_version: int = 0
    offer_version: int = 0
    slate: str = ""
    body: str = ""
    stale: bool = False
    degraded: str = ""

    @property
    def answered(self) -> bool:
        """Whether there was an answer at all."""
        return self.status == "OK"

    @property
    def committed(self) -> bool:
        """Whether the answer claims to be the slate that stands for all: neither stale nor degraded."""
        return self.answered and not self.stale and not self.degraded

    @property
    def whole(self) -> bool:
        """Whether it claims the contents of its versions: also where it was computed apart from Redis, and could not be committed."""
        return self.answered and not self.stale and self.degraded in {"", "ONLINE_STORE_UNAVAILABLE"}

    @property
    def state(self) -> tuple[str, str, int, str, int]:
        """What a ranking may depend on, and nothing else."""
        return self.user, self.place, self.user_version, self.model_version, self.index_version


class Write(NamedTuple):
    """One attempt to record one event; ``version`` and ``online`` are what the acknowledgement said."""

    client: str
    replica: int
    channel: str
    user: str
    event_id: str
    start: float
    end: float
    status: str
    version: int = 0
    online: bool = False


class Offer(NamedTuple):
    """One attempt to change an item's price and stock; ``offer_version`` is that of the acknowledgement."""

    client: str
    item_id: str
    price_micros: int
    currency: str
    stock: int
    start: float
    end: float
    status: str
    offer_version: int = 0


class Activation(NamedTuple):
    """One move of the model pointer; ``end`` is when it was acknowledged."""

    model_version: str
    start: float
    end: float
    status: str
    activation: int = 0


class Listed(NamedTuple):
    """An item as the catalogue held it before the run, at ``offer_version``."""

    item_id: str
    price_micros: int | None
    currency: str
    stock: int | None
    channels: list[str]
    offer_version: int


class Fault(NamedTuple):
    """Something done to a process or a store during the run, for the reader of a violation."""

    what: str
    start: float
    end: float


Record = Read | Write | Offer | Activation | Listed | Fault
_KINDS: dict[str, Any] = {kind.__name__.lower(): kind for kind in (Read, Write, Offer, Activation, Listed, Fault)}


@dataclass
class History:
    """Everything a run left behind, by kind."""

    reads: list[Read] = field(default_factory=list)
    writes: list[Write] = field(default_factory=list)
    offers: list[Offer] = field(default_factory=list)
    activations: list[Activation] = field(default_factory=list)
    listed: dict[str, Listed] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    bodies: dict[str, tuple[Row, ...]] = field(default_factory=dict)

    def rows(self, read: Read) -> tuple[Row, ...]:
        """Returns what an answer showed."""
        return self.bodies[read.body]


class Recorder:
    """Appends to a history file; one per process, used by one event loop."""

    def __init__(self, path: Path) -> None:
        self._file: TextIO = path.open("a")
        self._known: set[str] = set()
        self.answers = 0

    def add(self, record: Record) -> None:
        """Writes one record."""
        self.answers += isinstance(record, Read) and record.answered
        self._file.write(json.dumps([type(record).__name__.lower(), *record], separators=(",", ":")) + "\n")

    def body(self, rows: tuple[Row, ...]) -> str:
        """Returns the digest of a ranking, writing it out the first time it is seen."""
        digest = hashlib.blake2b(repr(rows).encode(), digest_size=12).hexdigest()
        if digest not in self._known:
            self._known.add(digest)
            self._file.write(json.dumps(["body", digest, rows], separators=(",", ":")) + "\n")
        return digest

    def close(self) -> None:
        """Ends the file."""
        self._file.close()


def load(paths: Iterable[Path]) -> History:
    """Reads the files of a run into one history."""
    history = History()
    places: dict[str, Any] = {
        "read": history.reads.append,
        "write": history.writes.append,
        "offer": history.offers.append,
        "activation": history.activations.append,
        "fault": history.faults.append,
        "listed": lambda item: history.listed.__setitem__(item.item_id, item),
    }
    for path in paths:
        with path.open() as lines:
            for line in lines:
                kind, *values = json.loads(line)
                if kind == "body":
                    history.bodies[values[0]] = tuple(Row(*row) for row in values[1])
                else:
                    places[kind](_KINDS[kind](*values))
    return history
