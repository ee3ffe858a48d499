"""Whole sessions: the sum is exact in both segments, whoever drops out, whenever, in whatever order messages come."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.secagg.cohort import make_plan, name_of, update_of, weight_of
from tests.secagg.harness import Federation, clean_run

from maskwork.secagg.client_states import (
    Completed,
    EndSession,
    MaskUpdate,
    RecordAttempt,
    RecordRelease,
    Send,
    StartTraining,
    UploadUpdate,
)
from maskwork.secagg.encoding import Encoding, Rotation
from maskwork.secagg.errors import AbortReason, DropReason
from maskwork.secagg.messages import (
    AdvertiseKeys,
    ConsistencyCheck,
    CoordinatorMessage,
    ParticipantMessage,
    Proposal,
    SessionClosed,
    ShareKeys,
    Unmask,
)
from maskwork.secagg.server_states import (
    AddUpdate,
    CollectingKeys,
    CollectingShares,
    CollectingSignatures,
    CollectingUnmask,
    CollectingUpdates,
    PersistUnmask,
    RecordEvidence,
    RemoveMasks,
    SendTo,
    StageOpened,
)
from maskwork.wire.codec import decode_request, decode_response, encode_request, encode_response

STEPS: tuple[type, ...] = (AdvertiseKeys, ShareKeys, UploadUpdate, ConsistencyCheck, Unmask)


@pytest.mark.parametrize("n", [3, 4, 5, 10])
def test_everyone_takes_part(n: int) -> None:
    run = clean_run(n)
    assert run.survivors == frozenset(range(n))
    assert run.drops == {}
    run.assert_exact()
    for member in run.members:
        assert isinstance(member.state, Completed)
        assert member.state.released


def test_the_mean_is_the_weighted_mean_of_the_clipped_updates() -> None:
    run = clean_run(10)
    total, wanted = 0, np.zeros(run.plan.parameters)
    for index in range(10):
        update = update_of(index, run.plan.parameters).astype(np.float64)
        wanted += weight_of(index) * update * min(1.0, 1.0 / float(np.linalg.norm(update)))
        total += weight_of(index)
    assert run.mean is not None
    # One step of each participant's rounding is C / S, of which the weight cap makes n_cap / Σ n_i in the mean.
    np.testing.assert_allclose(run.mean, wanted / total, rtol=0, atol=10 * (1 / 2047) * 100 / total)


@pytest.mark.parametrize("bits", [8, 19, 32])
@pytest.mark.parametrize("rotation", list(Rotation))
def test_every_ring_width_and_both_rotations(bits: int, rotation: Rotation) -> None:
    encoding = Encoding(1.0, 100, bits - 3, bits, rotation)
    run = Federation(make_plan(4, encoding=encoding), dies_before={2: UploadUpdate}).run()
    assert run.survivors == {0, 1, 3}
    run.assert_exact()


@pytest.mark.parametrize("when", ["dies_before", "dies_after"])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("index", [0, 2, 4])
def test_a_dropout_at_every_step(when: str, step: type, index: int) -> None:
    run = Federation(make_plan(5), **{when: {index: step}}).run()  # type: ignore[arg-type]  # one of two of one type
    gone = STEPS.index(step) + (when == "dies_after") <= STEPS.index(UploadUpdate)
    assert run.survivors == frozenset(range(5)) - ({index} if gone else set())
    run.assert_exact()


@pytest.mark.parametrize("one", STEPS)
@pytest.mark.parametrize("two", STEPS)
def test_two_dropouts_at_any_two_steps(one: type, two: type) -> None:
    run = Federation(make_plan(5, threshold=3), dies_before={1: one, 3: two}).run()
    early = {i for i, step in ((1, one), (3, two)) if STEPS.index(step) <= STEPS.index(UploadUpdate)}
    assert run.survivors == frozenset(range(5)) - early
    run.assert_exact()


@pytest.mark.parametrize("step", STEPS)
def test_one_dropout_too_many_ends_the_session(step: type) -> None:
    run = Federation(make_plan(5), dies_before={1: step, 3: step}).run()
    assert run.aborted.reason is AbortReason.TOO_FEW_PARTICIPANTS
    assert run.mean is None
    for index in (0, 2, 4):
        state = run.members[index].state
        assert isinstance(state, Completed)
        assert not state.released


@pytest.mark.parametrize("step", STEPS)
def test_a_member_that_never_answers_is_out_at_the_deadline(step: type) -> None:
    def silent(sender: int, message: ParticipantMessage) -> Sequence[ParticipantMessage]:
        return () if sender == 2 and isinstance(message, step) else (message,)

    run = Federation(make_plan(5), uplink=silent)
    if step is UploadUpdate:
        run.dies_before[2] = UploadUpdate
    run.run()
    if step is not UploadUpdate:
        run.deadline()
        assert run.drops == {2: DropReason.DEADLINE}
    run.assert_exact()


def test_a_message_that_passed_through_the_wire_format_means_the_same() -> None:
    plan = make_plan(5)

    def up(sender: int, message: ParticipantMessage) -> Sequence[ParticipantMessage]:
        decoded = decode_request(
            type(encode_request(b"", message)).FromString(encode_request(b"", message).SerializeToString())
        )
        assert decoded == message
        return (message,)

    def down(recipient: int, message: CoordinatorMessage) -> Sequence[CoordinatorMessage]:
        if not isinstance(message, Proposal):
            encoded = encode_response(b"", message, plan.cohort)
            assert decode_response(type(encoded).FromString(encoded.SerializeToString()), plan.cohort) == message
        return (message,)

    Federation(plan, uplink=up, downlink=down, dies_after={1: UploadUpdate}).run().assert_exact()


# --- laws -----------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(data=st.data(), n=st.integers(3, 7))
def test_masks_cancel_for_every_survivor_set_of_at_least_t(data: st.DataObject, n: int) -> None:
    """Whoever drops out before the upload, and whenever, what comes out is the sum over the rest, in any order."""
    least = n // 2 + 1
    threshold = data.draw(st.integers(least, n), label="t")
    plan = make_plan(n, threshold=threshold)
    spare = n - max(threshold, 3)
    gone = data.draw(st.dictionaries(st.integers(0, n - 1), st.sampled_from(STEPS), max_size=spare), label="gone")
    schedule = random.Random(data.draw(st.integers(0, 2**32), label="schedule"))
    run = Federation(plan, seed=data.draw(st.integers(0, 9)), dies_before=gone, schedule=schedule).run()
    early = {i for i, step in gone.items() if STEPS.index(step) <= STEPS.index(UploadUpdate)}
    assert run.survivors == frozenset(range(n)) - early
    run.assert_exact()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_repeats_and_any_order_change_nothing(seed: int) -> None:
    chance = random.Random(seed)

    def twice(_: int, message: ParticipantMessage) -> Sequence[ParticipantMessage]:
        return (message,) * chance.choice((1, 1, 2))

    def again(_: int, message: CoordinatorMessage) -> Sequence[CoordinatorMessage]:
        return (message,) * chance.choice((1, 1, 2))

    run = Federation(make_plan(4), uplink=twice, downlink=again, schedule=chance).run()
    assert run.survivors == {0, 1, 2, 3}
    run.assert_exact()


# --- order of effects -----------------------------------------------------------------------------------------------


def test_records_come_before_the_message_that_they_guard() -> None:
    member = clean_run(5).members[0]
    kinds = [type(e.message) if isinstance(e, Send) else type(e) for e in member.effects]
    assert kinds == [
        *(RecordAttempt, StartTraining, AdvertiseKeys, ShareKeys),
        *(MaskUpdate, UploadUpdate, ConsistencyCheck, RecordRelease, Unmask, EndSession),
    ]
    attempt, release = member.effects[0], member.effects[7]
    assert isinstance(attempt, RecordAttempt)
    assert (attempt.session, attempt.plan_bytes) == (clean_run(5).id, clean_run(5).proposal.plan_bytes)
    assert attempt.plan_signature == clean_run(5).proposal.signature
    assert isinstance(release, RecordRelease)
    assert release.survivors == tuple(name_of(i) for i in range(5))
    assert release.model_digest == clean_run(5).plan.model_digest


def test_the_coordinator_persists_before_it_asks_for_unmasking() -> None:
    kinds = [type(e) for e in clean_run(3).effects]
    assert kinds == [
        *(StageOpened, SendTo, SendTo, SendTo),
        *(StageOpened, SendTo, SendTo, SendTo),
        *(StageOpened, SendTo, SendTo, SendTo),
        *(AddUpdate, AddUpdate, AddUpdate, StageOpened, SendTo, SendTo, SendTo),
        *(PersistUnmask, StageOpened, SendTo, SendTo, SendTo),
        *(RemoveMasks, SendTo, SendTo, SendTo),
    ]
    assert not any(isinstance(e, RecordEvidence) for e in clean_run(3).effects)


def test_everyone_of_u1_is_told_how_the_session_ended() -> None:
    run = Federation(make_plan(5), dies_before={1: UploadUpdate}).run()
    closed = [e for e in run.effects if isinstance(e, SendTo) and isinstance(e.message, SessionClosed)]
    assert [e.recipient for e in closed] == list(range(5))


# --- reconnections --------------------------------------------------------------------------------------------------

COLLECTING = (CollectingKeys, CollectingShares, CollectingUpdates, CollectingSignatures, CollectingUnmask)


@pytest.mark.parametrize("lost", ["the request", "the answer"])
@pytest.mark.parametrize("kind", COLLECTING)
def test_a_reconnection_at_every_stage(kind: type, lost: str) -> None:
    """The stream breaks with a request or an answer on it; after a reconnection the session ends as if it had not."""
    run = Federation(make_plan(5)).run_to(kind)
    if lost == "the answer":
        before = len(run.members[2].received)
        run.run(lambda f: len(f.members[2].received) > before)
    run.disconnect(2)
    run.run(lambda f: not isinstance(f.state, kind))
    if kind in (CollectingKeys, CollectingShares):
        assert isinstance(run.state, kind), "the coordinator waits for it"
    run.reconnect(2)
    run.run()
    assert run.survivors == frozenset(range(5))
    assert run.drops == {}
    run.assert_exact()


def test_a_late_signature_is_neither_used_nor_punished() -> None:
    """Away while the others sign, back when shares are asked for: still in the sum, not asked for anything."""
    run = Federation(make_plan(5)).run_to(CollectingSignatures)
    signed: list[ConsistencyCheck] = []
    run.disconnect(2)
    run.run_to(CollectingUnmask)
    run.reconnect(2)
    assert not [e for e in run.history[-1][2].effects if isinstance(e, SendTo)]
    run.feed(2, run.opening(CollectingSignatures).sets)
    signed.append(run.members[2].answer(ConsistencyCheck))
    run.run()
    assert len(signed) == 1
    assert run.survivors == frozenset(range(5))
    assert 2 not in run.seen(CollectingUnmask).signatures
    assert run.drops == {}
    run.assert_exact()
