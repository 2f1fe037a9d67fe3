"""The connection to Redis that all calls share: order, cancellation, refusals, silence, loss."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import hiredis
import pytest
import redis.exceptions

from cli.stack import embedded_redis
from server.database import OnlineClient, redis_client
from server.online.wire import Script
from server.settings import ServerSettings


@pytest.fixture
async def client(shop: ServerSettings, tmp_path: Path) -> AsyncIterator[OnlineClient]:
    with embedded_redis(tmp_path / "redis") as url:
        client = redis_client(shop.model_copy(update={"redis_url": url, "redis_timeout_seconds": 0.3}))
        yield client
        await client.aclose()


async def test_calls_at_once_share_a_connection_and_get_their_own_replies(client: OnlineClient) -> None:
    before = len(await client.client_list())
    asked = (client.wire.ask([("SET", f"k{n}", n), ("GET", f"k{n}")]) for n in range(500))
    assert await asyncio.gather(*asked) == [[b"OK", b"%d" % n] for n in range(500)]
    assert len(await client.client_list()) == before + 1


async def test_what_goes_in_one_turn_of_the_loop_goes_in_one_write(client: OnlineClient) -> None:
    await client.wire.ask([("PING",)])
    assert client.wire._line is not None
    writes: list[bytes] = []
    transport = client.wire._line._transport

    class Watched:
        def write(self, data: bytes) -> None:
            writes.append(data)
            transport.write(data)

        def abort(self) -> None:
            transport.abort()

    client.wire._line._transport = Watched()  # type: ignore[assignment]
    await asyncio.gather(*(client.wire.ask([("PING",)]) for _ in range(20)))
    assert len(writes) == 1


async def test_a_call_that_is_given_up_leaves_the_replies_of_others_in_place(client: OnlineClient) -> None:
    await client.set("a", "1")
    await client.set("b", "2")
    given_up = asyncio.create_task(client.wire.ask([("GET", "a")]))
    await asyncio.sleep(0)  # it has been sent
    kept = asyncio.create_task(client.wire.ask([("GET", "b")]))
    await asyncio.sleep(0)
    given_up.cancel()
    assert await kept == [b"2"]
    assert await client.wire.ask([("GET", "a")]) == [b"1"]


async def test_a_refusal_is_that_call_s_alone(client: OnlineClient) -> None:
    await client.set("text", "x")
    refused, answered = await asyncio.gather(
        client.wire.ask([("GET", "text"), ("HGET", "text", "f")]), client.wire.ask([("GET", "text")]), return_exceptions=True
    )
    assert isinstance(refused, redis.exceptions.ResponseError)
    assert answered == [b"x"]


async def test_silence_ends_every_call_and_the_next_one_connects_anew(client: OnlineClient) -> None:
    await client.wire.ask([("PING",)])
    pid = (await client.info("server"))["process_id"]
    loop = asyncio.get_running_loop()
    os.kill(pid, signal.SIGSTOP)
    started = loop.time()
    try:
        outcomes = await asyncio.gather(*(client.wire.ask([("PING",)]) for _ in range(3)), return_exceptions=True)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert [type(outcome) for outcome in outcomes] == [redis.exceptions.TimeoutError] * 3
    assert 0.25 < loop.time() - started < 2
    assert await client.wire.ask([("PING",)]) == [b"PONG"]


async def test_a_lost_connection_is_told_to_its_calls_and_made_anew(client: OnlineClient) -> None:
    await client.wire.ask([("PING",)])
    blocked = asyncio.create_task(client.wire.ask([("BLPOP", "nothing", 5)]))
    await asyncio.sleep(0.05)
    await client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    with pytest.raises(redis.exceptions.ConnectionError):
        await blocked
    assert await client.wire.ask([("PING",)]) == [b"PONG"]


async def test_a_connection_lost_as_soon_as_it_was_made_is_told_at_once(client: OnlineClient) -> None:
    await client.wire.ask([("PING",)])
    line = client.wire._line
    assert line is not None
    line.give_up(redis.exceptions.ConnectionError("gone"))
    async with asyncio.timeout(0.1):  # and not after the timeout of a reply
        with pytest.raises(redis.exceptions.ConnectionError):
            await line.send([("PING",)])


async def test_nothing_is_sent_once_it_is_closed(client: OnlineClient) -> None:
    await client.wire.ask([("PING",)])
    waiting = asyncio.create_task(client.wire.ask([("BLPOP", "nothing", 5)]))
    await asyncio.sleep(0.05)
    await client.wire.aclose()
    with pytest.raises(redis.exceptions.ConnectionError):
        await waiting


async def test_a_redis_that_does_not_let_in_costs_all_who_wait_one_timeout(client: OnlineClient) -> None:
    pid = (await client.info("server"))["process_id"]
    loop = asyncio.get_running_loop()
    os.kill(pid, signal.SIGSTOP)
    started = loop.time()
    try:
        outcomes = await asyncio.gather(*(client.wire.ask([("PING",)]) for _ in range(20)), return_exceptions=True)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert {type(outcome) for outcome in outcomes} == {redis.exceptions.TimeoutError}
    assert loop.time() - started < 2
    assert await client.wire.ask([("PING",)]) == [b"PONG"]


async def test_a_script_that_redis_has_lost_is_loaded_again(client: OnlineClient) -> None:
    count = Script("return redis.call('INCRBY', KEYS[1], ARGV[1])")
    assert await client.wire.run(count, [count.on("n", 2), ("GET", "n")]) == [2, b"2"]
    await client.script_flush()
    assert await client.wire.run(count, [count.on("n", 3), count.on("n", 4)]) == [5, 9]


async def test_nothing_to_ask_is_answered_at_once(client: OnlineClient) -> None:
    assert await client.wire.ask([]) == []


async def test_replies_that_come_slowly_are_waited_for_while_they_come(shop: ServerSettings) -> None:
    """Three times 0.2 s with a limit of 0.3 s: what counts is silence, not how long all of it takes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = hiredis.Reader()
        while data := await reader.read(65_536):
            asked.feed(data)
            while command := asked.gets():
                await asyncio.sleep(0.2 if command == [b"PING"] else 0)
                writer.write(b"+OK\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
    slow = redis_client(shop.model_copy(update={"redis_url": url, "redis_timeout_seconds": 0.3}))
    assert await slow.wire.ask([("PING",)] * 3) == [b"OK"] * 3
    await slow.aclose()
    server.close()
    await server.wait_closed()
