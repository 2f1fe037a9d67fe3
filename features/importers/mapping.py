"""Column mappings: how a shop's files become items, relations, identities and events, read from TOML and checked before a row is.

Example:
    mapping = load_mapping("online_retail")          # a ready one
    mapping = load_mapping("ours.toml")              # a file
"""

import codecs
import tomllib
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self
from zoneinfo import ZoneInfo

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

FileFormat = Literal["parquet", "csv", "jsonl"]


class MappingError(Exception):
    """A mapping is unknown, invalid, or names a column the source does not have; the message names it."""


class _Part(BaseModel):
    """A table of the mapping file; an unknown key in it is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class _ColumnOrValue(_Part):
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


class TimeField(_Part):
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


class ListField(_Part):
    """A list of names: a list column, a JSON array, or text cut at ``separator``."""

    column: str
    separator: str = "|"


class IdField(_Part):
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


class RejectRule(_Part):
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


_Text = Annotated[TextField, BeforeValidator(_shorthand)]
_Choice = Annotated[ChoiceField, BeforeValidator(_shorthand)]
_Number = Annotated[NumberField, BeforeValidator(_shorthand)]
_Time = Annotated[TimeField, BeforeValidator(_shorthand)]
_List = Annotated[ListField, BeforeValidator(_shorthand)]
_Id = Annotated[IdField, BeforeValidator(_shorthand)]
_PickedText = Annotated[PickedText, BeforeValidator(_shorthand)]
_PickedNumber = Annotated[PickedNumber, BeforeValidator(_shorthand)]
_PickedTime = Annotated[PickedTime, BeforeValidator(_shorthand)]


class _Section(_Part):
    reject: tuple[RejectRule, ...] = ()

    def columns(self) -> Iterator[tuple[str, str]]:
        """Yields (field, source column) for every column this section reads."""
        for name in type(self).model_fields:
            specs = getattr(self, name)
            for spec in specs if isinstance(specs, tuple) else (specs,):
                given = (getattr(spec, key, None) for key in ("column", "multiply"))
                for column in (*given, *getattr(spec, "columns", ())):
                    if column:
                        yield name, column


class ItemsMapping(_Section):
    """How rows become items; several rows of one ``item_id`` become one item, field by field as ``pick`` says."""

    item_id: _Text
    title: _PickedText
    text: _PickedText | None = None
    category: _PickedText | None = None
    brand: _PickedText | None = None
    price: _PickedNumber | None = None
    currency: _PickedText | None = None
    stock: _PickedNumber | None = None
    channels: _List | None = None
    image_ref: _PickedText | None = None
    attributes: _PickedText | None = None
    listed_at: _PickedTime | None = None


class EventsMapping(_Section):
    """How rows become events; a customer is named by ``user_id``, by ``channel_user_id``, or by both."""

    user_id: _Text | None = None
    channel_user_id: _Text | None = None
    channel: _Choice
    action: _Choice
    occurred_at: _Time
    item_id: _Text | None = None
    text: _Text | None = None
    value: _Number | None = None
    quantity: _Number | None = None
    session_id: _Text | None = None
    slate_id: _Text | None = None
    event_id: _Id | None = None

    @model_validator(mode="after")
    def _customer(self) -> Self:
        if self.user_id is None and self.channel_user_id is None:
            raise ValueError("needs user_id or channel_user_id")
        return self


class RelationsMapping(_Section):
    """How rows become edges of the knowledge graph."""

    item_id: _Text
    related_item_id: _Text
    relation: _Choice
    weight: _Number | None = None


class IdentitiesMapping(_Section):
    """How rows become identities: which customer a channel's user is."""

    channel: _Choice
    channel_user_id: _Text
    user_id: _Text


class CsvOptions(_Part):
    """How a CSV file is written."""

    delimiter: str = Field(",", min_length=1, max_length=1)
    encoding: str = "utf-8"

    @field_validator("encoding")
    @classmethod
    def _known(cls, value: str) -> str:
        try:
            return codecs.lookup(value).name
        except LookupError:
            raise ValueError(f"{value!r} is not a known encoding") from None


class Mapping(_Part):
    """One data set's mapping.

    Attributes:
        dataset: name that enters every generated event id, so that two data sets never share one.
        format: what the files are; by default the suffix decides.
    """

    dataset: str = Field(min_length=1)
    format: FileFormat | None = None
    csv: CsvOptions = CsvOptions()
    items: ItemsMapping | None = None
    relations: RelationsMapping | None = None
    identities: IdentitiesMapping | None = None
    events: EventsMapping | None = None


def ready_mappings() -> tuple[str, ...]:
    """Returns the names of the mappings that come with Concord."""
    return tuple(sorted(entry.name[: -len(".toml")] for entry in files(__package__).iterdir() if entry.name.endswith(".toml")))


def mapping_source(name: str) -> str:
    """Returns the TOML text of the ready mapping ``name``."""
    return files(__package__).joinpath(f"{name}.toml").read_text("utf-8")


def load_mapping(path_or_name: Path | str) -> Mapping:
    """Reads a ready mapping by its name, or a mapping file by its path.

    Raises:
        MappingError: there is none of that name, or a key is unknown or invalid; the message names the key.
    """
    name = str(path_or_name)
    try:
        text = mapping_source(name) if name in ready_mappings() else Path(path_or_name).read_text("utf-8")
        return Mapping.model_validate(tomllib.loads(text))
    except FileNotFoundError:
        raise MappingError(f"no mapping {name!r}: neither a file nor one of {', '.join(ready_mappings())}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise MappingError(f"mapping {name!r} is not TOML: {error}") from None
    except ValidationError as error:
        raise MappingError(f"mapping {name!r}: " + "; ".join(_problem(e) for e in error.errors())) from None


def _problem(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    return f"unknown key {key!r}" if error["type"] == "extra_forbidden" else f"{key}: {error['msg'].removeprefix('Value error, ')}"
