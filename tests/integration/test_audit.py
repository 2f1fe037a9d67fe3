"""The audit on real servers: a clean shop has nothing to report, and every injected skew is found and called by its name."""

import asyncio
import json
import re
import shutil
import struct
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
import redis

from cli.audit import run_audit
from cli.stack import free_port
from concord import Concord, user
from features.activity import ACTIVITY_VIEW, FORM_FEATURE
from features.bundle import COLLABORATIVE, Manifest, checksums, read_bundle, write_manifest
from features.catalogue import Item, Relation, publish_epoch, upsert_items, upsert_relations
from features.layout import encode_value, entity_key
from features.models import publish
from features.registry import load_registry
from server.audit.report import AuditReport, Outcome, Violation
from server.audit.run import Scope
from server.settings import ServerSettings
from tests.integration.fixtures import NewShop
from tests.integration.serving import deploy, fill, served
from tests.integration.test_processes import environment

CHANNELS = ("web", "app", "store")


@dataclass
class Shop:
    """A served shop of its own, a client per channel, and customers nobody has used yet."""

    settings: ServerSettings
    address: str
    bundle: Path
    customers: list[str]
    clients: dict[str, Concord] = field(default_factory=dict)

    def __getitem__(self, channel: str) -> Concord:
        return self.clients[channel]

    def fresh(self) -> str:
        return self.customers.pop()

    async def ask(self, customer: str, *, channel: str = "web", surface: str = "home", limit: int = 10, **arguments: Any) -> Any:
        return await self[channel].recommend(user(customer), surface=surface, limit=limit, **arguments)

    async def logged(self, slate_id: str, channel: str = "") -> None:
        """Waits until an exposure of a slate (in a channel) is in PostgreSQL."""
        query = "SELECT 1 FROM exposures WHERE slate_id = %s AND %s IN ('', channel)"
        async with asyncio.timeout(10):
            while not self.execute(query, slate_id, channel):
                await asyncio.sleep(0.05)

    async def audit(self, *, last: int = 2000, customers: int = 3, servers: list[str] | None = None, since: float = 3600.0) -> AuditReport:
        scope = Scope(datetime.now(UTC) - timedelta(seconds=since), last, "", customers, ("home",))
        addresses = [self.address] if servers is None else servers
        return await run_audit(self.settings, scope, servers=addresses, canary="", progress=lambda _s, _d, _t: None)

    def redis(self) -> "redis.Redis":
        return redis.Redis.from_url(self.settings.redis_url)

    def slates_key(self, customer: str) -> str:
        return f"concord:{self.settings.project}:slates:{customer}"

    def key(self, customer: str) -> bytes:
        return entity_key("user_id", customer, self.settings.project)

    def state(self, customer: str) -> Any:
        return self.redis().hgetall(self.key(customer))

    def fields(self) -> dict[str, bytes]:
        """Feature names of the activity view to their hash fields."""
        layout = load_registry(self.settings).layouts[ACTIVITY_VIEW]
        return dict(zip(layout.features, layout.fields, strict=True))

    def execute(self, query: str, *parameters: Any) -> list[Any]:
        with psycopg.connect(self.settings.postgres_dsn) as connection:
            cursor = connection.execute(query.encode(), parameters)
            return cursor.fetchall() if cursor.description else []


@pytest.fixture
async def shop(new_shop: NewShop, bundle: Path, tmp_path: Path) -> AsyncIterator[Shop]:
    settings = new_shop().model_copy(update={"journal_seconds": 0.05})
    fill(settings, tmp_path / "sample", users=60)
    deploy(settings, bundle)
    with psycopg.connect(settings.postgres_dsn) as connection:
        customers = [row[0] for row in connection.execute("SELECT user_id FROM users WHERE version > 15 ORDER BY user_id")]
    async with served(settings) as address:
        made = Shop(settings, address, bundle, customers)
        for channel in CHANNELS:
            made.clients[channel] = await Concord(address, channel=channel, timeout=10.0).__aenter__()
        yield made
        for client in made.clients.values():
            await client.__aexit__()


def kinds(report: AuditReport) -> set[str]:
    return set(report.kinds)


def the(report: AuditReport, kind: str) -> Violation:
    return next(violation for violation in report.violations if violation.kind == kind)


def second_bundle(bundle: Path, folder: Path, version: str = "second") -> Path:
    """A model that ranks otherwise: the same networks with the collaborative weights turned round."""
    shutil.copytree(bundle, folder)
    weights = dict(np.load(folder / COLLABORATIVE))
    weights["weights"] = weights["weights"][::-1].copy()
    np.savez(folder / COLLABORATIVE, **weights)
    manifest = read_bundle_unchecked(folder)
    write_manifest(folder, manifest.model_copy(update={"model_version": version, "files": dict(checksums(folder))}))
    return folder


def read_bundle_unchecked(folder: Path) -> Manifest:
    return Manifest.model_validate_json((folder / "manifest.json").read_bytes())


async def test_a_clean_shop_has_nothing_to_report(shop: Shop) -> None:
    first, second = shop.fresh(), shop.fresh()
    for customer in (first, second):
        for channel in CHANNELS:
            await shop.ask(customer, channel=channel)
            whole = await shop.ask(customer, channel=channel, surface="product", limit=100, context_item_ids=["KIT-1", "KIT-2"])
        await shop.ask(customer, limit=5, page_token=(await shop.ask(customer, limit=5)).next_page_token)
    stranger = await shop["web"].recommend("nobody-yet", surface="home")
    # What moves after the answers: events, a price, a description, a relation, an epoch. None of it changes what was answered.
    for k in range(3):
        await shop["app"].record(shop["app"].event(user(first), "purchase", item_id=whole.items[k].item_id, quantity=1, value=3.0))
        await shop.ask(first, channel="store")
    item_id = whole.items[5].item_id
    with psycopg.connect(shop.settings.postgres_dsn) as connection:
        upsert_items(connection, [Item(item_id, "renamed", category="new", price_micros=7_770_000, currency="USD", stock=3)])
        upsert_relations(connection, [Relation(item_id, whole.items[6].item_id, "complement", 0.9)])
        publish_epoch(connection)
    async with asyncio.timeout(10):
        while (last := await shop.ask(second)).versions.index_version < 2:
            await asyncio.sleep(0.1)
    await shop.logged(last.slate_id)
    await shop.logged(stranger.slate_id)
    report = await shop.audit()
    assert report.violations == []
    assert report.replays["journal"]["equal"] >= 20
    assert report.replays["probe"]["equal"] == report.probes == 3 * len(shop.settings.channels)
    assert report.replays["redis"]["equal"] >= 5
    assert report.replay_count(Outcome.NOT_REPLAYABLE) == report.replay_count(Outcome.DIFFERS) == 0
    assert report.agreement == 1.0
    assert report.offers["equal"] > 500
    assert set(report.offers) <= {"equal", "unknown"}
    assert report.offers["unknown"] == 0
    assert report.states["equal"] == 3


def swapped(raw: bytes, a: int, b: int) -> bytes:
    """Exchanges two places of a committed slate, scores along with the items."""
    version, expires, payload = raw.split(b":", 2)
    count = struct.unpack_from("<H", payload, 2)[0]
    rows, scores = bytearray(payload[12 : 12 + 4 * count]), bytearray(payload[12 + 4 * count : 12 + 8 * count])
    for part in (rows, scores):
        part[4 * a : 4 * a + 4], part[4 * b : 4 * b + 4] = part[4 * b : 4 * b + 4], part[4 * a : 4 * a + 4]
    return b":".join((version, expires, payload[:12] + bytes(rows) + bytes(scores) + payload[12 + 8 * count :]))


async def test_a_tampered_slate_is_found_whether_it_was_shown_or_not(shop: Shop) -> None:
    shown, waiting = shop.fresh(), shop.fresh()
    honest = await shop.ask(shown)
    await shop.ask(waiting)
    for customer, places in ((shown, (0, 3)), (waiting, (20, 21))):
        ((slot, raw),) = shop.redis().hgetall(shop.slates_key(customer)).items()
        shop.redis().hset(shop.slates_key(customer), slot, swapped(raw, *places))
    tampered = await shop.ask(shown, channel="app")
    assert [item.item_id for item in tampered.items] != [item.item_id for item in honest.items]
    await shop.logged(tampered.slate_id, "app")
    report = await shop.audit(servers=[])
    assert kinds(report) == {"tampered_slate"}
    assert report.replays["journal"] == {"equal": 2, "differs": 1}
    logged = next(v for v in report.violations if v.check == "replay")
    assert (logged.customer, logged.slate_id, logged.channel) == (shown, tampered.slate_id, "app")
    assert logged.expected.startswith(f"place 0: {honest.items[0].item_id} at ")
    assert logged.seen.startswith(f"{honest.items[3].item_id} at ")
    assert {v.customer for v in report.violations if v.check == "state"} == {waiting}


async def test_a_tampered_slate_of_newcomers_is_found(shop: Shop) -> None:
    """They share one slate for each place, under a key of its own."""
    for context in ([], ["KIT-1"]):
        answer = await shop["web"].recommend("nobody-yet", surface="product" if context else "home", context_item_ids=context)
        await shop.logged(answer.slate_id)
    keys = sorted(shop.redis().keys(f"concord:{shop.settings.project}:newcomers:*"))
    assert len(keys) == 2
    for key in keys:
        ((slot, raw),) = shop.redis().hgetall(key).items()
        shop.redis().hset(key, slot, swapped(raw, 20, 21))
        shop.redis().hset(key, "_concord:forgotten", "1")  # as in the hash of a customer forgotten a moment ago
    report = await shop.audit(servers=[])
    assert [(v.kind, v.check, v.customer) for v in report.violations] == [("tampered_slate", "state", "")] * 2


async def test_scores_that_no_input_explains_are_tampered_with(shop: Shop) -> None:
    customer = shop.fresh()
    await shop.ask(customer)
    ((slot, raw),) = shop.redis().hgetall(shop.slates_key(customer)).items()
    version, expires, payload = raw.split(b":", 2)
    count = struct.unpack_from("<H", payload, 2)[0]
    scores = np.frombuffer(payload, "<f4", count, 12 + 4 * count) + np.float32(0.5)
    forged = payload[: 12 + 4 * count] + scores.tobytes() + payload[12 + 8 * count :]
    shop.redis().hset(shop.slates_key(customer), slot, b":".join((version, expires, forged)))
    answer = await shop.ask(customer)
    await shop.logged(answer.slate_id)
    assert kinds(await shop.audit(servers=[])) == {"tampered_slate"}


async def test_what_an_older_state_or_epoch_gives_is_called_by_its_name(shop: Shop) -> None:
    late, old = shop.fresh(), shop.fresh()
    stands: dict[str, tuple[bytes, bytes]] = {}
    for customer in (late, old):
        answer = await shop.ask(customer)
        ((slot, raw),) = shop.redis().hgetall(shop.slates_key(customer)).items()
        stands[customer] = (slot, raw)
    version = answer.versions.user_version
    # The customer bought something, but the slate of before is committed for the new version.
    bought = await shop["web"].record(shop["web"].event(user(late), "purchase", item_id="KIT-1", quantity=1, value=3.0))
    slot, raw = stands[late]
    token = bought.tokens[0]
    shop.redis().hset(shop.slates_key(late), slot, b"%d:%s" % (token.user_version, raw.split(b":", 1)[1]))
    # The catalogue moved on, but the slate of the epoch before is committed for the new one.
    with psycopg.connect(shop.settings.postgres_dsn) as connection:
        rows = connection.execute("SELECT item_id, price_micros FROM items ORDER BY item_id").fetchall()
        upsert_items(
            connection, [Item(item, f"all new {item}", category="one", price_micros=price, currency="USD") for item, price in rows]
        )
        publish_epoch(connection)
    stale = await shop.ask(late)
    assert stale.versions.user_version == token.user_version
    async with asyncio.timeout(20):
        while (await shop.ask(shop.customers[0])).versions.index_version < 2:
            await asyncio.sleep(0.1)
    slot, raw = stands[old]
    shop.redis().hset(shop.slates_key(old), slot.replace(b"|1", b"|2"), b"%d:%s" % (version, raw.split(b":", 1)[1]))
    outdated = await shop.ask(old)
    assert outdated.versions.index_version == 2
    for answer in (stale, outdated):
        await shop.logged(answer.slate_id)
    report = await shop.audit(servers=[])
    named = {(v.customer, v.kind, v.seen) for v in report.violations if v.check == "replay"}
    assert named == {
        (late, "other_state", f"exactly what user_version {token.user_version - 1} gives"),
        (old, "other_catalogue", "exactly what index epoch 1 gives"),
    }


async def test_forged_pointers_are_found(shop: Shop) -> None:
    assert (await shop.audit(servers=[])).violations == []
    shop.redis().hset(f"concord:{shop.settings.project}:fleet", mapping={"offer": 1_000_000, "model": "another"})
    report = await shop.audit(servers=[])
    assert {(v.kind, v.check) for v in report.violations} == {("forged_pointer", "pointers"), ("second_model", "pointers")}
    assert the(report, "forged_pointer").seen == "offer_version 1000000"
    assert the(report, "second_model").seen == "model another in Redis"


async def test_prices_changed_behind_the_version_counter_are_found(shop: Shop) -> None:
    customer = shop.fresh()
    before = await shop.ask(customer)
    item_id = before.items[0].item_id
    with psycopg.connect(shop.settings.postgres_dsn) as connection:
        row = connection.execute("SELECT title, text, category, brand, price_micros, currency FROM items WHERE item_id = %s", [item_id])
        title, text, category, brand, price, currency = row.fetchone() or ()
        changed = Item(item_id, title, text, category, brand, price_micros=price + 1_000_000, currency=currency)
        version = upsert_items(connection, [changed]).offer_version
    async with asyncio.timeout(10):
        while (await shop.ask(customer)).versions.offer_version < version:
            await asyncio.sleep(0.05)
    shop.execute("UPDATE items SET price_micros = %s WHERE item_id = %s", price, item_id)  # back to the old price, by hand
    report = await shop.audit(customers=1)
    assert kinds(report) == {"unversioned_offer", "stale_price"}
    assert the(report, "unversioned_offer").item_id == item_id
    assert the(report, "stale_price").expected.startswith(f"{price / 1e6:.2f} ")
    assert the(report, "stale_price").seen.startswith(f"{price / 1e6 + 1:.2f} ")
    # A replica that starts now reads the forged row: it disagrees with the others, and with the history of that very version.
    async with served(shop.settings) as address, Concord(address, channel="app", timeout=10.0) as late:
        answer = await late.recommend(user(customer), surface="home", limit=10)
        await shop.logged(answer.slate_id, "app")
        report = await shop.audit(customers=1, servers=[shop.address, address])
    assert kinds(report) == {"unversioned_offer", "stale_price", "price_differs"}
    logged = next(v for v in report.violations if v.kind == "stale_price" and v.channel == "app" and not v.replica)
    assert (logged.customer, logged.item_id, logged.slate_id) == (customer, item_id, answer.slate_id)
    assert logged.expected == f"{price / 1e6 + 1:.2f} {currency} at offer_version {version}"
    assert "the price of offer_version 1" in logged.seen
    assert {v.replica for v in report.violations if v.kind == "price_differs"} < {shop.address, address}


async def test_a_replica_with_another_models_files_is_found_and_the_model_named(shop: Shop, tmp_path: Path) -> None:
    active = read_bundle(shop.bundle).model_version
    other = second_bundle(shop.bundle, tmp_path / "second")
    with psycopg.connect(shop.settings.postgres_dsn) as connection:
        publish(connection, other, shop.settings.models_base)
    # Its folder of fetched bundles holds the second model under the first one's name: every checksum is right.
    astray = shop.settings.model_copy(update={"data_dir": tmp_path / "astray", "models_url": shop.settings.models_base})
    second_bundle(shop.bundle, astray.data_dir / "bundles" / active, active)
    customer = shop.fresh()
    async with served(astray) as address, Concord(address, channel="app", timeout=10.0) as client:
        answer = await client.recommend(user(customer), surface="home", limit=10)
        assert answer.versions.model_version == active
        await shop.logged(answer.slate_id)
    report = await shop.audit(servers=[])
    assert kinds(report) == {"second_model"}
    found = the(report, "second_model")
    assert (found.customer, found.slate_id) == (customer, answer.slate_id)
    assert found.expected.startswith(f"what model {active}, index epoch 1")
    assert found.seen == "exactly what model second gives"


async def test_a_replica_that_follows_other_pointers_is_found_live_and_in_the_log(shop: Shop, tmp_path: Path) -> None:
    active = read_bundle(shop.bundle).model_version
    with psycopg.connect(shop.settings.postgres_dsn) as connection:
        publish(connection, second_bundle(shop.bundle, tmp_path / "second"), shop.settings.models_base)
        connection.execute("UPDATE model_versions SET activated_at = activated_at - interval '1 hour'")
    customer = shop.fresh()
    await shop.ask(customer)
    number = int(shop.settings.redis_url.rpartition("/")[2])
    elsewhere = shop.settings.model_copy(update={"redis_url": f"{shop.settings.redis_url.rpartition('/')[0]}/{(number + 8) % 16}"})
    other = redis.Redis.from_url(elsewhere.redis_url)
    other.flushdb()
    async with served(elsewhere) as address, Concord(address, channel="app", timeout=10.0) as client:
        other.hset(f"concord:{shop.settings.project}:fleet", "model", "second")
        answer = await client.recommend(user(customer), surface="home", limit=10)
        assert answer.versions.model_version == "second"
        await shop.logged(answer.slate_id)
        report = await shop.audit(customers=1, servers=[shop.address, address])
    assert kinds(report) == {"second_model"}
    logged = next(v for v in report.violations if v.check == "replay")
    assert (logged.channel, logged.slate_id, logged.seen) == ("app", answer.slate_id, "model second")
    assert logged.expected == f"model {active}, the active one"
    assert {v.replica for v in report.violations if v.check == "probe"} == {address}
    assert report.replays["journal"] == {"equal": 2}  # each answer is what the model it names gives


async def test_a_replica_with_other_rules_and_one_that_is_silent_are_named(shop: Shop) -> None:
    """A replica that was taken for dead and comes back may meet those that joined without it: the one way to differ in rules."""
    silent = f"127.0.0.1:{free_port()}"
    shop.execute("INSERT INTO replicas VALUES ('woken', '10.0.0.9:1', now(), clock_timestamp(), 600, '', 0, 0, '{}', '{}', '', 'others')")
    report = await shop.audit(customers=1, servers=[shop.address, silent])
    assert {(v.kind, v.replica) for v in report.violations} == {("config_differs", "10.0.0.9:1"), ("no_answer", silent)}


async def test_forged_torn_and_future_online_state_is_told_apart(shop: Shop) -> None:
    forged, torn, ahead = shop.fresh(), shop.fresh(), shop.fresh()
    before = {customer: shop.state(customer) for customer in (forged, torn, ahead)}
    for customer in before:
        recorded = await shop["web"].record(shop["web"].event(user(customer), "view", item_id="KIT-1"))
        assert recorded.online
        await shop.logged((await shop.ask(customer)).slate_id)
    names = shop.fields()
    shop.redis().hset(shop.key(forged), names["recent_items"], encode_value("Array(String)", ["KIT-9"]))
    shop.redis().hset(shop.key(torn), names["recent_items"], before[torn][names["recent_items"]])
    shop.redis().hset(shop.key(ahead), names["version"], encode_value("Int64", 10_000))
    report = await shop.audit(servers=[])
    assert report.states == {"tampered_state": 1, "torn_state": 1, "future_state": 1}
    assert {(v.kind, v.customer) for v in report.violations} == {("tampered_state", forged), ("torn_state", torn), ("future_state", ahead)}
    assert the(report, "tampered_state").seen == f"other bytes in {ACTIVITY_VIEW}:recent_items"
    assert f"{ACTIVITY_VIEW}:recent_items" in the(report, "torn_state").seen
    assert report.staleness.versions_behind == 0


async def test_a_state_of_an_earlier_form_is_absent_and_not_forged(shop: Shop) -> None:
    customer = shop.fresh()
    await shop["web"].record(shop["web"].event(user(customer), "view", item_id="KIT-1"))
    await shop.logged((await shop.ask(customer)).slate_id)
    shop.redis().hdel(shop.key(customer), shop.fields()[FORM_FEATURE])
    report = await shop.audit(customers=1, servers=[])
    assert report.states == {"absent": 1}
    assert report.violations == []


async def test_a_forged_log_is_found(shop: Shop) -> None:
    score, item, gone = shop.fresh(), shop.fresh(), shop.fresh()
    for customer in (score, item, gone):
        await shop.logged((await shop.ask(customer)).slate_id)
    shop.execute("UPDATE exposures SET scores[1] = scores[1] + 1 WHERE user_id = %s", score)
    cut = ", ".join(
        f"{name} = {name}[:4] || {name}[6:]" for name in ("item_ids", "positions", "scores", "prices_micros", "currencies", "in_stock")
    )
    shop.execute(f"UPDATE exposures SET {cut} WHERE user_id = %s", item)
    shop.execute("UPDATE exposures SET user_version = 10000 WHERE user_id = %s", gone)
    report = await shop.audit(servers=[])
    assert {(v.kind, v.customer) for v in report.violations} == {("shown_differs", score), ("item_left_out", item), ("future_state", gone)}


async def test_what_cannot_be_replayed_is_counted_by_reason(shop: Shop) -> None:
    older, forgotten, known = shop.fresh(), shop.fresh(), shop.fresh()
    for customer in (older, forgotten, known):
        await shop.logged((await shop.ask(customer)).slate_id)
    shop.execute("UPDATE exposures SET positions = '{}' WHERE user_id = %s", older)
    shop.execute("UPDATE exposures SET user_id = 'somebody-forgotten' WHERE user_id = %s", forgotten)
    report = await shop.audit(servers=[])
    assert report.violations == []
    assert report.not_replayable == {"logged_by_older_release": 1, "customer_forgotten": 1}
    shop.execute("DELETE FROM model_versions")
    shutil.rmtree(shop.settings.data_dir / "bundles")
    assert (await shop.audit(servers=[])).not_replayable["model_or_epoch_gone"] == 1


async def test_merging_parting_and_forgetting_customers_is_no_violation(shop: Shop) -> None:
    older, younger = "older", "younger"
    for name in (older, younger):
        await shop["web"].record(*(shop["web"].event(name, "view", item_id=f"KIT-{k}") for k in range(1, 5)))
    ids = {name: (await shop["web"].resolve(name)).user_id for name in (older, younger)}
    for name in (older, younger):
        await shop.logged((await shop["web"].recommend(name, surface="home")).slate_id)
    await shop["web"].link(older, younger)
    merged = await shop["web"].recommend(younger, surface="home")
    assert merged.user_id == ids[older]
    await shop.logged(merged.slate_id)
    report = await shop.audit(servers=[])
    assert report.violations == []
    assert report.not_replayable == {"customer_regrouped": 1}  # what the younger one saw before
    assert report.replays["journal"]["equal"] == 2
    await shop["web"].unlink(older, younger)
    for name in (older, younger):
        await shop.logged((await shop["web"].recommend(name, surface="home")).slate_id)
    report = await shop.audit(servers=[], customers=4)
    assert report.violations == []
    assert report.replays["journal"]["equal"] >= 2
    assert report.replays["journal"]["equal"] + report.not_replayable["customer_regrouped"] == 5
    await shop["web"].forget(older)
    report = await shop.audit(servers=[], customers=4)
    assert report.violations == []
    assert shop.execute("SELECT count(*) FROM exposures WHERE user_id = %s", ids[older]) == [(0,)]
    assert shop.execute("SELECT count(*) FROM audit_results WHERE position(%s in result::text) > 0", ids[older]) == [(0,)]


async def test_staleness_is_measured_from_the_log_and_from_the_stores(shop: Shop) -> None:
    customer = shop.fresh()
    await shop.logged((await shop.ask(customer)).slate_id)
    await shop["web"].record(shop["web"].event(user(customer), "view", item_id="KIT-1"))
    # As if the answer had been given 3 s after the event it does not reflect.
    shop.execute("UPDATE exposures SET answered_at = now() + interval '3 seconds' WHERE user_id = %s", customer)
    shop.execute("UPDATE users SET version = version + 2 WHERE user_id = %s", customer)
    waiting = shop.fresh()
    shop.execute("INSERT INTO online_outbox (user_id, version) VALUES (%s, 1)", waiting)
    with psycopg.connect(shop.settings.postgres_dsn) as connection:
        # Held, so that recovery passes it over until the audit has seen it.
        connection.execute("SELECT 1 FROM online_outbox WHERE user_id = %s FOR UPDATE", [waiting])
        report = await shop.audit(servers=[], customers=2)
    stale = report.staleness
    assert stale.quantile(1) == pytest.approx(3.0, abs=1.0)
    assert (stale.customers_checked, stale.customers_lagging, stale.versions_behind) == (2, 1, 2)
    assert stale.outbox_size >= 1
    assert 0 < stale.outbox_seconds < 60


async def test_the_command_writes_table_json_page_and_metrics(shop: Shop, tmp_path: Path) -> None:
    customer = shop.fresh()
    await shop.logged((await shop.ask(customer)).slate_id)
    names = ("--json", "--html", "--prometheus")
    files = [tmp_path / name for name in ("audit.json", "audit.html", "audit.prom")]
    options = [text for name, file in zip(names, files, strict=True) for text in (name, str(file))]

    async def run() -> tuple[int, str]:
        command = [sys.executable, "-m", "cli.main", "audit", "--server", shop.address, "--customers", "1", "--write-canary", customer]
        process = await asyncio.create_subprocess_exec(
            *command, *options, env=environment(shop.settings), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        out, err = await process.communicate()
        assert process.returncode in (0, 1), err.decode()[-2000:]
        return process.returncode, out.decode()

    status, out = await run()
    summary = json.loads(out.splitlines()[-1])
    assert (status, summary["violations"], summary["agreement"]) == (0, 0, 1.0)
    whole = json.loads(files[0].read_text())
    assert whole["summary"] == summary
    assert 0 < whole["staleness"]["visible_seconds"] < 5
    html = files[1].read_text()
    assert html.count("<svg") == 4
    assert "The promise is kept" in html
    assert not re.search(r'(?:src|href)="(?!#)|@import|url\((?!#)', html)  # nothing from elsewhere
    assert 'concord_audit_violations{kind="tampered_slate"} 0.0' in files[2].read_text()
    assert shop.execute("SELECT result #>> '{summary,violations}' FROM audit_results") == [("0",)]
    shop.execute("UPDATE exposures SET scores[1] = scores[1] + 1 WHERE user_id = %s", customer)
    status, out = await run()
    assert status == 1
    assert json.loads(out.splitlines()[-1])["kinds"] == {"shown_differs": 1}
    assert "shown differs" in files[1].read_text()
    assert 'concord_audit_violations{kind="shown_differs"} 1.0' in files[2].read_text()
