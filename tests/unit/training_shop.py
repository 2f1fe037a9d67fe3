"""A small made-up shop in memory for the training tests: items in two categories, customers who buy along a chain."""

import numpy as np

from features.behaviour import ACTIONS, MICROS_PER_DAY, Activity, Behaviour
from features.item_table import POPULARITY, ItemTable
from training.config import TrainConfig
from training.distill import TowerData
from training.events import EventLog
from training.labels import visit_labels
from training.text import activity_texts, load_tokenizer, tokenize
from training.train import TowerSet

DAY = MICROS_PER_DAY
START = 20_000 * DAY


def item_table(count: int = 12) -> ItemTable:
    """Items i00, i01, …; even ones are cups, odd ones pans; all listed on day one and sold at least once."""
    ids = tuple(f"i{k:02d}" for k in range(count))
    titles = tuple(f"{'cup' if k % 2 == 0 else 'pan'} number {k}" for k in range(count))
    popularity = np.zeros((count, len(POPULARITY)), np.float32)
    popularity[:, POPULARITY.index("purchases_total")] = np.arange(count, 0, -1)
    return ItemTable(
        index_version=1,
        ids=ids,
        titles=titles,
        texts=titles,
        content_hashes=tuple(f"h{k}" for k in range(count)),
        category_names=tuple(("cups", "pans")[k % 2] for k in range(count)),
        brand_names=("",) * count,
        categories=np.array([1 + k % 2 for k in range(count)], np.int32),
        brands=np.zeros(count, np.int32),
        log_price=np.log(np.arange(1, count + 1)).astype(np.float32),
        popularity=popularity,
        age_days=np.full(count, 100, np.float32),
        relation_from=np.zeros(0, np.int32),
        relation_to=np.zeros(0, np.int32),
        relation_weight=np.zeros(0, np.float32),
        listed_days=np.full(count, 1.0),
    )


def event_log(rows: list[tuple[str, str, int, float, int]]) -> EventLog:
    """Builds a log from (customer, action, item row or -1, day, visit number of the customer)."""
    ordered = sorted(enumerate(rows), key=lambda numbered: (numbered[1][0], numbered[1][3], numbered[0]))
    users: dict[str, int] = {}
    visits: dict[tuple[str, int], int] = {}
    columns: list[tuple[int, int, int, int, int]] = []
    for _, (user, action, item, day, visit) in ordered:
        code, number = users.setdefault(user, len(users)), visits.setdefault((user, visit), len(visits))
        columns.append((code, item, ACTIONS.index(action), START + round(day * DAY), number))
    user_c, item_c, action_c, time_c, visit_c = np.array(columns, np.int64).reshape(-1, 5).T
    return EventLog(
        tuple(users), user_c.astype(np.int32), item_c.astype(np.int32), action_c.astype(np.int8), time_c, visit_c.astype(np.int32)
    )


def activity_before(log: EventLog, user: str, time: int, table: ItemTable) -> Activity:
    """What the point-in-time join must give, by brute force over the log."""
    mine = np.flatnonzero((log.user == log.users.index(user)) & (log.time < time))[::-1]
    behaviours = tuple(Behaviour(table.ids[log.item[k]], ACTIONS[log.action[k]], "web", int(log.time[k])) for k in mine[:50])
    bought: dict[str, int] = {}
    for k in mine:
        if ACTIONS[log.action[k]] == "purchase":
            bought.setdefault(table.ids[log.item[k]], int(log.time[k]) // DAY)
    return Activity(len(mine), behaviours, tuple(bought), tuple(bought.values()))


def chain_log(customers: int = 60, items: int = 12, visits: int = 6, seed: int = 0) -> EventLog:
    """Customers who on each visit view some item and buy the one after their last purchase; each starts somewhere."""
    rng = np.random.default_rng(seed)
    rows: list[tuple[str, str, int, float, int]] = []
    for number in range(customers):
        start = int(rng.integers(items))
        for visit in range(visits):
            day, item = visit * 10 + float(rng.uniform(0, 5)), (start + visit) % items
            rows.append((f"u{number:03d}", "view", int(rng.integers(items)), day, visit))
            rows.append((f"u{number:03d}", "purchase", item, day + 0.01, visit))
    return event_log(rows)


def tower_data(config: TrainConfig, customers: int = 30) -> TowerData:
    """What towers learn from in this shop: every purchase as a label, and the same ones to validate on."""
    tokenizer, log, table = load_tokenizer("tiny"), chain_log(customers=customers), item_table()
    labels = visit_labels(log, ("purchase",), start=START, end=START + 99 * DAY)
    texts = activity_texts([activity_before(log, label.user_id, label.time, table) for label in labels], table, 4)
    made = TowerSet(labels, tokenize(tokenizer, texts, config.user_tokens))
    return TowerData(tokenize(tokenizer, table.texts, config.item_tokens), made, made)
