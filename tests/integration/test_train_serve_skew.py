"""A customer is the same to training and to serving: the same behaviours, the same token ids, the same ranker input to the byte."""

import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import numpy as np
import psycopg
import pytest

from features.catalogue import Item, upsert_items
from features.item_table import ItemTable
from server.domain import IncomingEvent, Stored, Subject
from server.inference.model import LoadedModel, load_model
from server.recommend.compute import score, understand
from server.recommend.customers import Customer as Served
from server.recommend.customers import Customers
from server.recommend.snapshot import Snapshot, SnapshotBuilder
from tests.integration import serving
from tests.integration.fixtures import NewShop
from tests.integration.replicas import Replica, app, replica, web
from tests.integration.times import NOW, START
from training.config import TrainConfig
from training.dataset import Customer, Shop, Snapshots, behaviour_texts, join_customers, open_shop, take_snapshots
from training.events import to_micros
from training.labels import Label
from training.scoring import Model, make_query
from training.text import load_tokenizer, tokenize

ODD = {
    "odd-emoji": "👩‍👧‍👦 family mug ☕️🏳️‍🌈 — 2×",
    "odd-han": "一致的马克杯（大号）４００ｍｌ",
    "odd-accents": "Cafe\u0301 Zo\u0308e — ﬁne ﬂower İstanbul ß",
    "odd-right-to-left": "كوب قهوة كبير \u202eabc\u202c קפה",
    "odd-space": "  tab\there\nnew line \u200bzero\u00a0width\u3000  ",
    "odd-long": "very long title " * 30,
    "odd-word": "pneumono" * 60,
    "odd-quote": "O'Brien's \"best\" {cup}, 50% off; \\N NULL ; DROP",
    "odd-marks": "[CLS] [SEP] [PAD] [MASK] ##ing",
}
SEARCHES = ("👩‍👧" * 60, "a" * 159 + "👩‍👧", "  ", "mug " * 200, "Größe XL", "\u0000x".replace("\u0000", "\u0001"))


@dataclass(frozen=True)
class Both:
    """One shop seen by both sides at one time."""

    shop: Shop
    snapshots: Snapshots
    label_time: int
    snapshot: Snapshot
    reader: Replica
    asked: list[Any]

    async def serve(self, user_id: str) -> tuple[Served, list[int] | None]:
        """Reads a customer as a call does, from Redis; returns them and the token ids that reach the encoder."""
        customer = await Customers(self.reader.states).online(user_id, self.snapshot, as_of=datetime.now(UTC))
        self.asked.clear()
        assert self.snapshot.model is not None
        cast("Any", self.snapshot.model._behaviour_vector).cache_clear()  # or what was asked before would reach no encoder
        self.snapshot.model.user_vector(customer.activity, self.snapshot.table, self.snapshot.vectors)
        return customer, self.asked[0]["input_ids"][0].tolist() if self.asked else None


class Watched:
    """A session that notes what it is given."""

    def __init__(self, session: Any, asked: list[Any]) -> None:
        self._session, self._asked = session, asked

    def run(self, outputs: list[str], inputs: dict[str, Any]) -> Any:
        self._asked.append(inputs)
        return self._session.run(outputs, inputs)

    def get_providers(self) -> list[str]:
        return list(self._session.get_providers())


def watched(model: LoadedModel, asked: list[Any]) -> LoadedModel:
    return replace(model, encoder=Watched(model.encoder, asked), ranker=Watched(model.ranker, asked))


@pytest.fixture(scope="module")
async def both(new_shop: NewShop, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Both]:
    # Patient: nobody closes a breaker here, and this fixture trains a model before Redis is asked.
    settings = new_shop().model_copy(update={"redis_timeout_seconds": 30.0, "redis_slow_seconds": 30.0})
    serving.fill(settings, tmp_path_factory.mktemp("sample"))
    with psycopg.connect(settings.postgres_dsn) as connection:
        odd = [
            Item(item, title, price_micros=7_770_000 + k, currency="EUR", listed_at=START) for k, (item, title) in enumerate(ODD.items())
        ]
        upsert_items(connection, odd)
    serving.deploy(settings, bundle)
    asked: list[Any] = []
    async with replica(settings) as reader:
        await act(reader)
        shop = open_shop(settings)
        as_of = to_micros(features_as_of(shop.table))
        # The epoch's own snapshot, and one a week before it: the newest of them is what both sides rank with.
        snapshots = take_snapshots(shop, start=as_of + 1, cut=as_of + 1, every_days=7)
        model = watched(load_model(bundle, provider="cpu", threads=1), asked)
        snapshot = await SnapshotBuilder(reader.pool, dsn=settings.postgres_dsn).build(model, shop.table.index_version)
        yield Both(shop, snapshots, shop.log.window()[1] + 1, snapshot, reader, asked)


def features_as_of(table: ItemTable) -> datetime:
    assert table.features_as_of is not None
    return table.features_as_of


async def act(reader: Replica) -> None:
    """Customers do odd things, in two channels each, and are then found to be one."""

    async def did(who: Subject, *deeds: tuple[str, str, str]) -> None:
        at = NOW + timedelta(hours=1)
        events = [
            IncomingEvent(who, uuid.uuid4(), who.channel, action, at + timedelta(seconds=k), item_id=item or None, text=text or None)
            for k, (action, item, text) in enumerate(deeds)
        ]
        (written,) = await reader.writer.write([events])
        assert {outcome.status for outcome in written.outcomes} == {Stored.STORED}
        await reader.states.refresh([token.user_id for token in written.tokens])

    items = list(ODD)
    await did(web("odd"), *(("view", item, "") for item in items))
    await did(app("odd"), *(("search", "", text) for text in SEARCHES), ("purchase", items[0], ""), ("return", items[0], ""))
    await reader.graph.link(web("odd"), app("odd"))
    await did(web("busy"), *((("view", "click", "add_to_cart", "review")[k % 4], items[k % 9], f"word {k}") for k in range(70)))
    await did(web("long"), ("view", "odd-long", ""), ("view", "odd-word", ""), ("message", "", "why? " * 300))
    await did(web("talker"), *(("message", "", text) for text in SEARCHES))
    await did(web("strange"), ("view", "no such item", ""), ("remove_from_cart", "odd-han", ""))
    await did(web("silent"), ("view", "no such item", ""))
    await did(web("same time"), ("view", "odd-emoji", ""))


def users_of(both: Both) -> list[str]:
    """The odd ones, some of before, and the busiest."""
    lengths = np.bincount(both.shop.log.user)
    busiest = [both.shop.log.users[code] for code in np.argsort(-lengths)[:5]]
    return sorted({*busiest, *both.shop.log.users[:20], *(user for user in both.shop.log.users if user.startswith("u_"))})


async def test_both_sides_read_the_same_of_a_customer(both: Both) -> None:
    users = users_of(both)
    customers = join_customers(both.shop.store, [(user, both.label_time) for user in users])
    with_prices = 0
    for user in users:
        served, _ = await both.serve(user)
        trained = customers[user, both.label_time]
        assert trained.activity == served.activity, user
        assert repr(trained.profile) == repr(served.profile), user  # NaN is not equal to itself
        with_prices += trained.profile.price_mean > 0
    assert with_prices > 5


async def test_the_same_customer_gives_the_same_token_ids(both: Both) -> None:
    users, config = users_of(both), TrainConfig.tiny()
    keys = [(user, both.label_time) for user in users]
    assert both.snapshot.model is not None
    assert (config.user_tokens, config.behaviour_limit) == (
        both.snapshot.model.manifest.user_tokens,
        both.snapshot.model.manifest.behaviour_limit,
    )
    texts = list(behaviour_texts(both.shop, keys, join_customers(both.shop.store, keys), config.behaviour_limit))
    tokens = tokenize(load_tokenizer(config.base_model), texts, config.user_tokens)
    seen: dict[str, list[int] | None] = {}
    for user, text, ids in zip(users, texts, tokens.ids, strict=True):
        _, seen[text] = await both.serve(user)
        assert seen[text] == (list(ids) if text else None), user
    assert "" in seen  # somebody with nothing to say
    assert sum(len(ids or ()) == config.user_tokens for ids in seen.values()) > 10  # truncated
    assert any("👩‍👧" in text for text in seen)
    assert any("一致" in text for text in seen)
    assert any("bought" in text and "searched" in text and "family mug" in text for text in seen)  # of both channels of one customer


async def test_the_ranker_reads_the_same_bytes(both: Both) -> None:
    table, epoch = both.snapshots.before(both.label_time), both.snapshot.table
    for name in ("popularity", "age_days", "log_price", "categories", "brands", "relation_from", "relation_to", "relation_weight"):
        assert getattr(table, name).tobytes() == getattr(epoch, name).tobytes(), name
    assert (table.ids, table.titles, table.texts) == (epoch.ids, epoch.titles, epoch.texts)
    users = users_of(both)
    customers = join_customers(both.shop.store, [(user, both.label_time) for user in users])
    model = Model(both.snapshot.vectors, both.snapshot.collaborative, both.snapshot.signals)
    for user in users:
        served, _ = await both.serve(user)
        understood = understand(both.snapshot, served.activity)
        assert both.snapshot.model is not None
        vector = both.snapshot.model.user_vector(served.activity, epoch, both.snapshot.vectors)
        query = make_query(
            Label(user, both.label_time, (), bought_by(customers[user, both.label_time], table)),
            customers[user, both.label_time],
            np.zeros(both.snapshot.vectors.shape[1], np.float32) if vector is None else vector,
            model=model,
            table=table,
        )
        both.asked.clear()
        score(both.snapshot, understood, query.candidates, served.profile)
        (run,) = both.asked
        assert run["features"][: len(query.features)].tobytes() == query.features.tobytes(), user


def bought_by(customer: Customer, table: ItemTable) -> frozenset[int]:
    return frozenset(table.rows[item] for item in customer.activity.purchased_items if item in table.rows)
