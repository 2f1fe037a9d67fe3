"""Writing a view's rows to the online store in bulk: batches are encoded while Redis works on the one before.

Each row is one call of a script that touches one key. It writes only what is newer than the view's rows there, and nothing for a
customer who was forgotten or merged meanwhile: decided and done in one step, where Feast's own store reads the times of all rows
first and writes later.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import redis
from redis.exceptions import ResponseError

from features.activity import FORGOTTEN_FIELD, MERGED_FIELD
from features.columns import common_size, encode_column, encode_times, entity_keys, joined
from features.layout import ViewLayout
from features.overlap import overlapped

# While one batch's answers are read, Redis works on the next.
_CONNECTIONS = 2

# ARGV: the field of the view's event time, that time, then fields and values; all of it is what HSET takes.
# Times compare as Feast compares them: equal is not newer, and one of 1970 or before gives way to any.
# Ordered so that a hash without the view, or with this very time, costs no decoding.
_WRITE = f"""
local function time_of(raw)
    local parts, i = {{0, 0}}, 1
    while i <= #raw do
        local part, value, scale, b = math.floor(raw:byte(i) / 8), 0, 1
        repeat
            i = i + 1
            b = raw:byte(i)
            value = value + (b % 128) * scale
            scale = scale * 128
        until b < 128
        if scale > 2^63 then return 0, 0 end
        parts[part] = value
        i = i + 1
    end
    return parts[1], parts[2]
end
local seen = redis.call('HMGET', KEYS[1], ARGV[1], '{FORGOTTEN_FIELD}', '{MERGED_FIELD}')
if seen[1] == ARGV[2] or seen[2] or seen[3] then return 0 end
if seen[1] then
    local seconds, nanos = time_of(seen[1])
    local offered, offered_nanos = time_of(ARGV[2])
    local newer = offered > seconds or (offered == seconds and offered_nanos > nanos)
    if (seconds > 0 or nanos > 0) and not newer then return 0 end
end
redis.call('HSET', KEYS[1], unpack(ARGV))
"""
_EXPIRE = "redis.call('EXPIRE', KEYS[1], {seconds})\n"


@dataclass(frozen=True)
class Commands:
    """Commands in Redis's protocol, one after the other, ready to be sent."""

    payload: memoryview
    count: int


def write_view(
    client: redis.Redis,
    layout: ViewLayout,
    batches: Iterable[pa.RecordBatch],
    *,
    project: str,
    expire_seconds: int | None = None,
) -> int:
    """Writes rows as Feast's materialization would; holds a few batches at a time.

    Args:
        client: connected to the shop's Redis database.
        layout: where the view stands in an entity's hash.
        batches: the entity's name, the event time, then the features in the layout's order; at most one row for each entity.
        project: the Feast project.
        expire_seconds: after how long a written hash expires as a whole; None is never.

    Returns:
        How many rows were written; the others were no newer than what stood, or of a customer who is gone.

    Raises:
        redis.exceptions.RedisError: Redis refused a row or went away. Writing all again is harmless.
    """
    expire = "" if expire_seconds is None else _EXPIRE.format(seconds=expire_seconds)
    script: Any = client.script_load(f"{_WRITE}{expire}return 1")
    call = (b"EVALSHA", script.encode(), b"1")
    ready = (commands(call, layout, batch, project=project) for batch in batches)
    return sum(overlapped(partial(send, client), ready, threads=_CONNECTIONS))


def commands(call: Sequence[bytes], layout: ViewLayout, batch: pa.RecordBatch, *, project: str) -> Commands:
    """Returns one command for each row of a batch: ``call``, the entity's key, and fields and values as HSET takes them."""
    arguments: list[pa.Array | bytes] = [*call, entity_keys(layout.join_key, batch.column(0), project)]
    arguments += [layout.timestamp_field, encode_times(batch.column(1))]
    for field, dtype, column in zip(layout.fields, layout.dtypes, batch.columns[2:], strict=True):
        arguments += [field, encode_column(dtype, column)]
    pieces = [b"*%d\r\n" % len(arguments), *(piece for argument in arguments for piece in _bulk_string(argument))]
    whole = joined(*_merged(pieces))
    size = int(np.frombuffer(whole.buffers()[1], np.int32)[len(whole)]) if len(whole) else 0
    return Commands(memoryview(whole.buffers()[2] or b"")[:size], len(whole))


def _bulk_string(argument: pa.Array | bytes) -> tuple[pa.Array | bytes, ...]:
    if isinstance(argument, bytes):
        return (b"$%d\r\n%b\r\n" % (len(argument), argument),)
    if (size := common_size(argument)) is not None:
        return b"$%d\r\n" % size, argument, b"\r\n"
    return b"$", pc.binary_length(argument).cast(pa.string()).cast(pa.binary()), b"\r\n", argument, b"\r\n"


def _merged(pieces: Iterable[pa.Array | bytes]) -> Iterator[pa.Array | bytes]:
    """Makes one constant of those that follow each other: fewer pieces to copy for every row."""
    for constant, group in groupby(pieces, lambda piece: isinstance(piece, bytes)):
        if constant:
            yield b"".join(group)
        else:
            yield from group


def send(client: redis.Redis, batch: Commands) -> int:
    """Sends commands over one connection and returns the sum of their answers; raises the first refusal when all answers are read."""
    connection: Any = client.connection_pool.get_connection()
    try:
        connection.send_packed_command([batch.payload])
        total, refusal = 0, None
        for _ in range(batch.count):
            try:
                total += connection.read_response()
            except ResponseError as error:
                refusal = refusal or error
    except BaseException:
        connection.disconnect()  # answers may be under way that the next one to use it would take for theirs
        raise
    finally:
        client.connection_pool.release(connection)
    if refusal:
        raise refusal
    return total
