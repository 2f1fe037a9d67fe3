"""Source rows to event rows: typed, checked, each with its id."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from features.behaviour import ACTIONS
from features.importers.checks import Reasons, is_null, matches
from features.importers.columns import (
    choice_column,
    hashed_ids,
    number_column,
    source_column,
    text_column,
    time_column,
    uuid_column,
)
from features.importers.mapping import EventsMapping

AMOUNT_ACTIONS = ("add_to_cart", "remove_from_cart", "purchase", "return")
RATING_ACTIONS = ("rate", "review")
TEXT_ACTIONS = ("search", "message")
_MAX_ID, _MAX_TEXT = 256, 8192


@dataclass(frozen=True)
class EventRows:
    """Events of one batch.

    Attributes:
        table: the good rows, columns as in ``EVENT_COLUMNS``.
        reasons: why the others are rejected.
        actions: action of every row read, null where it has none; shape ``[rows]``.
    """

    table: pa.Table
    reasons: Reasons
    actions: pa.Array


EVENT_COLUMNS = (
    "line",
    "user_id",
    "channel_user_id",
    "event_id",
    "channel",
    "action",
    "item_id",
    "text",
    "value",
    "quantity",
    "session_id",
    "slate_id",
    "occurred_at",
)


def event_rows(rows: pa.Table, lines: np.ndarray, spec: EventsMapping, *, dataset: str, channels: Sequence[str]) -> EventRows:
    """Turns source rows into event rows.

    Args:
        rows: source columns.
        lines: line of each row, shape ``[rows]``.
        spec: the mapping's events section.
        dataset: enters the generated ids.
        channels: registered channel names.
    """
    reasons = Reasons(len(rows))
    columns: dict[str, pa.Array] = {"line": pa.array(lines)}
    _customer(columns, rows, spec, reasons)
    reasons.rules(rows, spec.reject)  # before the general checks: the mapping's own reasons say more
    _what(columns, rows, spec, reasons, channels)
    _measures(columns, rows, spec, reasons)
    columns["event_id"] = _event_ids(columns, rows, spec, reasons, dataset)
    for name in ("user_id", "channel_user_id", "item_id", "session_id", "slate_id", "text"):
        reasons.longer(columns[name], _MAX_TEXT if name == "text" else _MAX_ID, name)
    reasons.unstorable(columns.values())
    table = pa.table({name: columns[name] for name in EVENT_COLUMNS})
    return EventRows(table.filter(pa.array(reasons.good)), reasons, columns["action"])


def _customer(columns: dict[str, pa.Array], rows: pa.Table, spec: EventsMapping, reasons: Reasons) -> None:
    user = text_column(rows, spec.user_id)
    name = text_column(rows, spec.channel_user_id)
    columns["user_id"], columns["channel_user_id"] = user, pc.coalesce(name, user)
    reasons.missing(columns["channel_user_id"], "customer")


def _what(columns: dict[str, pa.Array], rows: pa.Table, spec: EventsMapping, reasons: Reasons, channels: Sequence[str]) -> None:
    columns["channel"] = choice_column(rows, spec.channel)
    columns["action"] = choice_column(rows, spec.action)
    for name in ("item_id", "text", "session_id", "slate_id"):
        columns[name] = text_column(rows, getattr(spec, name))
    reasons.outside(columns["channel"], channels, "channel")
    reasons.outside(columns["action"], ACTIONS, "action")
    needs_text = matches(columns["action"], TEXT_ACTIONS)
    reasons.add(is_null(columns["item_id"]) & ~needs_text, "item_id missing")
    reasons.add(is_null(columns["text"]) & needs_text, "text missing")


def _measures(columns: dict[str, pa.Array], rows: pa.Table, spec: EventsMapping, reasons: Reasons) -> None:
    """Converts numbers and time; value and quantity stay only with actions that have them."""
    amount, rating = matches(columns["action"], AMOUNT_ACTIONS), matches(columns["action"], RATING_ACTIONS)
    for name, kept in (("value", amount | rating), ("quantity", amount)):
        column = number_column(rows, getattr(spec, name))
        reasons.add(column.invalid & kept, f"{name} is not a number")
        columns[name] = pc.if_else(pa.array(kept), column.values, None)
    value, quantity = (columns[name].to_numpy(zero_copy_only=False) for name in ("value", "quantity"))
    reasons.add(quantity <= 0, "quantity is not above zero")
    reasons.add(amount & (value < 0), "value is below zero")
    reasons.add(rating & ((value < 1) | (value > 5)), "rating is outside 1 to 5")
    time = time_column(rows, spec.occurred_at)
    reasons.add(time.invalid, "occurred_at is not a time from 1970 to 2199")
    reasons.missing(time.values, "occurred_at")
    columns["occurred_at"] = time.values


def _event_ids(columns: dict[str, pa.Array], rows: pa.Table, spec: EventsMapping, reasons: Reasons, dataset: str) -> pa.Array:
    if spec.event_id is None:
        return hashed_ids([columns[name] for name in EVENT_COLUMNS[1:] if name in columns and name != "channel"], dataset)
    if spec.event_id.columns:
        return hashed_ids([source_column(rows, name) for name in spec.event_id.columns], dataset)
    given = uuid_column(rows, spec.event_id.column or "")
    reasons.add(given.invalid, "event_id is not a UUID")
    reasons.missing(given.values, "event_id")
    return given.values
