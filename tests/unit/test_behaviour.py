"""Behaviour sequences as values: what context adds, and which phrases reach the encoder."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concord.v1 import common_pb2
from features.behaviour import ACTION_WEIGHT, ACTIONS, WRITTEN, Activity, Behaviour, behaviour_text, behaviours_of
from tests.unit.tables import activity, table

_ITEMS = [f"i{k:03d}" for k in range(8)]
_SEQUENCES = st.lists(st.tuples(st.sampled_from([*_ITEMS, "", "gone"]), st.sampled_from(ACTIONS)), max_size=50)


def behaved(pairs: list[tuple[str, str]]) -> Activity:
    return Activity(len(pairs), tuple(Behaviour(item, action, "web", 10**15 - k, f"text{k}") for k, (item, action) in enumerate(pairs)))


@given(_SEQUENCES)
def test_each_item_is_written_where_it_first_appears_with_its_strongest_action(pairs: list[tuple[str, str]]) -> None:
    """Against the rule written out plainly."""
    strongest = {item: max((action for other, action in pairs if other == item), key=ACTION_WEIGHT.__getitem__) for item, _ in pairs}
    said = {item: f": text{k}" for k, (item, action) in reversed([*enumerate(pairs)]) if action in WRITTEN}  # the newest is kept
    subjects = [f"title {item}{said.get(item, '')}" if item else f"text{k}" for k, (item, _) in enumerate(pairs)]
    expected = [subject for k, ((item, _), subject) in enumerate(zip(pairs, subjects, strict=True)) if item != "gone"]
    text = behaviour_text(behaved(pairs), table().title_of, limit=50)
    phrases = text.split("; ") if text else []
    assert [phrase.split(" ", 1)[1].removeprefix("for ") for phrase in phrases] == list(dict.fromkeys(expected))
    for item in set(_ITEMS) & set(strongest):
        one = behaviour_text(activity((item, strongest[item], 0)), table().title_of)
        weights = {a: ACTION_WEIGHT[a] for other, a in pairs if other == item}
        ties = {behaviour_text(activity((item, a, 0)), table().title_of) for a, w in weights.items() if w == max(weights.values())}
        assert one in ties
        assert sum(phrase.partition(":")[0] in ties for phrase in phrases) == 1


@given(_SEQUENCES, st.integers(1, 20))
def test_a_limit_cuts_the_oldest_phrases_off(pairs: list[tuple[str, str]], limit: int) -> None:
    whole = behaviour_text(behaved(pairs), table().title_of, limit=99).split("; ")
    assert behaviour_text(behaved(pairs), table().title_of, limit=limit).split("; ") == whole[:limit]


def opinion(action: str, text: str, item: str = "i001") -> Behaviour:
    return Behaviour(item, action, "web", 10**15, text)


@pytest.mark.parametrize(
    ("behaviours", "text"),
    [
        ([opinion("review", "4 of 5: soft but small")], "reviewed title i001: 4 of 5: soft but small"),
        ([opinion("rate", "4.5 of 5")], "rated title i001: 4.5 of 5"),
        ([opinion("review", "soft")], "reviewed title i001: soft"),
        ([opinion("rate", "")], "rated title i001"),
        ([opinion("review", "2 of 5: broke"), opinion("rate", "2 of 5"), opinion("purchase", "")], "bought title i001: 2 of 5: broke"),
        (
            [opinion("review", "1 of 5: worse than I thought"), opinion("review", "5 of 5: nice")],
            "reviewed title i001: 1 of 5: worse than I thought",
        ),
        ([opinion("message", "where is it?")], "asked title i001: where is it?"),
        ([opinion("message", "where is it?", item="")], "asked where is it?"),
        ([opinion("view", "said by nobody")], "viewed title i001"),
        ([opinion("review", "3 of 5: " + "x" * 152)], "reviewed title i001: 3 of 5: " + "x" * 52),
        ([opinion("review", "3 of 5: unknown item", item="gone")], ""),
    ],
)
def test_what_was_said_of_an_item_follows_it(behaviours: list[Behaviour], text: str) -> None:
    assert behaviour_text(Activity(len(behaviours), tuple(behaviours)), table().title_of) == text


@pytest.mark.parametrize(
    ("action", "text", "rating", "words"),
    [
        ("review", "4 of 5: soft", 4.0, "soft"),
        ("rate", "4.5 of 5", 4.5, ""),
        ("review", "soft", None, "soft"),
        ("review", "", None, ""),
        ("review", "9 of 5: soft", None, "9 of 5: soft"),
        ("review", "4 of 50", None, "4 of 50"),
        ("review", "2 of 5: 5 of 5: no", 2.0, "5 of 5: no"),
        ("message", "1 of 5: is that all you have?", None, "1 of 5: is that all you have?"),
    ],
)
def test_a_rating_is_read_from_where_it_is_written_and_nowhere_else(action: str, text: str, rating: float | None, words: str) -> None:
    seen = opinion(action, text)
    assert (seen.rating, seen.words) == (rating, words)


@pytest.mark.parametrize("action", ["rate", "review"])
def test_a_low_rating_shows_no_interest(action: str) -> None:
    interest = [opinion(action, text).interest for text in ("1 of 5", "2.9 of 5: meh", "3 of 5", "5 of 5: love it", "", "no rating")]
    assert interest == [0.0, 0.0, *[ACTION_WEIGHT[action]] * 4]
    assert opinion("purchase", "1 of 5").interest == 1.0


def test_actions_are_numbered_as_in_the_protos() -> None:
    numbers = [common_pb2.Action.Value(f"ACTION_{action.upper()}") for action in ACTIONS]
    columns = (["i"] * len(ACTIONS), numbers, ["web"] * len(ACTIONS), range(len(ACTIONS)), [""] * len(ACTIONS))
    assert [seen.action for seen in behaviours_of(*columns)] == list(ACTIONS)
    assert [seen.action for seen in behaviours_of(["i"], [common_pb2.ACTION_UNSPECIFIED], ["web"], [0], [""])] == ["unspecified"]
    with pytest.raises(ValueError, match="shorter"):
        behaviours_of(["i", "j"], [1], ["web"], [0], [""])


def test_someone_who_did_nothing_has_no_text_and_no_time() -> None:
    assert behaviour_text(Activity(0), table().title_of) == ""
    assert Activity(0).newest == 0


def test_context_counts_as_just_viewed_and_changes_nothing_else() -> None:
    seen = activity(("i003", "purchase", 2), purchased=(("i003", 19_998),))
    product = seen.with_context(("i001", "i002"), "app")
    assert [(b.item_id, b.action, b.channel, b.occurred_at) for b in product.behaviours[:2]] == [
        ("i001", "view", "app", seen.newest),
        ("i002", "view", "app", seen.newest),
    ]
    assert product.behaviours[2:] == seen.behaviours
    assert (product.version, product.purchased_items, product.newest) == (seen.version, seen.purchased_items, seen.newest)
    assert seen.with_context((), "app") == seen
