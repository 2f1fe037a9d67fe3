"""Work on a stream of items by threads while the next items are made, with a bound on what is under way."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")


def overlapped(work: Callable[[T], U], items: Iterable[T], *, threads: int = 1) -> Iterator[U]:
    """Yields ``work`` of each item, in their order.

    Items are taken by the caller's thread; one is ready when all threads work, and no more. With one thread the work itself happens
    in order too. The first error ends it, once what is under way is done.
    """
    with ThreadPoolExecutor(threads) as pool:
        under_way: deque[Future[U]] = deque()
        for item in items:
            under_way.append(pool.submit(work, item))
            if len(under_way) > threads + 1:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
