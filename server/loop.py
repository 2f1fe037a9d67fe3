"""The event loop that servers and commands run on, and the garbage collector beside it."""

import asyncio
import gc
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

# New objects until the collector looks at the newest; Python's own 700 are those of three calls.
_NEW_OBJECTS = 50_000


def finished(work: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine on uvloop where it is installed, which is everywhere but Windows."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    return uvloop.run(work)


def spare_what_stays() -> None:
    """Takes all objects there are now out of the garbage collector's sight, and has it look less often.

    What a call leaves is freed by its reference counts; looking for cycles took 6 % of the time of a call, most of it among the
    modules and the catalogue, which stay.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_NEW_OBJECTS, *gc.get_threshold()[1:])
