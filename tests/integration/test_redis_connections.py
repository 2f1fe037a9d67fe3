"""Connections to Redis that are lost at awkward moments."""

import asyncio

import pytest
import redis.exceptions
import uvloop

from server.database import redis_client
from server.settings import ServerSettings


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
