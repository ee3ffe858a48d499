"""The tables of legal transitions are what the code does, no more and no less; illegal events change nothing."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import get_args

import pytest
from tests.secagg.cohort import NOW, make_plan
from tests.secagg.harness import Federation, clean_run

from maskwork.secagg import client, client_states, server, server_states
from maskwork.secagg.errors import AbortReason, DropReason, IllegalEvent
from maskwork.secagg.messages import DeliveredShares, SessionClosed, Withdraw

CLIENT_STATES = [kind for kind in client_states.TRANSITIONS if client_states.TRANSITIONS[kind]]
SERVER_STATES = [kind for kind in server_states.TRANSITIONS if server_states.TRANSITIONS[kind]]


def participant(kind: type) -> client_states.State:
    found: client_states.State = clean_run(5).members[1].before(kind)
    return found


def coordinator(kind: type) -> server_states.State:
    found: server_states.State = clean_run(5).opening(kind)
    return found


def test_the_tables_name_every_state() -> None:
    assert set(client_states.TRANSITIONS) == set(get_args(client_states.State))
    assert set(server_states.TRANSITIONS) == set(get_args(server_states.State))


def test_every_legal_transition_of_the_participant_happens_and_no_other() -> None:
    seen = {(type(a), type(step.state)) for m in clean_run(5).members for a, _, step in m.history}
    for kind in CLIENT_STATES:
        for event in (SessionClosed(False, ""), client_states.LocalFailure(AbortReason.CANCELLED, "")):
            seen.add((kind, type(client.step(participant(kind), event, now=NOW).state)))
    legal = {(a, b) for a, following in client_states.TRANSITIONS.items() for b in following}
    assert {(a, b) for a, b in seen if a is not b} == legal


def test_every_legal_transition_of_the_coordinator_happens_and_no_other() -> None:
    seen = {(type(a), type(step.state)) for a, _, step in clean_run(5).history}
    for kind in SERVER_STATES:
        cancelled = server_states.Cancelled(AbortReason.CANCELLED, "")
        seen.add((kind, type(server.step(coordinator(kind), cancelled).state)))
    legal = {(a, b) for a, following in server_states.TRANSITIONS.items() for b in following}
    assert {(a, b) for a, b in seen if a is not b} == legal


@pytest.mark.parametrize("kind", CLIENT_STATES)
def test_a_local_failure_ends_the_session_with_its_reason(kind: type) -> None:
    failure = client_states.LocalFailure(AbortReason.TRAINING_FAILED, "the task raised ValueError")
    step = client.step(participant(kind), failure, now=NOW)
    assert isinstance(step.state, client_states.Aborted)
    assert (step.state.reason, step.state.detail) == (failure.reason, failure.detail)
    assert step.effects == (
        client_states.Send(Withdraw(AbortReason.TRAINING_FAILED)),
        client_states.EndSession(),
    )


@pytest.mark.parametrize("kind", CLIENT_STATES)
@pytest.mark.parametrize("released", [True, False])
def test_the_coordinator_may_close_the_session_at_any_time(kind: type, released: bool) -> None:
    step = client.step(participant(kind), SessionClosed(released, "over"), now=NOW)
    assert step.state == client_states.Completed(participant(kind).session, released)
    assert step.effects == (client_states.EndSession(),)


# --- illegal events -------------------------------------------------------------------------------------------------


def snapshot(value: object) -> object:
    """All that a state holds, as values that nothing can change afterwards."""
    if is_dataclass(value) and not isinstance(value, type):
        return (type(value).__name__, *(snapshot(getattr(value, f.name)) for f in fields(value)))
    if isinstance(value, dict):
        return tuple((k, snapshot(v)) for k, v in value.items())
    if isinstance(value, tuple):
        return tuple(snapshot(v) for v in value)
    return value if isinstance(value, bytes | int | str | frozenset) or value is None else id(value)


@pytest.mark.parametrize("kind", [k for k in CLIENT_STATES if k is not client_states.Masking])
def test_an_illegal_event_of_the_participant_raises_and_leaves_the_state_as_it_was(kind: type) -> None:
    state = participant(kind)
    before = snapshot(state)
    with pytest.raises(IllegalEvent):
        client.step(state, client_states.UpdateMasked(), now=NOW)
    assert snapshot(state) == before


@pytest.mark.parametrize(
    ("kind", "event"),
    [(kind, event) for kind in SERVER_STATES[:-1] for event in (server_states.MasksRemoved(),)]
    + [(kind, event) for kind in SERVER_STATES[:-1] for event in (server_states.DealerConvicted(0, ""),)],
)
def test_an_illegal_event_of_the_coordinator_raises_and_leaves_the_state_as_it_was(
    kind: type, event: server_states.Event
) -> None:
    state = coordinator(kind)
    before = snapshot(state)
    with pytest.raises(IllegalEvent):
        server.step(state, event)
    assert snapshot(state) == before


def test_a_legal_step_leaves_the_state_before_it_as_it_was() -> None:
    """A driver may keep a state, try a step and go back to it."""
    run = clean_run(4)
    for before, event, step in run.history:
        held = snapshot(before)
        assert snapshot(server.step(before, event)) == snapshot(step)
        assert snapshot(before) == held
    for was, what, then in run.members[2].history:
        held = snapshot(was)
        assert client.step(was, what, now=NOW).effects == then.effects
        assert snapshot(was) == held


@pytest.mark.parametrize("kind", CLIENT_STATES)
def test_a_request_repeated_to_the_letter_gets_the_same_answer_to_the_letter(kind: type) -> None:
    """In each state: what led to it, again. What was answered is answered again; nothing is recorded or made anew."""
    member = clean_run(5).members[1]
    state = participant(kind)
    led_here: client_states.Event
    if kind is client_states.AdvertisedKeys:
        led_here, first = clean_run(5).proposal, [e for e in member.effects if isinstance(e, client_states.Send)][:1]
    else:
        step = next(s for _, e, s in member.history if type(s.state) is kind)
        led_here = next(e for _, e, s in member.history if s is step)
        first = [e for e in step.effects if isinstance(e, client_states.Send)]
    if isinstance(led_here, client_states.UpdateMasked):
        led_here = member.message(DeliveredShares)
    again = client.step(state, led_here, now=NOW)
    assert again.state == state
    assert list(again.effects) == first


def test_members_are_dropped_for_the_same_reason_whenever_they_are_lost() -> None:
    for kind in SERVER_STATES[:-1]:
        run = Federation(make_plan(5)).run_to(kind)
        run.tell(server_states.Lost(3, DropReason.REVOKED, "its certificate was revoked"))
        run.members[3].alive = False
        run.run()
        assert run.drops == {3: DropReason.REVOKED}
        run.assert_exact()
