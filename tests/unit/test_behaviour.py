"""Behaviour sequences as values: what context adds, and which phrases reach the encoder."""

from hypothesis import given
from hypothesis import strategies as st

from features.behaviour import ACTION_WEIGHT, ACTIONS, Activity, Behaviour, behaviour_text
from tests.unit.tables import activity, table

_ITEMS = [f"i{k:03d}" for k in range(8)]
_SEQUENCES = st.lists(st.tuples(st.sampled_from([*_ITEMS, "", "gone"]), st.sampled_from(ACTIONS)), max_size=50)


def behaved(pairs: list[tuple[str, str]]) -> Activity:
    return Activity(len(pairs), tuple(Behaviour(item, action, "web", 10**15 - k, f"text{k}") for k, (item, action) in enumerate(pairs)))


@given(_SEQUENCES)
def test_each_item_is_written_where_it_first_appears_with_its_strongest_action(pairs: list[tuple[str, str]]) -> None:
    """Against the rule written out plainly."""
    strongest = {item: max((action for other, action in pairs if other == item), key=ACTION_WEIGHT.__getitem__) for item, _ in pairs}
    subjects = [f"title {item}" if item else f"text{k}" for k, (item, _) in enumerate(pairs)]
    expected = [subject for k, ((item, _), subject) in enumerate(zip(pairs, subjects, strict=True)) if item != "gone"]
    text = behaviour_text(behaved(pairs), table().title_of, limit=50)
    phrases = text.split("; ") if text else []
    assert [phrase.split(" ", 1)[1].removeprefix("for ") for phrase in phrases] == list(dict.fromkeys(expected))
    for item in set(_ITEMS) & set(strongest):
        one = behaviour_text(activity((item, strongest[item], 0)), table().title_of)
        weights = {a: ACTION_WEIGHT[a] for other, a in pairs if other == item}
        ties = {behaviour_text(activity((item, a, 0)), table().title_of) for a, w in weights.items() if w == max(weights.values())}
        assert one in ties
        assert sum(phrase in ties for phrase in phrases) == 1


@given(_SEQUENCES, st.integers(1, 20))
def test_a_limit_cuts_the_oldest_phrases_off(pairs: list[tuple[str, str]], limit: int) -> None:
    whole = behaviour_text(behaved(pairs), table().title_of, limit=99).split("; ")
    assert behaviour_text(behaved(pairs), table().title_of, limit=limit).split("; ") == whole[:limit]


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
