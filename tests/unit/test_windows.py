"""Training windows against the rule written out plainly: what is in one, what its steps foresee, and that nothing comes from later."""

from collections import Counter

import numpy as np
import pytest

from features.behaviour import ACTIONS, Activity, Behaviour
from features.sequence import SequenceSpec, behaviour_sequence
from tests.unit.training_shop import DAY, START, activity_before, chain_log, event_log, item_table
from training.events import EventLog
from training.labels import visit_labels
from training.windows import Window, WindowSet, training_windows

TABLE = item_table()
UNTIL = START + 45 * DAY
SPEC = SequenceSpec(actions=ACTIONS, channels=("web",))


def windows_of(log: EventLog, *, until: int = UNTIL, read: int = 50) -> list[Window]:
    labels = visit_labels(log, ("purchase",), start=START, end=until)
    return training_windows(log, labels, until=until, read=read)


def events_of(log: EventLog, window: Window) -> list[int]:
    mine = np.flatnonzero((log.user == log.users.index(window.user_id)) & (log.time < window.time))
    return [int(k) for k in mine[-50:]]


@pytest.mark.parametrize("read", [3, 8, 50])
def test_each_step_foresees_the_new_items_of_the_next_visit_that_has_some(read: int) -> None:
    log = chain_log(customers=25)
    windows = windows_of(log, read=read)
    assert windows
    for window in windows:
        events = events_of(log, window)
        assert len(events) == len(window.foreseen)
        mine = log.user == log.users.index(window.user_id)
        for event, foreseen in zip(events, window.foreseen, strict=True):
            expected: tuple[int, ...] = ()
            for visit in sorted(set(log.visit[mine]) - set(range(int(log.visit[event]) + 1))):
                rows = np.flatnonzero(mine & (log.visit == visit) & log.has_action(("purchase",)) & (log.time < UNTIL))
                begins = log.time[mine & (log.visit == visit)].min()
                before = set(log.item[mine & (log.time < begins) & log.has_action(("purchase",))].tolist())
                expected = tuple(int(row) for row in log.item[rows] if int(row) not in before)
                if expected and begins < UNTIL:
                    break
                expected = ()
            assert foreseen == expected


@pytest.mark.parametrize("read", [3, 8, 50])
def test_every_event_with_something_to_foresee_is_read_in_a_window(read: int) -> None:
    log, until = chain_log(customers=6, items=60, visits=40), START + 350 * DAY
    windows = windows_of(log, until=until, read=read)
    seen = Counter(event for window in windows for event in events_of(log, window)[-read:])
    labels = visit_labels(log, ("purchase",), start=START, end=until)
    last = {user: max(label.time for label in labels if label.user_id == user) for user in log.users}
    assert {event for event in range(len(log)) if log.time[event] < last[log.users[log.user[event]]]} <= set(seen)
    assert max(seen.values()) <= 3  # half overlapping
    assert max(len(window.foreseen) for window in windows) == 50


def test_nothing_after_the_end_is_in_a_window_or_foreseen() -> None:
    log = chain_log(customers=25)
    cut = windows_of(log)
    assert max(window.time for window in cut) <= UNTIL
    later = log.time >= UNTIL
    changed = EventLog(log.users, log.user, np.where(later, 0, log.item).astype(np.int32), log.action, log.time, log.visit)
    assert windows_of(changed) == cut


def test_windows_and_activities_of_the_feature_are_of_one_order() -> None:
    """A window's steps must be those of the activity that is joined for it, behaviour by behaviour."""
    log = chain_log(customers=25)
    windows = windows_of(log)
    for window in windows:
        activity = activity_before(log, window.user_id, window.time, TABLE)
        items = [TABLE.ids[log.item[event]] for event in events_of(log, window)]
        assert [behaviour.item_id for behaviour in activity.behaviours[::-1]] == items
        assert len(window.foreseen) == len(activity.behaviours)


def test_events_of_one_moment_are_not_torn_apart() -> None:
    """An invoice's lines share their time: the feature knows no moment between them, so neither does a window."""
    lines = [("u", "purchase", item, 1.0, 1) for item in range(6)]
    log = event_log([("u", "view", 9, 0.0, 0), *lines, ("u", "purchase", 7, 2.0, 2)])
    windows = windows_of(log, read=2)
    assert [events_of(log, window) for window in windows] == [[0], [*range(7)], [*range(8)]]
    for window in windows:
        assert len(window.foreseen) == len(activity_before(log, "u", window.time, TABLE).behaviours)


def test_an_epoch_draws_each_target_from_what_its_step_foresees() -> None:
    window = Window("u", START, ((), (1, 2), (5,)))
    behaviours = (Behaviour("i03", "view", "web", 3), Behaviour("gone", "view", "web", 2), Behaviour("i04", "purchase", "web", 1))
    sequence = behaviour_sequence(Activity(3, behaviours), TABLE.rows, SPEC)
    other = Window("v", START, ((2, 3, 4), ()))
    search = behaviour_sequence(
        Activity(2, (Behaviour("i01", "view", "web", 2), Behaviour("", "search", "web", 1, "mug"))), TABLE.rows, SPEC
    )
    examples = WindowSet([window, other], [sequence, search], queries={"mug": 12})
    rng = np.random.default_rng(0)
    first, second = zip(*(examples.draw(rng) for _ in range(60)), strict=True)
    assert first[0].rows.tolist() == [4, 3]  # the unknown item in between takes its step along
    assert {tuple(steps.targets.tolist()) for steps in first} == {(-1, 5)}
    assert second[0].rows.tolist() == [12, 1]
    assert Counter(steps.targets[0] for steps in second).keys() == {2, 3, 4}
    assert all(steps.targets[1] == -1 for steps in second)
    assert second[0].context is not None
    assert second[0].context.tolist() == [[ACTIONS.index("search") + 1, 1, 0], [ACTIONS.index("view") + 1, 1, 1]]
    assert np.flatnonzero(examples.known(12).numpy()).tolist() == [2, 3, 4, 5]


def test_windows_that_foresee_nothing_readable_are_left_out() -> None:
    window = Window("u", START, ((1,),))
    sequence = behaviour_sequence(Activity(1, (Behaviour("gone", "view", "web", 3),)), TABLE.rows, SPEC)
    assert len(WindowSet([window], [sequence], queries={})) == 0
