"""Connections to Redis that are lost at awkward moments."""

import asyncio
import contextlib
import ssl
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

import pytest
import redis.exceptions
import uvloop

from cli.stack import embedded_redis
from server.database import redis_client
from server.settings import ServerSettings
from tests.certificates import Authority


def test_a_connection_that_closes_before_the_first_write_is_a_lost_connection(shop: ServerSettings) -> None:
    """uvloop raises RuntimeError there, which was answered as INTERNAL when Redis was killed while a replica connected."""

    async def write_to_a_closed_connection() -> None:
        client = redis_client(shop)
        connection = client.connection_pool.make_connection()
        await connection.connect()
        connection._writer.transport.abort()
        await asyncio.sleep(0)
        with pytest.raises(redis.exceptions.ConnectionError):
            await connection.send_command("PING")
        assert await client.ping()  # and the pool goes on
        await client.aclose()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(write_to_a_closed_connection())


@pytest.mark.parametrize("kind", ["tls", "socket"])
def test_the_wire_takes_over_connections_of_every_kind(shop: ServerSettings, tmp_path: Path, kind: str) -> None:
    """redis-py has shaken hands over TLS or a socket; on uvloop, as servers run, the wire then reads and writes in its place."""
    with embedded_redis(tmp_path / "redis") as url, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_asked_through_a_relay(shop, tmp_path, url=url, kind=kind))


async def _asked_through_a_relay(shop: ServerSettings, folder: Path, *, url: str, kind: str) -> None:
    port, relays = urlsplit(url).port, list[asyncio.Task[None]]()

    async def copied(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(65_536):
                target.write(data)
        target.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        relays.append(cast("asyncio.Task[None]", asyncio.current_task()))
        behind, ahead = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(copied(reader, ahead), copied(behind, writer))

    if kind == "tls":
        authority = Authority()
        certificate, key = authority.server().write(folder, "cache")
        (folder / "ca.pem").write_bytes(authority.pem)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate, key)
        server: asyncio.Server = await asyncio.start_server(relay, "127.0.0.1", 0, ssl=context)
        address = f"rediss://127.0.0.1:{server.sockets[0].getsockname()[1]}/0?ssl_ca_certs={folder / 'ca.pem'}"
    else:
        server = await asyncio.start_unix_server(relay, folder / "s")
        address = f"unix://{folder / 's'}"
    client = redis_client(shop.model_copy(update={"redis_url": address}))
    many = [("SET", f"k{n}", "x" * n) for n in range(0, 40_000, 1_000)]
    assert await client.wire.ask(many) == [b"OK"] * 40
    assert await client.wire.ask([("GET", "k39000"), ("GET", "k0")]) == [b"x" * 39_000, b""]
    await client.aclose()
    await asyncio.wait(relays, timeout=10)
    server.close()
