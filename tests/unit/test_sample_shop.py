"""The sample shop: the same everywhere, big enough, and hard for popularity but not for what customers did."""

import hashlib
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from features.behaviour import ACTIONS
from features.catalogue import Item
from features.importers.links import RELATIONS
from features.sample_shop import Event, Shop, generate
from features.sample_shop.catalogue import ShelfItem
from features.sample_shop.customers import Taste
from features.sample_shop.dice import Dice
from features.sample_shop.vocabulary import DEPARTMENTS, INTERESTS, WISHES
from features.sample_shop.voices import stars, wish
from features.settings import DEFAULT_CHANNELS

END = datetime(2026, 3, 1, 15, 30, tzinfo=UTC)
FINGERPRINT = """
import hashlib
from datetime import UTC, datetime
from features.sample_shop import generate
print(hashlib.sha256(repr(generate(5, end=datetime(2026, 3, 1, 15, 30, tzinfo=UTC), users=40)).encode()).hexdigest())
"""


@pytest.fixture(scope="module")
def shop() -> Shop:
    return generate(7, end=END)


def test_the_same_seed_gives_the_same_shop_in_another_process() -> None:
    here = hashlib.sha256(repr(generate(5, end=END, users=40)).encode()).hexdigest()
    for hash_seed in ("1", "2"):
        environment = {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(sys.path)}
        there = subprocess.run([sys.executable, "-c", FINGERPRINT], capture_output=True, text=True, check=True, env=environment)
        assert there.stdout.strip() == here


def test_another_seed_gives_another_shop() -> None:
    assert generate(5, end=END, users=40).events != generate(6, end=END, users=40).events


def test_another_end_only_shifts_the_history() -> None:
    early, late = generate(5, end=END, users=40), generate(5, end=END + timedelta(days=30), users=40)
    assert [e.event_id for e in early.events] == [e.event_id for e in late.events]
    assert {b.occurred_at - a.occurred_at for a, b in zip(early.events, late.events, strict=True)} == {timedelta(days=30)}


def test_size(shop: Shop) -> None:
    assert len(shop.items) >= 600
    assert len({e.user_id for e in shop.events}) == 1500
    assert len(shop.events) >= 40_000
    assert {e.channel for e in shop.events} == set(DEFAULT_CHANNELS)
    assert {e.action for e in shop.events} == set(ACTIONS)
    assert len(generate(1, end=END, users=1, items=2000).items) == 2000
    with pytest.raises(ValueError, match="at most 5184"):
        generate(1, end=END, users=1, items=5185)


def test_items_are_believable(shop: Shop) -> None:
    titles = [item.title for item in shop.items]
    assert len(set(titles)) == len({item.item_id for item in shop.items}) == len(titles)
    assert all(item.brand and item.title.startswith(item.brand) and item.category.count("/") == 1 for item in shop.items)
    assert all(item.price_micros is not None and item.price_micros > 0 and item.currency == "USD" for item in shop.items)
    assert 5 < sum(bool(item.channels) for item in shop.items) < 100
    assert any(item.stock == 0 for item in shop.items)
    new = [item for item in shop.items if item.listed_at and item.listed_at > END - timedelta(days=90)]
    assert 30 < len(new) < 200


def test_relations_join_known_items(shop: Shop) -> None:
    known = {item.item_id for item in shop.items}
    assert {r.relation for r in shop.relations} == set(RELATIONS)
    assert all({r.item_id, r.related_item_id} <= known and 0 < r.weight <= 1 for r in shop.relations)
    edges = [(r.item_id, r.related_item_id, r.relation) for r in shop.relations]
    assert len(set(edges)) == len(edges)


def test_customers_use_several_channels_under_their_own_names(shop: Shop) -> None:
    known = {(i.channel, i.channel_user_id): i.user_id for i in shop.identities}
    assert len(known) == len(shop.identities)
    assert all(known[e.channel, e.channel_user_id] == e.user_id for e in shop.events)
    per_user = Counter(i.user_id for i in shop.identities)
    assert min(per_user.values()) >= 2


def test_events_obey_the_shop(shop: Shop) -> None:
    items = {item.item_id: item for item in shop.items}
    midnight = END.replace(hour=0, minute=0)
    assert [e.occurred_at for e in shop.events] == sorted(e.occurred_at for e in shop.events)
    assert len({e.event_id for e in shop.events}) == len(shop.events)
    for event in shop.events:
        assert midnight - timedelta(days=90) <= event.occurred_at < midnight
        if event.action in ("search", "message"):
            assert event.text
            assert event.item_id is None
            continue
        item = items[event.item_id or ""]
        assert item.listed_at is not None
        assert item.listed_at <= event.occurred_at
        if event.action != "return":
            assert not item.channels or event.channel in item.channels
        if event.action in ("purchase", "return", "add_to_cart", "remove_from_cart"):
            assert event.value == pytest.approx((item.price_micros or 0) / 1e6 * (event.quantity or 0))


def test_sessions_are_funnels(shop: Shop) -> None:
    seen: dict[str, list[Event]] = defaultdict(list)
    for event in shop.events:
        if event.action == "purchase":
            before = {(e.action, e.item_id) for e in seen[event.session_id]}
            assert ("add_to_cart", event.item_id) in before
        seen[event.session_id].append(event)
    assert all(len({(e.user_id, e.channel) for e in session}) == 1 for session in seen.values())


def test_words_follow_the_taste_noisily_and_name_no_good() -> None:
    """What a customer says tells their shelves, better than chance and worse than certainly, whatever they buy next."""
    dice, shelves = Dice(np.random.default_rng(0)), [shelf for department in DEPARTMENTS for shelf in department.shelves]
    assert len(INTERESTS) == len(shelves)
    taste = Taste(shelves=(3, 7), weights=(0.7, 0.3), brands=(2, 2), loyalty=0.8)
    wishes = [wish(dice, taste, "en") for _ in range(2_000)]
    spoken_of = Counter(shelf for text in wishes for shelf, names in enumerate(INTERESTS) if any(name.en in text for name in names))
    assert spoken_of.total() == len(wishes)
    assert 0.5 < spoken_of[3] / len(wishes) < 0.65
    assert 0.2 < spoken_of[7] / len(wishes) < 0.32
    assert len(spoken_of) == len(shelves)
    dear = [text for text in wishes if any(text.startswith(start.partition("{")[0]) for start in WISHES["en"][2])]
    assert 0.8 < len(dear) / len(wishes) < 0.95
    goods = [good.en for shelf in shelves for good in shelf.goods]
    assert not any(good in name.en for names in INTERESTS for name in names for good in goods)


def test_stars_follow_the_taste_but_not_always() -> None:
    dice = Dice(np.random.default_rng(0))
    taste = Taste(shelves=(3, 7), weights=(0.7, 0.3), brands=(2, 0), loyalty=0.8)
    item = Item("i", "i")
    given = {
        (shelf, brand): [stars(dice, taste, ShelfItem(item, shelf, brand, 0, 1.0, ("", "", ""))) for _ in range(1_000)]
        for shelf, brand in ((3, 2), (7, 0), (3, 0), (9, 2))
    }
    means = {where: float(np.mean(rated)) for where, rated in given.items()}
    assert means[3, 2] == pytest.approx(means[7, 0], abs=0.15)
    assert means[3, 2] > means[3, 0] + 0.4 > means[9, 2] + 0.8
    assert {*given[3, 2]} == {*given[9, 2]} == {1, 2, 3, 4, 5}


def test_chinese_shop() -> None:
    shop = generate(7, end=END, language="zh", users=60)
    texts = [*(item.title for item in shop.items), *(item.category for item in shop.items), *(e.text for e in shop.events if e.text)]
    assert all(any("\u4e00" <= letter <= "\u9fff" for letter in text) for text in texts)
    assert {item.currency for item in shop.items} == {"CNY"}


def test_end_needs_a_time_zone() -> None:
    with pytest.raises(ValueError, match="time zone"):
        generate(7, end=datetime(2026, 3, 1), users=1)  # noqa: DTZ001


def test_popularity_is_bad_and_co_visitation_is_good(shop: Shop) -> None:
    """NDCG@10 of the next new purchase after a cut two weeks before the end, from what came before it."""
    index = {item.item_id: number for number, item in enumerate(shop.items)}
    cut = END.replace(hour=0, minute=0) - timedelta(days=14)
    touched, owned, wanted = np.zeros((3, 1500, len(index)), np.float32)
    for event in shop.events:
        row = int(event.user_id[1:]) - 1
        if event.item_id is None or event.action == "return":
            continue
        column = index[event.item_id]
        if event.occurred_at < cut:
            touched[row, column] = 1
            owned[row, column] = max(owned[row, column], event.action == "purchase")
        elif event.action == "purchase" and not wanted[row].any() and not owned[row, column]:
            wanted[row, column] = 1
    users = np.flatnonzero(wanted.any(1) & touched.any(1))
    together = touched.T @ touched
    size = np.sqrt(np.diag(together)) + 1e-9
    similar = together / (size[:, None] * size + 5)
    np.fill_diagonal(similar, 0)

    def ndcg(score: Callable[[int], np.ndarray]) -> float:
        gains = []
        for user in users:
            best = np.argsort(-np.where(owned[user] > 0, -np.inf, score(user)), kind="stable")[:10]
            gains.append(float((wanted[user, best] / np.log2(np.arange(10) + 2)).sum()))
        return float(np.mean(gains))

    sales = owned.sum(0)
    assert len(users) > 500
    assert ndcg(lambda user: sales) < 0.03
    assert ndcg(lambda user: touched[user] @ similar) > 0.12
