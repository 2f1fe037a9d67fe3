"""Writing a view's rows to the online store in bulk: batches are encoded while Redis works on the one before.

Each row is one call of a script that touches one key. It writes only what is newer than the view's rows there, and nothing for a
customer who was forgotten or merged meanwhile: decided and done in one step, where Feast's own store reads the times of all rows
first and writes later.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
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

# KEYS[1]: the entity. ARGV: the view's event time, then the value of each feature. The view's hash fields stand in the script: as
# arguments of every row they were half of what Redis reads and turns into Lua's strings and back, a sixth of its time.
# Times compare as Feast compares them: equal is not newer, and one of 1970 or before gives way to any.
# Ordered so that a hash without the view, or with this very time, costs no decoding.
_DECIDE = f"""
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
local seen = redis.call('HMGET', KEYS[1], TIME_FIELD, '{FORGOTTEN_FIELD}', '{MERGED_FIELD}')
if seen[1] == ARGV[1] or seen[2] or seen[3] then return 0 end
if seen[1] then
    local seconds, nanos = time_of(seen[1])
    local offered, offered_nanos = time_of(ARGV[1])
    local newer = offered > seconds or (offered == seconds and offered_nanos > nanos)
    if (seconds > 0 or nanos > 0) and not newer then return 0 end
end
"""
_HSET_FIELDS = 100  # Lua passes at most 250 values at a time


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
    script: Any = client.script_load(_script(layout, expire_seconds))
    call = (b"EVALSHA", script.encode(), b"1")
    ready = (commands([*call, *encoded(layout, batch, project=project)]) for batch in batches)
    return sum(overlapped(partial(send, client), ready, threads=_CONNECTIONS))


def _script(layout: ViewLayout, expire_seconds: int | None) -> str:
    """Returns the script that writes a row of a view; it answers 1 where it did."""
    time_field = _literal(layout.timestamp_field)
    fields = [time_field, *map(_literal, layout.fields)]
    pairs = [f"{field}, ARGV[{place}]" for place, field in enumerate(fields, 1)]
    writes = [f"redis.call('HSET', KEYS[1], {', '.join(pairs[k : k + _HSET_FIELDS])})" for k in range(0, len(pairs), _HSET_FIELDS)]
    expires = [] if expire_seconds is None else [f"redis.call('EXPIRE', KEYS[1], {expire_seconds})"]
    return "\n".join([_DECIDE.replace("TIME_FIELD", time_field), *writes, *expires, "return 1"])


def _literal(field: bytes) -> str:
    return "'" + "".join(f"\\{octet:03d}" for octet in field) + "'"


def encoded(layout: ViewLayout, batch: pa.RecordBatch, *, project: str) -> list[pa.Array]:
    """Returns a batch's columns as binaries: the entities' keys, their event times, then the values of each feature."""
    columns = zip(layout.dtypes, batch.columns[2:], strict=True)
    keys = entity_keys(layout.join_key, batch.column(0), project)
    return [keys, encode_times(batch.column(1)), *(encode_column(dtype, column) for dtype, column in columns)]


def commands(arguments: Sequence[pa.Array | bytes]) -> Commands:
    """Returns one command for each row of the arrays among its arguments; a constant is the same in every row."""
    pieces, constant = [], b"*%d\r\n" % len(arguments)
    for argument in arguments:
        if isinstance(argument, bytes):
            constant += b"$%d\r\n%b\r\n" % (len(argument), argument)
        elif (size := common_size(argument)) is not None:
            pieces += [b"%b$%d\r\n" % (constant, size), argument]
            constant = b"\r\n"
        else:
            # What stands before each length, and the few lengths there are, are put together once: a third of the pieces to copy.
            lengths = pc.binary_length(argument).dictionary_encode()
            heads = [b"%b$%d\r\n" % (constant, length) for length in lengths.dictionary.to_pylist()]
            pieces += [pa.array(heads, pa.binary()).take(lengths.indices), argument]
            constant = b"\r\n"
    whole = joined(*pieces, constant)
    size = int(np.frombuffer(whole.buffers()[1], np.int32)[len(whole)]) if len(whole) else 0
    return Commands(memoryview(whole.buffers()[2] or b"")[:size], len(whole))


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
