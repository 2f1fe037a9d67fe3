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
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from features.importers.fields import (
    ChoiceColumn,
    IdColumn,
    ListColumn,
    NumberColumn,
    Part,
    PickedNumberColumn,
    PickedTextColumn,
    PickedTimeColumn,
    RejectRule,
    TextColumn,
    TimeColumn,
)

FileFormat = Literal["parquet", "csv", "jsonl", "json"]


class MappingError(Exception):
    """A mapping is unknown, invalid, or names a column the source does not have; the message names it."""


class Section(Part):
    """How rows become one kind of thing."""

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


class ItemsMapping(Section):
    """How rows become items; several rows of one ``item_id`` become one item, field by field as ``pick`` says."""

    item_id: TextColumn
    title: PickedTextColumn
    text: PickedTextColumn | None = None
    category: PickedTextColumn | None = None
    brand: PickedTextColumn | None = None
    price: PickedNumberColumn | None = None
    currency: PickedTextColumn | None = None
    stock: PickedNumberColumn | None = None
    channels: ListColumn | None = None
    image_ref: PickedTextColumn | None = None
    attributes: PickedTextColumn | None = None
    listed_at: PickedTimeColumn | None = None


class EventsMapping(Section):
    """How rows become events; a customer is named by ``user_id``, by ``channel_user_id``, or by both."""

    user_id: TextColumn | None = None
    channel_user_id: TextColumn | None = None
    channel: ChoiceColumn
    action: ChoiceColumn
    occurred_at: TimeColumn
    item_id: TextColumn | None = None
    text: TextColumn | None = None
    value: NumberColumn | None = None
    quantity: NumberColumn | None = None
    session_id: TextColumn | None = None
    slate_id: TextColumn | None = None
    event_id: IdColumn | None = None

    @model_validator(mode="after")
    def _customer(self) -> Self:
        if self.user_id is None and self.channel_user_id is None:
            raise ValueError("needs user_id or channel_user_id")
        return self


class RelationsMapping(Section):
    """How rows become edges of the knowledge graph."""

    item_id: TextColumn
    related_item_id: TextColumn
    relation: ChoiceColumn
    weight: NumberColumn | None = None


class IdentitiesMapping(Section):
    """How rows become identities: which customer a channel's user is."""

    channel: ChoiceColumn
    channel_user_id: TextColumn
    user_id: TextColumn


class ArticlesMapping(Section):
    """How rows become articles; without an ``article_id`` it is made of the data set's name and the title."""

    article_id: TextColumn | None = None
    title: TextColumn
    body: TextColumn
    url: TextColumn | None = None
    language: TextColumn | None = None
    tags: ListColumn | None = None
    channels: ListColumn | None = None


class CsvOptions(Part):
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


class Mapping(Part):
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
    articles: ArticlesMapping | None = None


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
