"""When to look, to renew and to try again."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtcpserver.tls.acme.authority import seconds_in
from gtcpserver.tls.acme.schedule import (
    CLOCK_STEP,
    DAY,
    LONGEST_LOOK,
    LONGEST_PAUSE,
    PAUSE_FOR_NEWS,
    PAUSES,
    SHORTEST_PAUSE,
    Plan,
    State,
    draw_in_window,
    draw_renewal,
)

NAMES = ("a.example.com",)
NOW = 1_800_000_000.0


def test_a_renewal_is_at_two_thirds_of_the_lifetime_spread_a_little():
    begins, ends = NOW, NOW + 90 * DAY
    assert draw_renewal(begins, ends, 0.0) == NOW + 60 * DAY
    assert draw_renewal(begins, ends, 1.0) == NOW + 63 * DAY
    assert len({draw_renewal(begins, ends) for _ in range(20)}) > 1
    # Six days, as of Let's Encrypt's short-lived certificates.
    assert draw_renewal(NOW, NOW + 6 * DAY, 0.5) == pytest.approx(NOW + 4.1 * DAY)


def test_a_suggested_window_ends_with_the_certificate():
    assert draw_in_window(NOW, NOW + DAY, NOW + 9 * DAY, 0.5) == NOW + DAY / 2
    assert draw_in_window(NOW + 10 * DAY, NOW + 20 * DAY, NOW + 9 * DAY) == NOW + 9 * DAY
    with pytest.raises(ValueError, match="before it starts"):
        draw_in_window(NOW, NOW - 1, NOW)


def test_the_first_look_is_at_once():
    assert State().is_due(NAMES, False, NOW)


def test_pauses_grow_and_end_with_success():
    state, now, pauses = State(), NOW, []
    for _ in range(12):
        state = state.after_failure(NAMES, "no", None, now, jitter=0.0)
        pauses.append(state.next_look - now)
        assert not state.is_due(NAMES, False, state.next_look - 1)
        assert not state.is_due(NAMES, True, state.next_look - 1)
        now = state.next_look
        assert state.is_due(NAMES, False, now)
    assert pauses == [*PAUSES, *[PAUSES[-1]] * 4]
    assert state.failures == 12
    state = state.after_look(NAMES, Plan("1", now + 60 * DAY, 3600.0), 0.0, now)
    assert (state.failures, state.trouble, state.next_look) == (0, "", now + 3600)


def test_what_the_authority_asks_for_holds_for_all_names_and_has_an_end():
    state = State().after_failure(NAMES, "too many", 2 * DAY, NOW)
    assert state.next_look == NOW + 2 * DAY
    for names in (NAMES, ("b.example.com",)):
        assert not state.is_due(names, False, NOW + 2 * DAY - 1)
        assert state.is_due(names, False, NOW + 2 * DAY)
    assert State().after_failure(NAMES, "", 1e12, NOW).next_look == NOW + LONGEST_PAUSE
    assert State().after_failure(NAMES, "", -5, NOW, jitter=0.0).next_look == NOW + PAUSES[0]
    # One that asks for less than our own pause.
    assert State().after_failure(NAMES, "", 1, NOW, jitter=0.0).next_look == NOW + PAUSES[0]


def test_other_names_wait_a_minute_or_five():
    # Two servers with different names for one certificate order by turns, and not all the time.
    done = State().after_look(NAMES, Plan("1", NOW + 60 * DAY, DAY), 0.0, NOW)
    others = (*NAMES, "b.example.com")
    assert not done.is_due(others, True, NOW + SHORTEST_PAUSE - 1)
    assert done.is_due(others, True, NOW + SHORTEST_PAUSE)
    failed = State(failures=7).after_failure(NAMES, "no", None, NOW)
    assert not failed.is_due(others, True, NOW + PAUSE_FOR_NEWS - 1)
    assert failed.is_due(others, True, NOW + PAUSE_FOR_NEWS)
    assert not failed.is_due(NAMES, True, NOW + PAUSE_FOR_NEWS)


def test_a_certificate_that_was_removed_is_ordered_again():
    done = State().after_look(NAMES, Plan("1", NOW + 60 * DAY, DAY), 0.0, NOW)
    assert not done.is_due(NAMES, True, NOW + 3600)
    assert done.is_due(NAMES, False, NOW + 3600)


def test_a_clock_that_was_set_back_makes_no_long_pause():
    state = State().after_failure(NAMES, "", 5 * DAY, NOW)
    assert not state.is_due(NAMES, True, NOW - CLOCK_STEP + 1)
    assert state.is_due(NAMES, True, NOW - CLOCK_STEP - 1)


def test_a_renewal_is_at_the_authoritys_time():
    state = State().after_look(NAMES, Plan("1", NOW + 3600, DAY), 600.0, NOW)
    assert state.next_look == NOW + 3000
    assert State().after_look(NAMES, Plan("1", NOW - 5, DAY), 0.0, NOW).next_look == NOW + 1


@given(
    st.lists(st.tuples(st.booleans(), st.floats(0, 1e9), st.floats(0, 1e6)), max_size=20),
)
def test_no_history_makes_a_state_that_never_looks_again(steps):
    state, now = State(), NOW
    for failed, asked, passed in steps:
        if failed:
            state = state.after_failure(NAMES, "no", asked, now)
        else:
            state = state.after_look(NAMES, Plan("1", now + asked, min(asked, LONGEST_LOOK)), 0.0, now)
        assert state.next_look > now - 1
        assert state.next_look <= now + LONGEST_PAUSE
        assert State.from_json(json.loads(json.dumps(state.to_json()))) == state
        now += passed


@given(st.recursive(st.none() | st.floats() | st.text() | st.integers(), lambda inner: st.lists(inner), max_leaves=5))
def test_a_damaged_state_counts_as_none(value):
    for name in ("names", "next_look", "failures", "written"):
        state = State.from_json({name: value})
        assert isinstance(state.next_look, float)
        assert math.isfinite(state.next_look)
        assert state.failures >= 0


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("120", 120.0),
        ("-5", 0.0),
        ("soon", None),
        ("9" * 400, None),
        ("Fri, 15 Jan 2027 08:00:10 GMT", 10.0),
        ("Fri, 15 Jan 2026 08:00:10 GMT", 0.0),
        ("Fri, 99 Jan 2027 08:00:10 GMT", None),
    ],
)
def test_the_pause_that_an_answer_asks_for(value, seconds):
    assert seconds_in(value, NOW) == seconds
