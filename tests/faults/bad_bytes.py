"""Rows 21 to 28: bytes that are no message, messages too deep and too large, other protocols, peers that do not read or send."""

import asyncio
import socket
import time

import grpc

from concord.v1 import events_pb2
from tests.faults.caller import Caller, Reply, codes, event, timed
from tests.faults.contract import unary
from tests.faults.processes import Server
from tests.faults.rows import Checks, Seen, row
from tests.faults.world import World

RECOMMEND = "/concord.v1.RecommendationService/Recommend"
# What the parser, Python or a store would say; none of it may reach a caller.
LEAKS = ("Traceback", "DecodeError", "Error parsing", "psycopg", "redis", "server/", "/usr", ".py", "SELECT ", "INSERT ", "postgres")
_ALLOWED = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "ABORTED"}


def leaked(replies: list[Reply]) -> list[str]:
    """Returns what callers were told and must not be."""
    return [reply.details for reply in replies if any(word in reply.details for word in LEAKS)]


async def refused_without_a_word(world: World, bodies: list[bytes]) -> Seen:
    """Sends malformed bodies to every method: each must be INVALID_ARGUMENT with empty details, and the server must live."""
    checks = Checks()
    async with world.caller() as (server, caller):
        replies = [await caller.raw(method.path, body) for method in unary() for body in bodies]
        checks.expect({(reply.code, reply.details) for reply in replies} == {("INVALID_ARGUMENT", "")}, "all INVALID_ARGUMENT and silent")
        checks.expect((await caller.recommend(world.customer())).ok, "answering afterwards")
        checks.expect(server.alive, "alive")
    checks.tell(f"{codes(replies)} over {len(unary())} methods, details {sorted({reply.details for reply in replies})[:3]!r}")
    return checks.seen()


@row(21, "malformed protobuf, random bytes", "INVALID_ARGUMENT with empty details; process alive; no text leaks", fast=True)
async def malformed(world: World) -> Seen:
    checks = Checks()
    made = [b"\xff\xff\xff", b"\x0a\xff", bytes(range(1, 256)), b"\x07\x00", b"\x0c"]
    first = await refused_without_a_word(world, made)
    checks.expect(first.ok, first.text)
    async with world.caller() as (server, caller):
        bodies = [world.rng.randbytes(world.rng.randint(0, 300)) for _ in range(world.scaled(5_000))]
        replies = [await caller.raw(world.rng.choice(unary()).path, body) for body in bodies]
        checks.expect({reply.code for reply in replies} <= _ALLOWED, f"random bytes: {codes(replies)}")
        checks.expect(not leaked(replies), f"nothing leaked: {leaked(replies)[:2]}")
        checks.expect(server.alive and (await caller.recommend(world.customer())).ok, "alive")
    checks.tell(f"{first.text}; random bytes: {codes(replies)}")
    return checks.seen()


@row(22, "invalid UTF-8 in a string", "INVALID_ARGUMENT with empty details", fast=True)
async def invalid_utf8(world: World) -> Seen:
    checks = Checks()
    async with world.caller() as (server, caller):
        # Field 2 of RecommendRequest is `channel`; field 1 of ResolveIdentity holds a message whose field 1 is a string.
        bodies = {
            RECOMMEND: b"\x12\x02\xff\xfe",
            "/concord.v1.IdentityService/ResolveIdentity": b"\x0a\x04\x0a\x02\xc3\x28",
            "/concord.v1.EventService/RecordEvents": b"\x0a\x06\x2a\x04\xed\xa0\x80a",
        }
        replies = [await caller.raw(method, body) for method, body in bodies.items()]
        checks.expect({(reply.code, reply.details) for reply in replies} == {("INVALID_ARGUMENT", "")}, "INVALID_ARGUMENT and silent")
        checks.expect(server.alive and (await caller.recommend(world.customer())).ok, "alive")
    checks.tell(f"{codes(replies)}, details empty")
    return checks.seen()


@row(23, "messages nested 200 and 100,000 deep", "INVALID_ARGUMENT with empty details; no stack overflow", fast=True)
async def nested(world: World) -> Seen:
    deep = b""
    for _ in range(200):  # an unknown group within a group; properly closed, so that only the depth is wrong
        deep = b"\x9b\x06" + deep + b"\x9c\x06"
    return await refused_without_a_word(world, [deep, b"\x9b\x06" * 100_000])


@row(24, "messages above the limit (4 MiB)", "RESOURCE_EXHAUSTED; memory bounded", fast=True)
async def oversize(world: World) -> Seen:
    checks = Checks()
    body = b"\0" * (8 * 2**20)
    async with world.caller() as (server, caller):
        await caller.recommend(world.customer())
        before = server.rss_mb()
        replies = [await caller.raw(RECOMMEND, body, timeout=10) for _ in range(max(8, world.scaled(40)))]
        grown = server.rss_mb() - before
        checks.expect({reply.code for reply in replies} == {"RESOURCE_EXHAUSTED"}, codes(replies))
        checks.expect(grown < 64, f"memory bounded: grew {grown:.0f} MB")
        checks.expect((await caller.recommend(world.customer())).ok, "answering afterwards")
    checks.tell(f"{codes(replies)} for 8 MiB each; memory {before:.0f} MB, {grown:+.0f} MB")
    return checks.seen()


@row(25, "metadata of 17 KB", "RESOURCE_EXHAUSTED (hard limit 16,384); 9 KB pass", fast=True)
async def large_metadata(world: World) -> Seen:
    checks = Checks()
    async with world.caller() as (_, caller):
        body = b""
        method = "/concord.v1.ModelService/ListModels"
        # Several of each: between a soft and a hard limit gRPC refuses by chance.
        large = [await caller.raw(method, body, metadata=(("x-padding", "a" * 17_000),)) for _ in range(30)]
        small = [await caller.raw(method, body, metadata=(("x-padding", "a" * 9_000),)) for _ in range(30)]
        checks.expect({reply.code for reply in large} == {"RESOURCE_EXHAUSTED"}, f"17 KB: {codes(large)}")
        checks.expect(all(reply.ok for reply in small), f"9 KB: {codes(small)}")
    checks.tell(f"17 KB {codes(large)}; 9 KB {codes(small)}")
    return checks.seen()


_JUNK = {
    "HTTP/1.1": b"GET / HTTP/1.1\r\nHost: concord\r\n\r\n",
    "garbage": b"\x16\x03\x01\x02\x00" + b"\xa5" * 2_000,
    "preface and junk": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 2_000,
    "preface and a broken header block": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0\0\0\x04\x01\x04\0\0\0\x01\x80\xff\xff\xff",
}


def _closed_by(port: int, junk: bytes) -> bool:
    """Sends junk and reads to the end; False when the server keeps the connection for 5 s."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as line:
        try:
            line.sendall(junk)
            while line.recv(65_536):
                pass
        except TimeoutError:
            return False
        except OSError:
            return True  # reset
    return True


@row(26, "HTTP/1.1, garbage, HTTP/2 preface and junk on the port", "connection closed; server alive, other clients unaffected", fast=True)
async def junk_on_the_port(world: World) -> Seen:
    checks = Checks()
    async with world.caller() as (server, caller):
        whom = world.customer()
        await caller.recommend(whom)
        replies: list[Reply] = []
        busy = True

        async def others() -> None:
            while busy:
                replies.append(await caller.recommend(whom, timeout=2))
                await asyncio.sleep(0.005)

        task = asyncio.create_task(others())
        for name, junk in _JUNK.items():
            closed = await asyncio.gather(*(asyncio.to_thread(_closed_by, server.port, junk) for _ in range(4)))
            checks.expect(all(closed), f"{name}: closed ({closed})")
        await asyncio.sleep(0.5)
        busy = False
        await task
        checks.expect(len(replies) > 20 and all(reply.ok for reply in replies), f"others: {codes(replies)}")
        checks.expect(server.alive, "alive")
    checks.tell(f"{len(_JUNK)} kinds of junk, 4 connections each, all closed; other clients meanwhile: {codes(replies)}")
    return checks.seen()


@row(27, "stalled upload stream; slow reader", "DEADLINE_EXCEEDED or a cap per stream; window bounded; slot freed", fast=True)
async def stalled_streams(world: World) -> Seen:
    checks = Checks()
    async with world.serve(world.settings(), CONCORD_STREAM_IDLE_SECONDS="1") as server, Caller(server.address) as caller:
        before = server.rss_mb()
        stalled = await asyncio.gather(*(_stalled_upload(caller) for _ in range(20)))
        checks.expect({reply.code for reply in stalled} == {"DEADLINE_EXCEEDED"}, f"stalled uploads: {codes(stalled)}")
        longest = max(reply.seconds for reply in stalled)
        checks.expect(longest < 4, f"stalled uploads ended after {longest:.1f} s")
        await _held_and_freed(server)
        # A reader that stops reading: its answers fill the window, and the server must then neither wait nor store for ever.
        async with Caller(server.address, options=[("grpc.http2.lookahead_bytes", 65_536), ("grpc.http2.bdp_probe", 0)]) as slow:
            stream = slow.events.StreamEvents(timeout=60)
            sent: list[int] = []
            sending = asyncio.create_task(_send_without_reading(stream, world.customer(), sent))
            held, seconds = await _held_and_freed(server)
            checks.expect(held, "the slow reader held a slot")
            checks.expect(1 < seconds < 8, f"the slot of the slow reader is freed after {seconds:.1f} s")
            checks.expect(not sending.done(), "the sender is still stuck, and does not matter any more")
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
        grown = server.rss_mb() - before
        checks.expect(grown < 100, f"memory bounded: grew {grown:.0f} MB")
    checks.tell(
        f"20 stalled uploads {codes(stalled)} after {longest:.1f} s; a client that read nothing could send {len(sent)} batches of 500 "
        f"and held its slot for {seconds:.1f} s; memory {grown:+.0f} MB"
    )
    return checks.seen()


async def _stalled_upload(caller: Caller) -> Reply:
    """Opens a stream and sends nothing."""
    return await timed(caller.events.StreamEvents(timeout=30).read())


async def _send_without_reading(stream: "grpc.aio.StreamStreamCall", whom: str, sent: list[int]) -> None:
    """Sends batches whose answers are large, and reads none of them."""
    # Rejected events need no store, and each brings an answer of a hundred bytes.
    batch = events_pb2.StreamEventsRequest(events=[event(whom, channel="no-such-channel") for _ in range(500)])
    while True:
        await stream.write(batch)
        sent.append(len(sent))


async def _held_and_freed(server: Server) -> tuple[bool, float]:
    """Waits up to 10 s until no call has been in flight for 1.5 s; returns whether one was, and how long."""
    started, held, last = time.perf_counter(), False, time.perf_counter()
    while time.perf_counter() - started < 10 and time.perf_counter() - last < 1.5:
        if await server.metric("concord_rpc_in_flight") > 0:
            held, last = True, time.perf_counter()
        await asyncio.sleep(0.02)
    return held, last - started


@row(28, "unknown method; empty request", "UNIMPLEMENTED; INVALID_ARGUMENT", fast=True)
async def unknown_and_empty(world: World) -> Seen:
    checks = Checks()
    async with world.caller() as (_, caller):
        unknown = [await caller.raw(path, b"") for path in ("/concord.v1.RecommendationService/Nothing", "/concord.v1.None/X", "/x")]
        checks.expect({reply.code for reply in unknown} == {"UNIMPLEMENTED"}, codes(unknown))
        empty = {method.path.rpartition("/")[2]: await caller.raw(method.path, b"") for method in unary()}
        wanted = {name: reply for name, reply in empty.items() if reply.code != "OK"}
        checks.expect({reply.code for reply in wanted.values()} == {"INVALID_ARGUMENT"}, str({n: r.code for n, r in wanted.items()}))
        complete = sorted(set(empty) - set(wanted))  # methods whose empty request is a whole one: lists
        checks.expect(all(name.startswith(("List", "GetActive", "Get")) for name in complete), f"answered an empty request: {complete}")
    checks.tell(f"3 unknown methods {codes(unknown)}; empty requests: {codes(wanted.values())}, OK for {', '.join(complete)}")
    return checks.seen()
