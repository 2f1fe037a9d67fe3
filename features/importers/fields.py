"""What a mapping says about one field: where it comes from and how it is read."""

from typing import Annotated, Any, ClassVar, Literal, Self
from zoneinfo import ZoneInfo

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator


class Part(BaseModel):
    """A table of the mapping file; an unknown key in it is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class _ColumnOrValue(Part):
    """Exactly one of ``column`` (of the source) and ``value`` (the same for every row)."""

    sources: ClassVar[tuple[str, ...]] = ("column", "value")
    column: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if sum(getattr(self, name) not in (None, ()) for name in self.sources) != 1:
            raise ValueError(f"needs exactly one of {', '.join(self.sources)}")
        return self


class TextField(_ColumnOrValue):
    """A text, trimmed; blank is missing.

    Attributes:
        columns: several source columns, joined by ``separator`` without the missing ones.
        replace: substrings to replace, in the order written.
        integer: the column holds whole numbers that some tools write as ``17850.0``: drop the ``.0``.
    """

    sources = ("column", "columns", "value")
    columns: tuple[str, ...] = ()
    separator: str = " "
    value: str | None = None
    replace: dict[str, str] = Field(default_factory=dict)
    integer: bool = False


class ChoiceField(_ColumnOrValue):
    """One of a fixed set of names: an action, a channel or a relation.

    Attributes:
        map: source value to name; a value it lacks becomes ``default``.
        prefixes: start of the source value to name; the first that fits wins, else ``default``.
        shares: channel to share of all keys; the key's SHA-256 decides (see ``features.importers.columns.by_share``).
        default: the name where ``map`` or ``prefixes`` has none; without it such a row is rejected.
    """

    value: str | None = None
    map: dict[str, str] = Field(default_factory=dict)
    prefixes: dict[str, str] = Field(default_factory=dict)
    shares: dict[str, float] = Field(default_factory=dict)
    default: str | None = None

    @model_validator(mode="after")
    def _rule(self) -> Self:
        if sum(map(bool, (self.map, self.prefixes, self.shares))) > 1:
            raise ValueError("takes only one of map, prefixes, shares")
        if self.shares and (min(self.shares.values()) < 0 or abs(sum(self.shares.values()) - 1) > 1e-9):
            raise ValueError("shares must be at least 0 and add up to 1")
        return self

    @property
    def names(self) -> set[str]:
        """Every name this field can give, as far as the mapping says."""
        return {*self.map.values(), *self.prefixes.values(), *self.shares, *(n for n in (self.value, self.default) if n)}


class NumberField(_ColumnOrValue):
    """A finite number.

    Attributes:
        multiply: another source column to multiply by (quantity × unit price).
        absolute: drop the sign (a cancellation's negative quantity).
    """

    value: float | None = None
    multiply: str | None = None
    absolute: bool = False


class TimeField(Part):
    """A time. Columns with a time type are taken as they are; one without a zone is in ``timezone``.

    Attributes:
        format: ``strptime`` pattern of a text column; ISO 8601 when absent.
        unit: what a number counts since 1970; ``s`` when a numeric column does not say.
        timezone: IANA name.
    """

    column: str
    format: str | None = None
    unit: Literal["s", "ms", "us"] | None = None
    timezone: str = "UTC"

    @field_validator("timezone")
    @classmethod
    def _zone(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (KeyError, ValueError, OSError):
            raise ValueError(f"{value!r} is not a known time zone") from None
        return value


class ListField(Part):
    """A list of names: a list column, a JSON array, or text cut at ``separator``."""

    column: str
    separator: str = "|"


class IdField(Part):
    """An event's identity: a ``column`` of UUIDs, or a UUID made of what stands in ``columns``."""

    column: str | None = None
    columns: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if bool(self.column) == bool(self.columns):
            raise ValueError("needs exactly one of column, columns")
        return self


class PickedText(TextField):
    """A text of an item; ``pick`` chooses among its rows."""

    pick: Literal["first", "last", "most_frequent"] = "last"


class PickedNumber(NumberField):
    """A number of an item; ``pick`` chooses among its rows."""

    pick: Literal["first", "last", "median", "minimum", "maximum"] = "last"


class PickedTime(TimeField):
    """A time of an item; ``pick`` chooses among its rows."""

    pick: Literal["first", "last", "minimum", "maximum"] = "last"


class RejectRule(Part):
    """Rejects, under ``reason``, rows whose ``column`` is ``missing``, or holds a number of ``at_most`` this."""

    column: str
    reason: str
    at_most: float | None = None
    missing: bool = False

    @model_validator(mode="after")
    def _one_test(self) -> Self:
        if (self.at_most is None) != self.missing:
            raise ValueError("needs exactly one of at_most, missing = true")
        return self


def _shorthand(value: Any) -> Any:
    return {"column": value} if isinstance(value, str) else value


# Each may be written short: `title = "Description"` is `title = { column = "Description" }`.
TextColumn = Annotated[TextField, BeforeValidator(_shorthand)]
ChoiceColumn = Annotated[ChoiceField, BeforeValidator(_shorthand)]
NumberColumn = Annotated[NumberField, BeforeValidator(_shorthand)]
TimeColumn = Annotated[TimeField, BeforeValidator(_shorthand)]
ListColumn = Annotated[ListField, BeforeValidator(_shorthand)]
IdColumn = Annotated[IdField, BeforeValidator(_shorthand)]
PickedTextColumn = Annotated[PickedText, BeforeValidator(_shorthand)]
PickedNumberColumn = Annotated[PickedNumber, BeforeValidator(_shorthand)]
PickedTimeColumn = Annotated[PickedTime, BeforeValidator(_shorthand)]
