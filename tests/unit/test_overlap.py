"""Work done while the next items are made: in order, bounded, and with its errors told."""

import threading
from collections.abc import Iterator

import pytest

from features.overlap import overlapped


@pytest.mark.parametrize("threads", [1, 3])
def test_results_come_in_the_order_of_the_items(threads: int) -> None:
    release = threading.Event()

    def work(item: int) -> int:
        if item == 0 and threads > 1:
            assert release.wait(10)  # the first is done last
        elif item == 2:
            release.set()
        return item * item

    assert list(overlapped(work, range(20), threads=threads)) == [item * item for item in range(20)]
    assert list(overlapped(work, [], threads=threads)) == []


@pytest.mark.parametrize("threads", [1, 3])
def test_no_more_is_made_than_can_soon_be_worked_on(threads: int) -> None:
    made: list[int] = []
    gates = [threading.Event() for _ in range(50)]

    def items() -> Iterator[int]:
        for item in range(50):
            made.append(item)
            yield item

    def work(item: int) -> int:
        assert gates[item].wait(10)
        return item

    results = overlapped(work, items(), threads=threads)
    for seen in range(40):
        gates[seen].set()
        assert next(results) == seen
        assert len(made) == min(50, seen + 2 + threads)  # given back, worked on, and one ready
    for gate in gates:
        gate.set()
    assert list(results) == list(range(40, 50))


def test_the_next_item_is_made_while_one_is_worked_on() -> None:
    made = threading.Event()

    def items() -> Iterator[int]:
        yield 0
        made.set()
        yield 1

    assert list(overlapped(lambda item: made.wait(10) and item, items())) == [0, 1]


def test_an_error_of_the_work_or_of_the_items_is_raised() -> None:
    def work(item: int) -> int:
        if item == 3:
            raise ValueError("three")
        return item

    def items() -> Iterator[int]:
        yield 1
        raise KeyError("no more")

    with pytest.raises(ValueError, match="three"):
        list(overlapped(work, range(10)))
    with pytest.raises(KeyError, match="no more"):
        list(overlapped(work, items()))
