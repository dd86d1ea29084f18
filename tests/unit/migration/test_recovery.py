"""The policy: the table's reach, and the courses that matter."""

import math
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refault.migration.recovery import TABLE, Action, Event, Pace, Recovery, State


def after(events: Iterable[Event]) -> tuple[Recovery, list[Action]]:
    policy = Recovery(jitter=lambda: 0.5)
    actions = [action for event in events for action in policy.handle(event)]
    return policy, actions


def test_every_state_can_be_reached_and_but_for_the_end_left() -> None:
    reached = {State.IDLE} | {target for target, _ in TABLE.values()}
    assert reached == set(State)
    assert {state for state, _ in TABLE} == set(State)


def test_a_loss_that_the_relay_sees_first() -> None:
    policy, actions = after(
        [
            Event.STARTED,
            Event.CHANNEL_LOST,
            Event.PAUSED,
            Event.TIMER,
            Event.ISSUED,
            Event.RECOVERING,
            Event.ACTIVE,
        ]
    )
    assert policy.state is State.RUNNING
    assert actions.count(Action.COUNT_LOSS) == 1
    assert actions.count(Action.ATTEMPT) == 1
    assert actions.count(Action.COUNT_RECOVERY) == 1


def test_a_recovery_ends_the_attempt_so_that_the_next_need_not_wait_for_it() -> None:
    for target, (state, actions) in TABLE.items():
        if Action.COUNT_RECOVERY in actions:
            assert state is State.RUNNING, target
            assert Action.CANCEL_ATTEMPT in actions, target


def test_a_loss_that_only_qemu_tells() -> None:
    policy, actions = after([Event.STARTED, Event.PAUSED, Event.ISSUED, Event.ACTIVE])
    assert policy.state is State.RUNNING
    assert actions.count(Action.COUNT_LOSS) == actions.count(Action.COUNT_RECOVERY) == 1


def test_a_status_older_than_the_command_is_no_recovery() -> None:
    policy, actions = after([Event.STARTED, Event.CHANNEL_LOST, Event.TIMER, Event.ACTIVE])
    assert policy.state is State.ATTEMPTING
    assert Action.COUNT_RECOVERY not in actions


def test_a_client_that_recovers_cancels_the_attempt() -> None:
    policy, actions = after([Event.STARTED, Event.PAUSED, Event.ISSUED, Event.CLIENT_RECOVERS])
    assert policy.state is State.BY_CLIENT
    assert actions[-2:] == [Action.CANCEL_ATTEMPT, Action.TIMER_CLIENT]


def test_a_client_whose_recovery_comes_to_nothing_is_not_waited_for_for_ever() -> None:
    policy, _ = after([Event.STARTED, Event.PAUSED, Event.CLIENT_RECOVERS])
    assert policy.handle(Event.TIMER) == (Action.ATTEMPT,)


@pytest.mark.parametrize("seen", [[], [Event.PAUSED], [Event.PAUSED, Event.ISSUED], [Event.CHANNEL_LOST]])
def test_a_clients_pause_counts_though_its_reply_comes_late(seen: list[Event]) -> None:
    policy, actions = after([Event.STARTED, *seen, Event.CLIENT_PAUSED])
    assert policy.state is State.YIELDED
    assert actions[-1] is Action.TIMER_CLIENT
    assert actions.count(Action.COUNT_LOSS) == 1


BY_CLIENT = [Event.STARTED, Event.CHANNEL_LOST, Event.CLIENT_RECOVERS]
OPEN = [Event.STARTED, Event.PAUSED, Event.ISSUED]


@pytest.mark.parametrize(
    ("before", "event", "state", "actions"),
    [
        (BY_CLIENT, Event.TIMER, State.ATTEMPTING, (Action.ATTEMPT,)),
        (BY_CLIENT, Event.CLIENT_RECOVERS, State.BY_CLIENT, (Action.TIMER_CLIENT,)),
        (BY_CLIENT, Event.ATTEMPT_FAILED, State.YIELDED, (Action.TIMER_CLIENT,)),
        (BY_CLIENT, Event.CHANNEL_LOST, State.YIELDED, (Action.TIMER_CLIENT,)),
        (BY_CLIENT, Event.PAUSED, State.BY_CLIENT, ()),
        (OPEN, Event.PAUSED, State.OPEN, ()),
        (OPEN, Event.TIMER, State.OPEN, ()),
        (OPEN, Event.NOT_YET, State.OPEN, ()),
        (OPEN, Event.ATTEMPT_FAILED, State.WAITING, (Action.TIMER_BACKOFF,)),
        (OPEN, Event.CHANNEL_LOST, State.WAITING, (Action.CANCEL_ATTEMPT, Action.TIMER_BACKOFF)),
        (OPEN, Event.CLIENT_PAUSED, State.YIELDED, (Action.CANCEL_ATTEMPT, Action.TIMER_CLIENT)),
        (
            [*OPEN, Event.RECOVERING],
            Event.PAUSED,
            State.WAITING,
            (Action.CANCEL_ATTEMPT, Action.TIMER_BACKOFF),
        ),
    ],
)
def test_no_state_waits_for_what_will_not_come(
    before: list[Event], event: Event, state: State, actions: tuple[Action, ...]
) -> None:
    policy, _ = after(before)
    assert policy.handle(event) == actions
    assert policy.state is state


def test_a_client_that_pauses_is_waited_for_and_then_not() -> None:
    policy, actions = after([Event.STARTED, Event.CLIENT_PAUSED, Event.PAUSED, Event.CHANNEL_LOST])
    assert policy.state is State.YIELDED
    assert Action.ATTEMPT not in actions
    assert policy.handle(Event.TIMER) == (Action.ATTEMPT,)


def test_a_source_that_fails_after_postcopy_is_stopped_whatever_the_state() -> None:
    for state in set(State) - {State.IDLE, State.ENDED}:
        policy = Recovery(jitter=lambda: 0.0)
        policy.state = state
        assert policy.handle(Event.FAILED_AFTER_POSTCOPY)[0] is Action.STOP_GUEST


RUNS = [Event.ACTIVE, Event.RESUME_ACKNOWLEDGED]


@pytest.mark.parametrize("recovered", RUNS)
@pytest.mark.parametrize(
    "lost",
    [
        [Event.CHANNEL_LOST],
        [Event.PAUSED],
        [Event.PAUSED, Event.ISSUED],
        [Event.PAUSED, Event.ISSUED, Event.RECOVERING],
        [Event.CLIENT_PAUSED],
        [Event.CLIENT_PAUSED, Event.CLIENT_RECOVERS],
    ],
)
def test_a_loss_that_is_given_up_is_not_tried_again_but_may_recover_and_the_next_begins_anew(
    lost: list[Event], recovered: Event
) -> None:
    policy, actions = after([Event.STARTED, *lost])
    assert actions.count(Action.TIMER_GIVE_UP) == 1
    assert policy.handle(Event.OUT_OF_PATIENCE) == (Action.GIVE_UP,)
    for event in (
        Event.ISSUED,
        Event.ATTEMPT_FAILED,
        Event.TIMER,
        Event.PATH_CHANGED,
        Event.PAUSED,
        Event.CHANNEL_LOST,
        Event.CLIENT_RECOVERS,
        Event.TIMER,
        Event.OUT_OF_PATIENCE,
    ):
        assert Action.ATTEMPT not in policy.handle(event)
        assert policy.state is State.GIVEN_UP
    assert Action.COUNT_RECOVERY in policy.handle(recovered)
    again = policy.handle(Event.PAUSED)
    assert {Action.COUNT_LOSS, Action.TIMER_GIVE_UP, Action.ATTEMPT} == set(again)


def test_giving_up_leaves_the_attempt_under_way_for_qemu_may_have_its_command() -> None:
    policy, _ = after([Event.STARTED, Event.PAUSED])
    assert Action.CANCEL_ATTEMPT not in policy.handle(Event.OUT_OF_PATIENCE)


def test_a_held_leg_is_given_up_only_once_it_can_be_tried() -> None:
    policy, _ = after([Event.STARTED, Event.LEG_HELD])
    assert policy.handle(Event.OUT_OF_PATIENCE) == ()
    assert Action.TIMER_GIVE_UP in policy.handle(Event.CHANNEL_LOST)
    assert policy.handle(Event.OUT_OF_PATIENCE) == (Action.GIVE_UP,)


def test_nothing_is_given_up_by_default_and_a_recovered_loss_never() -> None:
    assert Recovery(jitter=lambda: 0.5).delay(Action.TIMER_GIVE_UP) == math.inf
    assert Recovery(Pace(give_up=60), jitter=lambda: 0.5).delay(Action.TIMER_GIVE_UP) == 60
    policy, _ = after([*OPEN, Event.ACTIVE])
    assert policy.handle(Event.OUT_OF_PATIENCE) == ()


def test_backoff_grows_to_its_end_and_begins_anew_after_a_recovery() -> None:
    policy, _ = after([Event.STARTED, Event.PAUSED])
    delays = []
    for _ in range(12):
        (timer,) = policy.handle(Event.ATTEMPT_FAILED)
        delays.append(policy.delay(timer))
        policy.handle(Event.TIMER)
    assert delays == sorted(delays)
    assert delays[0] == Pace().first_backoff
    assert delays[-1] == Pace().last_backoff
    policy.handle(Event.ISSUED)
    policy.handle(Event.ACTIVE)
    policy.handle(Event.PAUSED)
    (timer,) = policy.handle(Event.ATTEMPT_FAILED)
    assert policy.delay(timer) == Pace().first_backoff


def test_polling_slows_down_but_starts_fast_again_at_the_next_loss() -> None:
    policy, _ = after([Event.STARTED, Event.CHANNEL_LOST])
    first = policy.delay(Action.TIMER_POLL)
    for _ in range(30):
        policy.handle(Event.TIMER)
        policy.handle(Event.NOT_YET)
        last = policy.delay(Action.TIMER_POLL)
    assert first == Pace().poll
    assert last == Pace().last_poll
    policy.handle(Event.CLIENT_RECOVERS)
    assert policy.delay(Action.TIMER_POLL) == Pace().poll


@given(st.lists(st.sampled_from(Event), max_size=60))
def test_whatever_happens_attempts_do_not_pile_up_and_recoveries_follow_losses(events: list[Event]) -> None:
    policy = Recovery(jitter=lambda: 0.5)
    pending = False
    losses = recoveries = 0
    for event in events:
        before = policy.state
        actions = policy.handle(event)
        if before in (State.IDLE, State.ENDED) and policy.state is State.RUNNING:
            losses = recoveries = 0
        for action in actions:
            match action:
                case Action.ATTEMPT:
                    assert not pending
                    pending = True
                case Action.CANCEL_ATTEMPT:
                    pending = False
                case Action.COUNT_LOSS:
                    losses += 1
                case Action.COUNT_RECOVERY:
                    recoveries += 1
        if event in (Event.NOT_YET, Event.ATTEMPT_FAILED) or policy.state is State.RUNNING:
            pending = False
        assert recoveries <= losses


def test_a_path_that_may_be_back_is_tried_at_once_and_nothing_else_changes() -> None:
    policy, _ = after([Event.STARTED, Event.CHANNEL_LOST])
    for _ in range(10):
        after_failure = (policy.handle(Event.TIMER), policy.handle(Event.ATTEMPT_FAILED))
        policy.delay(Action.TIMER_BACKOFF)
        assert after_failure == ((Action.ATTEMPT,), (Action.TIMER_BACKOFF,))
    assert policy.delay(Action.TIMER_BACKOFF) == policy.pace.last_backoff
    assert Action.TIMER_BACKOFF in policy.handle(Event.PATH_CHANGED)
    assert policy.delay(Action.TIMER_BACKOFF) == policy.pace.first_backoff
    assert policy.handle(Event.TIMER) == (Action.ATTEMPT,)
    assert policy.handle(Event.PATH_CHANGED) == ()
    assert policy.handle(Event.ATTEMPT_FAILED) == (Action.TIMER_BACKOFF,)


def test_a_guest_that_is_taken_back_is_neither_recovered_nor_stopped() -> None:
    told = [Event.CHANNEL_LOST, Event.PAUSED, Event.RECOVERING, Event.ACTIVE, Event.FAILED]
    policy, actions = after([Event.STARTED, Event.CANNOT_HAVE_LEFT, *told])
    assert policy.state is State.ENDED
    assert Action.RECLAIM in actions
    assert not {Action.ATTEMPT, Action.COUNT_RECOVERY, Action.STOP_GUEST} & set(actions)
    policy, _ = after([Event.STARTED, Event.CANNOT_HAVE_LEFT, Event.ATTEMPT_FAILED])
    assert policy.state is State.WAITING


def test_the_operator_s_word_counts_only_where_a_channel_is_lost() -> None:
    for seen in ([Event.CHANNEL_LOST], [Event.PAUSED], [Event.PAUSED, Event.ISSUED, Event.RECOVERING]):
        policy, actions = after([Event.STARTED, *seen, Event.TOLD_TO_TAKE_BACK])
        assert policy.state is State.RECLAIMING
        assert actions[-2:] == [Action.CANCEL_ATTEMPT, Action.RECLAIM_AS_TOLD]
    for state in (State.IDLE, State.RUNNING, State.ENDED):
        assert (state, Event.TOLD_TO_TAKE_BACK) not in TABLE
