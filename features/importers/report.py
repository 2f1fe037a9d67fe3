"""What an import did, row by row: counted, timed, and checked to add up."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

Progress = Callable[[str, int, int], None]
"""Called with a stage name, steps done and steps in all (rows of a Parquet file, bytes of a text file)."""


class ImportAccountingError(Exception):
    """Rows read do not add up to rows stored, duplicate and rejected: a defect of the importer, never of the data."""


@dataclass(frozen=True)
class ImportReport:
    """What became of every row read.

    Attributes:
        stored: rows newly stored (for items: distinct items written).
        repeated: rows whose event stood in an earlier row of the same source (for items: further rows of an item).
        already_stored: rows whose event an earlier import, or the server, had stored.
        rejected: rows not stored, by reason; each stands in the rejects file with its line.
        details: further counts, such as rows read by action.
    """

    what: str
    read: int
    stored: int
    repeated: int
    already_stored: int
    rejected: Mapping[str, int]
    seconds: float
    details: Mapping[str, int] = field(default_factory=dict)

    @property
    def duplicate(self) -> int:
        """Rows that named something stored before, in this source or earlier."""
        return self.repeated + self.already_stored

    @property
    def rejected_count(self) -> int:
        """Rows rejected for whatever reason."""
        return sum(self.rejected.values())

    def table(self) -> list[tuple[str, str]]:
        """Returns (label, value) lines for a person."""
        return [
            ("rows read", f"{self.read:,}"),
            *((f"  {name}", f"{count:,}") for name, count in self.details.items()),
            ("stored", f"{self.stored:,}"),
            ("repeated in the source", f"{self.repeated:,}"),
            ("stored before", f"{self.already_stored:,}"),
            ("rejected", f"{self.rejected_count:,}"),
            *((f"  {reason}", f"{count:,}") for reason, count in self.rejected.items()),
            ("seconds", f"{self.seconds:.1f}"),
        ]


@dataclass
class Tally:
    """The counts of a running import."""

    what: str
    read: int = 0
    stored: int = 0
    repeated: int = 0
    already_stored: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    details: Counter[str] = field(default_factory=Counter)

    def report(self, seconds: float) -> ImportReport:
        """Closes the count.

        Raises:
            ImportAccountingError: the rows do not add up.
        """
        counted = self.stored + self.repeated + self.already_stored + self.rejected.total()
        if counted != self.read:
            raise ImportAccountingError(f"{self.what}: read {self.read} rows but accounted for {counted}")
        return ImportReport(
            self.what,
            self.read,
            self.stored,
            self.repeated,
            self.already_stored,
            dict(self.rejected.most_common()),
            seconds,
            dict(self.details.most_common()),
        )
