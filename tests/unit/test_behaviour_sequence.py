"""Behaviours as numbers: what is read, in which order, under which ids, and that later behaviours change nothing earlier."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.behaviour import ACTIONS, ACTIVITY_LENGTH, Activity, Behaviour
from features.sequence import TOWER_INPUTS, SequenceSpec, behaviour_sequence, tower_inputs
from tests.unit.tables import table

Rows = list[tuple[str, str, str, int]]
SECOND, DAY = 1_000_000, 86_400_000_000
SPEC = SequenceSpec(
    length=6, text_count=2, actions=("purchase", "search", "view"), channels=("app", "web"), gap_seconds=(60, 3_600, 86_400)
)
ROWS = table(8).rows
_ONE = st.tuples(st.sampled_from([*ROWS, "", "gone"]), st.sampled_from(ACTIONS), st.sampled_from(["app", "store"]), st.integers(0, 10**6))


def happened(rows: Rows) -> Activity:
    """Behaviours (item, action, channel, seconds since the one before), oldest first."""
    times = 10**15 + np.cumsum([seconds for *_, seconds in rows]) * SECOND
    made = [Behaviour(item, action, channel, int(time), "red mug") for (item, action, channel, _), time in zip(rows, times, strict=True)]
    return Activity(len(made), tuple(made[::-1]))


def test_behaviours_are_numbered_oldest_first() -> None:
    seen = behaviour_sequence(
        happened([("i003", "view", "web", 0), ("", "search", "app", 30), ("i004", "purchase", "web", 60), ("i003", "view", "app", 90_000)]),
        ROWS,
        SPEC,
    )
    assert seen.rows.tolist() == [3, -1, 4, 3]
    assert seen.texts == ("", "red mug", "", "")
    assert seen.actions.tolist() == [3, 2, 1, 3]
    assert seen.channels.tolist() == [2, 1, 2, 1]
    assert seen.gaps.tolist() == [0, 1, 2, 4]  # the first is unknown; 60 s reach the first edge, 90,000 s all of them
    assert seen.places.tolist() == [3, 2, 1, 0]


def test_names_the_training_has_not_met_are_unknown() -> None:
    seen = behaviour_sequence(happened([("i001", "wishlist", "store", 0), ("i001", "view", "", 0)]), ROWS, SPEC)
    assert seen.actions.tolist() == [0, 3]
    assert seen.channels.tolist() == [0, 0]


def test_what_cannot_be_read_is_left_out_and_takes_no_place() -> None:
    rows = [("i001", "view", "web", 0), *[("gone", "view", "web", 1)] * 5, *[("", "search", "web", 1)] * 5, ("i002", "view", "web", 1)]
    seen = behaviour_sequence(happened(rows), ROWS, SPEC)
    assert seen.rows.tolist() == [1, -1, -1, 2]  # the two newest searches; the gap across what is left out is the whole one
    assert seen.gaps.tolist() == [0, 1, 1, 1]
    silent = Activity(1, (Behaviour("", "search", "web", 10**15),))
    assert len(behaviour_sequence(silent, ROWS, SPEC)) == 0


def told(*rows: tuple[str, str, str]) -> Activity:
    """Behaviours (item, action, text), newest first, a second apart."""
    made = [Behaviour(item, action, "web", 10**15 - k * SECOND, text) for k, (item, action, text) in enumerate(rows)]
    return Activity(len(made), tuple(made))


def test_a_review_is_its_item_and_then_its_words_and_complaints_have_an_action_of_their_own() -> None:
    spec = SPEC.model_copy(update={"actions": ("rate", "rate_low", "review", "review_low", "view")})
    seen = behaviour_sequence(
        told(
            ("i002", "review", "2 of 5: broke"),
            ("i002", "rate", "2 of 5"),
            ("i001", "review", "5 of 5: lovely"),
            ("i001", "rate", "3 of 5"),
        ),
        ROWS,
        spec,
    )
    assert seen.rows.tolist() == [1, 1, -1, 2, 2, -1]
    assert seen.texts == ("", "", "lovely", "", "", "broke")
    assert seen.actions.tolist() == [1, 3, 3, 2, 4, 4]
    assert seen.places.tolist() == [3, 2, 2, 1, 0, 0]
    assert seen.gaps.tolist() == [0, 1, 1, 1, 1, 1]


def test_words_take_a_place_of_the_texts_and_never_one_without_their_item() -> None:
    reviews = told(*[("i001", "review", f"4 of 5: word {k}") for k in range(4)])
    seen = behaviour_sequence(reviews, ROWS, SPEC)
    assert seen.texts == ("", "", "", "word 1", "", "word 0")  # two texts are read; the newest
    assert seen.rows.tolist() == [1, 1, 1, -1, 1, -1]
    short = behaviour_sequence(reviews, ROWS, SPEC.model_copy(update={"length": 1}))
    assert (short.rows.tolist(), short.texts) == ([-1], ("word 0",))
    gone = behaviour_sequence(
        told(("gone", "review", "4 of 5: lovely"), ("i003", "review", "4 of 5"), ("i004", "message", "is it red?")), ROWS, SPEC
    )
    assert (gone.rows.tolist(), gone.texts) == ([4, -1, 3], ("", "is it red?", ""))


@given(st.lists(_ONE, max_size=20), st.lists(_ONE, min_size=1, max_size=3))
def test_a_later_behaviour_changes_no_earlier_number(before: Rows, later: Rows) -> None:
    spec = SPEC.model_copy(update={"length": ACTIVITY_LENGTH, "text_count": ACTIVITY_LENGTH})
    known, more = (behaviour_sequence(happened(rows), ROWS, spec) for rows in (before, before + later))
    for name in ("rows", "actions", "channels", "gaps"):
        assert getattr(more, name)[: len(known)].tolist() == getattr(known, name).tolist()
    assert more.texts[: len(known)] == known.texts


@given(st.lists(_ONE, max_size=20), st.integers(1, 6))
def test_a_shorter_tower_reads_the_newest(rows: Rows, length: int) -> None:
    whole = behaviour_sequence(happened(rows), ROWS, SPEC)
    short = behaviour_sequence(happened(rows), ROWS, SPEC.model_copy(update={"length": length}))
    assert short.rows.tolist() == whole.rows[-length:].tolist()
    assert short.places.tolist() == whole.places[-length:].tolist()
    assert short.gaps.tolist()[1:] == whole.gaps[-length:].tolist()[1:]
    assert short.gaps.tolist()[:1] in ([], [0])


def test_the_graphs_input_has_one_shape_and_the_newest_comes_last() -> None:
    seen = behaviour_sequence(happened([("i003", "view", "web", 0), ("", "search", "app", 30)]), ROWS, SPEC)
    items = np.arange(16, dtype=np.float32).reshape(8, 2)
    gathered = seen.vectors(items, lambda text: np.array([len(text), -1], np.float32))
    assert gathered.tolist() == [[6, 7], [7, -1]]
    inputs = tower_inputs(seen, gathered, SPEC)
    assert tuple(inputs) == TOWER_INPUTS
    assert {name: (array.shape, array.dtype.name) for name, array in inputs.items()} == {
        "vectors": ((1, 6, 2), "float32"),
        "actions": ((1, 6), "int64"),
        "channels": ((1, 6), "int64"),
        "gaps": ((1, 6), "int64"),
        "length": ((1,), "int64"),
    }
    assert inputs["vectors"][0, 4:].tolist() == gathered.tolist()
    assert not inputs["vectors"][0, :4].any()
    assert inputs["actions"][0].tolist() == [0, 0, 0, 0, 3, 2]
    assert inputs["length"].tolist() == [2]


@pytest.mark.parametrize("length", [0, ACTIVITY_LENGTH + 1])
def test_a_length_the_feature_does_not_hold_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="length"):
        SequenceSpec(length=length)
