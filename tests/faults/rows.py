"""A row of the table: what is injected, what is expected, and the function that does it and says what it saw."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.faults.world import World


class NotRunError(Exception):
    """The machine does not allow what the row needs (such as mounting a file system); says what is missing."""


@dataclass(frozen=True)
class Seen:
    """What happened; ``ok`` when it is what the row expects."""

    ok: bool
    text: str


Perform = Callable[["World"], Awaitable[Seen]]


@dataclass(frozen=True)
class Row:
    """One row. ``fast`` ones are part of `make test`; all are part of `make chaos`."""

    number: int
    injected: str
    expected: str
    perform: Perform
    fast: bool


ROWS: dict[int, Row] = {}


def row(number: int, injected: str, expected: str, *, fast: bool = False) -> Callable[[Perform], Perform]:
    """Registers the function as the row of that number."""

    def register(perform: Perform) -> Perform:
        assert number not in ROWS, number
        ROWS[number] = Row(number, injected, expected, perform, fast)
        return perform

    return register


class Checks:
    """Collects what a row found wrong, and what it wants to tell."""

    def __init__(self) -> None:
        self._wrong: list[str] = []
        self._told: list[str] = []

    def expect(self, holds: bool, otherwise: str) -> None:
        """Notes ``otherwise`` unless the condition holds."""
        if not holds:
            self._wrong.append(otherwise)

    def tell(self, text: str) -> None:
        """Adds to what was seen."""
        self._told.append(text)

    def seen(self) -> Seen:
        """Returns the verdict, what is wrong first."""
        return Seen(not self._wrong, "; ".join([*(f"NOT {wrong}" for wrong in self._wrong), *self._told]))
