"""Shards are whole or absent, belong to one plan, and are read a group at a time; ragged sequences are what tuples would be."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.ragged import Ragged
from training.shards import Shards, batches


def rows(start: int, count: int) -> pa.Table:
    return pa.table({"user_id": [f"u{k:05d}" for k in range(start, start + count)], "at": list(range(start, start + count))})


def test_rows_come_back_in_order_and_in_groups(tmp_path: Path) -> None:
    shards = Shards(tmp_path, "user_id")
    shards.begin({"rows": 1})
    shards.write(1, rows(2_500, 10))
    shards.write(0, rows(0, 2_500))
    groups = list(shards.groups())
    assert [len(group) for group in groups] == [1_000, 1_000, 500, 10]
    assert pa.concat_tables(groups).equals(rows(0, 2_510))
    assert len(shards) == 2_510
    index = shards.index()
    assert [end for end, _ in index] == [(999, "u00999"), (1_999, "u01999"), (2_499, "u02499"), (2_509, "u02509")]
    assert shards.read(*index[1][1]).equals(rows(1_000, 1_000))


def test_a_shard_that_was_not_finished_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = Shards(tmp_path, "user_id")
    shards.begin({"rows": 1})
    monkeypatch.setattr("training.shards.os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        shards.write(0, rows(0, 10))
    assert not shards.finished(0, 10)
    assert len(shards) == 0


def test_only_shards_of_the_same_plan_are_kept(tmp_path: Path) -> None:
    shards = Shards(tmp_path, "user_id")
    shards.begin({"rows": 1})
    shards.write(0, rows(0, 10))
    shards.begin({"rows": 1})
    assert shards.finished(0, 10)
    assert not shards.finished(0, 11)
    assert not shards.finished(1, 10)
    shards.begin({"rows": 2})
    assert not shards.finished(0, 10)


@given(st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=5)), st.integers(0, 4))
def test_ragged_sequences_are_what_tuples_would_be(sequences: list[list[int]], cut: int) -> None:
    expected = [tuple(sequence) for sequence in sequences]
    ragged = Ragged.joined([Ragged(sequences[:cut]), Ragged(()), Ragged(sequences[cut:])])
    assert list(ragged) == expected
    assert ragged[: cut + 1] == expected[: cut + 1]
    assert [ragged[np.int64(k)] for k in range(len(ragged))] == expected
    assert [ragged[-1 - k] for k in range(len(ragged))] == expected[::-1]
    with pytest.raises(IndexError):
        ragged[len(expected)]


def test_batches_hold_everything_once() -> None:
    assert list(batches(iter(range(7)), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(batches([], 3)) == []
