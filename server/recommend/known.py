"""The slates this process has seen last: what is left to answer when the stores or the processor are not."""

from collections import OrderedDict
from typing import NamedTuple

from server.recommend.slate import Place
from server.recommend.snapshot import Snapshot


class KnownSlate(NamedTuple):
    """A slate as it was read, committed or computed here.

    Attributes:
        user_version: the state of the customer it was computed from.
        model_version, index_version: the snapshot its rows refer to.
        standing: its bytes, as decode_slate reads them.
    """

    user_version: int
    model_version: str
    index_version: int
    standing: bytes

    def of(self, user_version: int, snapshot: Snapshot) -> bool:
        """True when it was computed from exactly these versions."""
        return (self.user_version, self.model_version, self.index_version) == (
            user_version,
            snapshot.model_version,
            snapshot.index_version,
        )


class KnownSlates:
    """The newest slate of each customer and place, bounded; the least recently seen are forgotten."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._slates: OrderedDict[tuple[str, Place], KnownSlate] = OrderedDict()

    def put(self, user_id: str, place: Place, slate: KnownSlate) -> None:
        """Remembers a slate, unless one of a newer state of the customer is known."""
        key = (user_id, place)
        known = self._slates.get(key)
        if known is not None and known.user_version > slate.user_version:
            return
        self._slates[key] = slate
        self._slates.move_to_end(key)
        if len(self._slates) > self._capacity:
            self._slates.popitem(last=False)

    def get(self, user_id: str, place: Place) -> KnownSlate | None:
        """Returns the newest slate known, None when there is none."""
        return self._slates.get((user_id, place))

    def clear(self) -> None:
        """Forgets all of them."""
        self._slates.clear()
