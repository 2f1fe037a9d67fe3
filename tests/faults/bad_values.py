"""Rows 31 and 32: text meant for a database, and values at and beyond every edge."""

import math
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.timestamp_pb2 import Timestamp

from concord.v1 import catalog_pb2, features_pb2, identity_pb2, understanding_pb2
from concord.v1.common_pb2 import Action, ChannelIdentity, Money
from tests.faults.caller import Caller, Reply, codes, event, identity, timed
from tests.faults.contract import unary
from tests.faults.rows import Checks, Seen, row
from tests.faults.world import World

MARK = "zq7"  # stands in every hostile text and nowhere else, so that it can be looked for in the statements
TEXTS = (
    f"{MARK}'; DROP TABLE users CASCADE; --",
    f'{MARK}" OR ""="" /*',
    f"{MARK}$1 %s %(user_id)s :name {{0}}",
    f"{MARK}\\'; SELECT pg_sleep(10); --",
    f"{MARK}\r\nFLUSHALL\r\n",
    f"{MARK}; $$BEGIN$$ E'\\000'",
)


@row(31, "SQL metacharacters in every string field", "stored literally, OK; tables intact; statements show only $n", fast=True)
async def metacharacters(world: World) -> Seen:
    checks = Checks()
    tables = "SELECT count(*) FROM information_schema.tables WHERE table_schema = 'public'"
    settings = world.copy()
    database = settings.postgres_dsn.rpartition("/")[2]
    before = world.postgres.execute(tables, database=database)
    world.postgres.execute(f"ALTER DATABASE {database} SET log_statement = 'all'")
    world.postgres.execute(f"ALTER DATABASE {database} SET log_parameter_max_length = 0")
    offset = world.postgres.log.stat().st_size
    async with world.serve(settings, CONCORD_ADMIN_PORT="-1") as server, Caller(server.address) as caller:
        for text in TEXTS:
            await _stored_literally(caller, text, checks)
        replies = [await _every_string(caller, method, text) for method in unary() for text in TEXTS]
        checks.expect(
            not {reply.code for reply in replies} & {"INTERNAL", "UNKNOWN", "UNAVAILABLE"}, f"every string field: {codes(replies)}"
        )
        checks.expect((await caller.recommend(world.customer())).ok, "answering afterwards")
    checks.expect(world.postgres.execute(tables, database=database) == before, "tables intact")
    with world.postgres.log.open(errors="replace") as log:
        log.seek(offset)
        logged = log.read()
    statements = logged.count("execute ") + logged.count("statement: ")
    checks.expect(statements > 50, f"the log shows statements ({statements})")
    checks.expect("$1" in logged and MARK not in logged, "statements with parameters only")
    checks.tell(
        f"{len(TEXTS)} texts stored and read back literally; in every string field of {len(unary())} methods: {codes(replies)}; "
        f"{statements} logged statements name $n and no text of ours"
    )
    return checks.seen()


async def _stored_literally(caller: Caller, text: str, checks: Checks) -> None:
    """Writes a text wherever one can be stored, and reads it back."""
    whom = identity("web", text)
    stored = await caller.record(
        event(whom, item=text, text=text, session_id=text, slate_id=text), event(whom, item="", text=text, action=Action.ACTION_SEARCH)
    )
    checks.expect(stored.ok and [result.status for result in stored.answer.results] == [1, 1], f"{text!r}: recorded ({stored.code})")
    profile = await caller.profile(whom)
    checks.expect(profile.ok, f"{text!r}: profile {profile.code}")
    if profile.ok:
        seen = profile.answer.recent_behaviours
        checks.expect({behaviour.text for behaviour in seen} == {text}, f"{text!r}: text read back")
        checks.expect(text in {behaviour.item_id for behaviour in seen}, f"{text!r}: item read back")
        checks.expect(text in {entry.channel_user_id for entry in profile.answer.identities}, f"{text!r}: identity read back")
    price = Money(currency_code="USD", units=1)
    item = catalog_pb2.Item(
        item_id=text, title=text, text=text, category=text, brand=text, price=price, image_ref=text, attributes={text: text}
    )
    upserted = await timed(caller.catalog.UpsertItems(catalog_pb2.UpsertItemsRequest(items=[item]), timeout=5))
    found = await timed(caller.catalog.GetItems(catalog_pb2.GetItemsRequest(item_ids=[text]), timeout=5))
    checks.expect(upserted.ok and found.ok, f"{text!r}: item stored ({upserted.code}, {found.code})")
    if found.ok and found.answer.items:
        read = found.answer.items[0]
        for field in ("item_id", "title", "text", "category", "brand", "image_ref"):
            checks.expect(getattr(read, field) == text, f"{text!r}: {field} read back")
        checks.expect(dict(read.attributes) == {text: text}, f"{text!r}: attributes read back")


async def _every_string(caller: Caller, method: Any, text: str) -> Reply:
    """Calls a method with the text in every string field, however deep; refusals are fine, errors are not."""
    message = method.request()
    _fill(message, text, depth=0)
    return await caller.raw(method.path, message.SerializeToString())


def _fill(message: Any, text: str, *, depth: int) -> None:
    for field in message.DESCRIPTOR.fields:
        repeated = field.is_repeated
        if field.type == FieldDescriptor.TYPE_STRING:
            if repeated:
                getattr(message, field.name).append(text)
            else:
                setattr(message, field.name, text)
        elif field.type == FieldDescriptor.TYPE_MESSAGE and depth < 4:
            if field.message_type.GetOptions().map_entry:
                getattr(message, field.name)[text] = text
            elif not field.message_type.full_name.startswith("google.protobuf."):
                value = getattr(message, field.name)
                _fill(value.add() if repeated else value, text, depth=depth + 1)


@row(
    32,
    "NaN, Inf, int64 bounds, year 9999, NUL, right-to-left text, 10,000 items",
    "INVALID_ARGUMENT or exact round-trip; no INTERNAL",
    fast=True,
)
async def extremes(world: World) -> Seen:
    checks = Checks()
    async with world.caller() as (_, caller):
        await _numbers(world, caller, checks)
        await _times(world, caller, checks)
        await _texts(world, caller, checks)
        await _sizes(caller, checks)
        replies = [
            await caller.raw(method.path, _extreme(method, world).SerializeToString())
            for method in unary()
            for _ in range(world.scaled(40))
        ]
        checks.expect(
            not {reply.code for reply in replies} & {"INTERNAL", "UNKNOWN", "UNAVAILABLE"}, f"extremes everywhere: {codes(replies)}"
        )
        checks.tell(f"extremes in all fields at once: {codes(replies)}")
    return checks.seen()


async def _numbers(world: World, caller: Caller, checks: Checks) -> None:
    whom = world.customer()
    for value in (math.nan, math.inf, -math.inf, -1.0, 1e300):
        for fields in ({"value": value, "action": Action.ACTION_PURCHASE}, {"quantity": value}):
            reply = await caller.record(event(whom, **fields))
            checks.expect(reply.ok and reply.answer.results[0].status == 3, f"{fields}: rejected ({reply.code})")
    for value in (0.0, 5e-324, 0.1 + 0.2, 9e12):
        reply = await caller.record(event(whom, value=value, quantity=value, action=Action.ACTION_PURCHASE, item=f"n{value!r}"))
        checks.expect(reply.ok and reply.answer.results[0].status == 1, f"{value!r}: stored ({reply.code})")
        rows = world.postgres.execute("SELECT value, quantity FROM events WHERE item_id = %s", database="shop", parameters=[f"n{value!r}"])
        checks.expect(rows == [(value, value)], f"{value!r}: round-trip ({rows})")
    for limit in (-1, 2**31 - 1, -(2**31)):
        checks.expect((await caller.recommend(whom, limit=limit)).code == "INVALID_ARGUMENT", f"limit {limit}")
    for stock, code in ((2**63 - 1, "OK"), (-(2**63), "INVALID_ARGUMENT"), (-1, "INVALID_ARGUMENT")):
        item = catalog_pb2.Item(item_id="edge", title="edge", price=Money(currency_code="USD", units=1), stock=stock)
        reply = await timed(caller.catalog.UpsertItems(catalog_pb2.UpsertItemsRequest(items=[item]), timeout=5))
        checks.expect(reply.code == code, f"stock {stock}: {reply.code}")
    found = await timed(caller.catalog.GetItems(catalog_pb2.GetItemsRequest(item_ids=["edge"]), timeout=5))
    checks.expect(found.ok and found.answer.items[0].stock == 2**63 - 1, "stock 2^63-1: round-trip")
    for units in (2**63 - 1, -(2**63)):
        item = catalog_pb2.Item(item_id="edge", title="edge", price=Money(currency_code="USD", units=units))
        reply = await timed(caller.catalog.UpsertItems(catalog_pb2.UpsertItemsRequest(items=[item]), timeout=5))
        checks.expect(reply.code == "INVALID_ARGUMENT", f"units {units}: {reply.code}")


async def _times(world: World, caller: Caller, checks: Checks) -> None:
    whom = world.customer()
    for seconds, nanos in ((253_402_300_799, 0), (-62_135_596_800, 0), (2**63 - 1, 0), (-(2**63), 0), (1, -1), (1, 2**31 - 1)):
        reply = await caller.record(event(whom, occurred_at=Timestamp(seconds=seconds, nanos=nanos)))
        checks.expect(reply.ok and reply.answer.results[0].status == 3, f"time {seconds}.{nanos}: rejected ({reply.code})")
    reply = await caller.record(event(whom, item="epoch", occurred_at=Timestamp(seconds=0, nanos=123_456_000)))
    rows = world.postgres.execute(
        "SELECT extract(epoch FROM occurred_at)::text FROM events WHERE item_id = 'epoch' AND user_id = %s",
        database="shop",
        parameters=[whom],
    )
    checks.expect(reply.ok and rows == [("0.123456",)], f"1970: round-trip ({rows})")
    item = catalog_pb2.Item(item_id="late", title="late", listed_at=Timestamp(seconds=253_402_300_799))
    listed = await timed(caller.catalog.UpsertItems(catalog_pb2.UpsertItemsRequest(items=[item]), timeout=5))
    checks.expect(listed.code == "INVALID_ARGUMENT", f"listed in 9999: {listed.code}")


async def _texts(world: World, caller: Caller, checks: Checks) -> None:
    whom = world.customer()
    refused = await caller.record(event(whom, item="", text="a\0b", action=Action.ACTION_SEARCH))
    checks.expect(refused.ok and refused.answer.results[0].status == 3, f"NUL: rejected ({refused.code})")
    checks.expect((await caller.profile(identity("web", "a\0b"))).code == "INVALID_ARGUMENT", "NUL in an id")
    for text in ("مرحبا \u202eabc\u202c שלום", "e\u0301\u200d👩‍👩‍👧‍👦\U0010ffff", "\u2028\x01\x7f", "漢字" * 1_000):
        reply = await caller.record(event(whom, item="", text=text, action=Action.ACTION_MESSAGE))
        checks.expect(reply.ok and reply.answer.results[0].status == 1, f"{text[:8]!r}: stored ({reply.code})")
        rows = world.postgres.execute("SELECT 1 FROM events WHERE user_id = %s AND text = %s", database="shop", parameters=[whom, text])
        checks.expect(len(rows) == 1, f"{text[:8]!r}: round-trip")
        profile = await caller.profile(whom)
        checks.expect(profile.ok and profile.answer.recent_behaviours[0].text == text[:160], f"{text[:8]!r}: in the profile")
        checks.expect((await caller.recommend(whom)).ok, f"{text[:8]!r}: recommend afterwards")
    long = await caller.record(event(whom, item="", text="a" * 2_001, action=Action.ACTION_SEARCH))
    checks.expect(long.ok and long.answer.results[0].reason == "TEXT_TOO_LONG", "2,001 characters")


async def _sizes(caller: Caller, checks: Checks) -> None:
    many = [f"i{k}" for k in range(10_000)]
    calls = {
        "10,000 items upserted": caller.catalog.UpsertItems(
            catalog_pb2.UpsertItemsRequest(items=[catalog_pb2.Item(item_id=item, title="t") for item in many]), timeout=10
        ),
        "10,000 items read": caller.catalog.GetItems(catalog_pb2.GetItemsRequest(item_ids=many), timeout=10),
        "10,000 entities": caller.features.GetOnlineFeatures(
            features_pb2.GetOnlineFeaturesRequest(feature_service="profile_v1", entities=[features_pb2.EntityRow(user_id=i) for i in many]),
            timeout=10,
        ),
        "an id of 10,000 characters": caller.identities.ResolveIdentity(
            identity_pb2.ResolveIdentityRequest(identity=ChannelIdentity(channel="web", channel_user_id="x" * 10_000)), timeout=10
        ),
    }
    for name, texts in {
        "10,000 texts": many,
        "a text of 10,001 characters": ["x" * 10_001],
        "a million characters": ["x" * 10_000] * 100,
    }.items():
        request = understanding_pb2.EmbedTextRequest(channel="web", texts=texts, purpose=understanding_pb2.EMBEDDING_PURPOSE_ITEM)
        calls[name] = caller.understanding.EmbedText(request, timeout=10)
    replies = {name: await timed(call) for name, call in calls.items()}
    replies["10,000 events"] = await caller.record(*(event(identity("web", "many"), item=item) for item in many[:10_000]))
    for name, reply in replies.items():
        checks.expect(reply.code == "INVALID_ARGUMENT", f"{name}: {reply.code}")
    checks.tell(f"{len(replies)} oversized lists and ids: {codes(replies.values())}")


_INTEGERS = (-(2**63), -1, 0, 1, 2**63 - 1)
_FLOATS = (math.nan, math.inf, -math.inf, -0.0, 5e-324, 1.8e308)
_STRINGS = ("", "\0", "\u202e", "web", "home", "x" * 3_000, "👩‍👧" * 50, "*", "../../etc/passwd")


def _extreme(method: Any, world: World) -> Any:
    """Returns a request with an extreme value in every field."""
    message = method.request()
    _fill_extremes(message, world, depth=0)
    return message


def _fill_extremes(message: Any, world: World, *, depth: int) -> None:
    for field in message.DESCRIPTOR.fields:
        repeated = field.is_repeated
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            if depth < 4 and not field.message_type.GetOptions().map_entry:
                value = getattr(message, field.name)
                _fill_extremes(value.add() if repeated else value, world, depth=depth + 1)
            continue
        value = _value(field, world)
        if value is None:
            continue
        if repeated:
            getattr(message, field.name).append(value)
        else:
            setattr(message, field.name, value)


def _value(field: FieldDescriptor, world: World) -> Any:
    if field.type == FieldDescriptor.TYPE_STRING:
        return world.rng.choice(_STRINGS)
    if field.type in {FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT}:
        return world.rng.choice(_FLOATS)
    if field.type == FieldDescriptor.TYPE_INT64:
        return world.rng.choice(_INTEGERS)
    if field.type == FieldDescriptor.TYPE_INT32:
        return world.rng.choice((-(2**31), -1, 0, 1, 2**31 - 1))
    if field.type == FieldDescriptor.TYPE_ENUM:
        return world.rng.choice((0, 1, 2, 2**31 - 1))
    if field.type == FieldDescriptor.TYPE_BOOL:
        return world.rng.random() < 0.5
    return None
