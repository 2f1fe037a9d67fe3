"""Offers under audit, on a real PostgreSQL: what was shown against what the catalogue said at that very version."""

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from features.catalogue import Item, upsert_items
from server.audit.offers import OfferAudit
from server.audit.report import Answered, AuditReport, Outcome, Replayed
from server.audit.store import AuditStore
from tests.integration.fixtures import NewShop

NOW = datetime(2026, 3, 1, tzinfo=UTC)
# Offers by version: 1 all are new; 2 "moved" costs more; 3 "gone" is out of stock; 4 "narrow" is sold in the web shop only.
SHOWN = Answered(
    source="journal",
    user_id="u1",
    slate_id="s1",
    channel="app",
    surface="home",
    context_item_ids=(),
    user_version=1,
    model_version="m",
    index_version=1,
    offer_version=4,
    as_of=NOW,
    item_ids=("moved",),
    positions=(0,),
    scores=(1.0,),
    prices_micros=(2_000_000,),
    currencies=("EUR",),
    in_stock=(True,),
    answered_at=NOW,
)


@pytest.fixture(scope="module")
def dsn(new_shop: NewShop) -> str:
    def item(name: str, price: int = 1_000_000, stock: int | None = 5, channels: tuple[str, ...] = ()) -> Item:
        return Item(name, name, price_micros=price, currency="EUR", stock=stock, channels=channels)

    settings = new_shop()
    with psycopg.connect(settings.postgres_dsn) as connection:
        upsert_items(connection, [item("moved"), item("gone"), item("narrow")])
        upsert_items(connection, [item("moved", price=2_000_000)])
        upsert_items(connection, [item("gone", stock=0)])
        upsert_items(connection, [item("narrow", channels=("web",))])
    return settings.postgres_dsn


@pytest.fixture
async def offers(dsn: str) -> AsyncIterator[OfferAudit]:
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True, row_factory=dict_row) as connection:
        yield OfferAudit(AuditStore(connection), hide_out_of_stock=True)


def report() -> AuditReport:
    return AuditReport("run", NOW)


@pytest.mark.parametrize(
    ("changes", "kind", "expected", "seen"),
    [
        ({}, "", "", ""),
        ({"offer_version": 1, "prices_micros": (1_000_000,)}, "", "", ""),
        ({"item_ids": ("gone",), "offer_version": 2, "prices_micros": (1_000_000,)}, "", "", ""),
        ({"item_ids": ("narrow",), "prices_micros": (1_000_000,), "channel": "web"}, "", "", ""),
        ({"prices_micros": (1_000_000,)}, "stale_price", "2.00 EUR at offer_version 4", "1.00 EUR, the price of offer_version 1"),
        ({"prices_micros": (1_234_567,)}, "wrong_price", "2.00 EUR at offer_version 4", "1.234567 EUR"),
        ({"currencies": ("USD",)}, "wrong_price", "2.00 EUR at offer_version 4", "2.00 USD"),
        ({"offer_version": 1}, "wrong_price", "1.00 EUR at offer_version 1", "2.00 EUR"),
        ({"in_stock": (False,)}, "wrong_stock", "in stock at offer_version 4", "out of stock"),
        (
            {"item_ids": ("gone",), "prices_micros": (1_000_000,)},
            "stale_stock",
            "out of stock at offer_version 4",
            "in stock, true at offer_version 1",
        ),
        ({"item_ids": ("narrow",), "prices_micros": (1_000_000,)}, "not_sold_there", "sold only in: web", "shown in app"),
    ],
)
async def test_shown_offers_are_those_of_their_version(offers: OfferAudit, changes: Any, kind: str, expected: str, seen: str) -> None:
    found = report()
    await offers.shown([replace(SHOWN, **changes)], found)
    assert [(v.kind, v.expected, v.seen) for v in found.violations] == ([(kind, expected, seen)] if kind else [])
    assert +found.offers == {kind or "equal": 1}


async def test_an_item_of_before_the_history_is_unknown_not_wrong(offers: OfferAudit) -> None:
    found = report()
    await offers.shown([replace(SHOWN, offer_version=0), replace(SHOWN, currencies=())], found)
    assert (found.violations, found.offers["unknown"], found.offers["equal"]) == ([], 1, 0)


@pytest.mark.parametrize(
    ("changes", "left_out"),
    [
        ({}, ["moved"]),  # "gone" is out of stock and "narrow" not sold in the app: only this one could have been shown
        ({"offer_version": 1}, ["moved", "gone", "narrow"]),
        ({"channel": "web"}, ["moved", "narrow"]),
        ({"filtered": True}, []),
        ({"page_start": 2, "item_ids": (), "positions": ()}, []),
        ({"page_limit": 1}, []),  # the page was full before the others' turn
    ],
)
async def test_only_what_could_not_be_shown_may_be_left_out(offers: OfferAudit, changes: Any, left_out: list[str]) -> None:
    page = {"item_ids": ("first",), "positions": (0,), "filtered": False, "page_limit": 10} | changes
    answer = replace(SHOWN, **page)
    found = report()
    slate = ("first", "moved", "gone", "narrow")
    await offers.left_out([Replayed(answer, Outcome.EQUAL, slate_items=slate)], found)
    assert [v.item_id for v in found.violations] == left_out
    assert {v.kind for v in found.violations} <= {"item_left_out"}
