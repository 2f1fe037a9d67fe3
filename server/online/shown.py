"""Versions that were answered from PostgreSQL while Redis may have lagged: this process answers nobody an older one afterwards."""

from collections import OrderedDict

_SIZE = 100_000


class Shown:
    """The newest such version of each customer, bounded; the least recently noted are forgotten."""

    def __init__(self) -> None:
        self._versions: OrderedDict[str, int] = OrderedDict()

    def note(self, user_id: str, version: int) -> None:
        """Notes that a version PostgreSQL holds was answered, which Redis may not hold yet."""
        if not user_id:
            return
        self._versions[user_id] = max(version, self.of(user_id))
        self._versions.move_to_end(user_id)
        if len(self._versions) > _SIZE:
            self._versions.popitem(last=False)

    def of(self, user_id: str) -> int:
        """Returns the newest version noted, 0 when none was."""
        return self._versions.get(user_id, 0)
