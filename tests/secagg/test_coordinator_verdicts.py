"""Complaints, uploads, streams, deadlines: what the coordinator decides about members and about the session."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.secagg.cohort import make_plan
from tests.secagg.harness import Federation, clean_run
from tests.secagg.test_coordinator_checks import (
    ANSWERS,
    COLLECTING,
    DIES_BEFORE_ANSWER,
    LIAR,
    N,
    answer,
    closing,
    drops,
    ignores,
    opening,
)

from maskwork.secagg import keys, server
from maskwork.secagg.client_states import SharedKeys
from maskwork.secagg.errors import AbortReason, DropReason, IllegalEvent
from maskwork.secagg.messages import (
    AdvertiseKeys,
    Complaint,
    ConsistencyCheck,
    ParticipantMessage,
    ShareKeys,
    SurvivorSets,
    Unmask,
)
from maskwork.secagg.server_states import (
    Aborted,
    AddUpdate,
    Cancelled,
    Collecting,
    CollectingKeys,
    CollectingShares,
    CollectingSignatures,
    CollectingUnmask,
    CollectingUpdates,
    Completed,
    DeadlinePassed,
    DealerConvicted,
    Disconnected,
    DropPeer,
    Event,
    Lost,
    MasksRemoved,
    Received,
    Reconnected,
    RecordEvidence,
    RemovingMasks,
    SendTo,
    Session,
    Stage,
    State,
    Step,
    UploadCompleted,
)

# --- complaints -----------------------------------------------------------------------------------------------------


def true_key(dealer: int, holder: int) -> bytes:
    run = clean_run(N)
    state = run.members[holder].before(SharedKeys)
    return keys.share_key(
        state.secrets.encryption_secret,
        own=state.secrets.encryption_secret.public(),
        peer=state.peers[dealer].encryption_key,
        dealer=dealer,
        holder=holder,
        own_index=holder,
        session=run.id,
    )


@pytest.mark.parametrize("kind", [k for k in COLLECTING if k is not CollectingUpdates])
def test_a_complaint_out_of_its_stage(kind: type[State]) -> None:
    drops(opening(kind), Complaint(0, true_key(0, LIAR)), DropReason.WRONG_STAGE, "a complaint while")


def test_a_complaint_after_the_upload() -> None:
    state = closing(CollectingUpdates)
    drops(state, Complaint(1, true_key(1, 0)), DropReason.WRONG_STAGE, "a complaint while", sender=0)


def test_a_complaint_about_nobody_or_oneself() -> None:
    for dealer in (17, LIAR):
        complaint = Complaint(dealer, bytes(32))
        because = f"{dealer} dealt nothing to {LIAR}"
        drops(opening(CollectingUpdates), complaint, DropReason.FALSE_ACCUSATION, because)


def test_a_complaint_about_a_member_that_dropped_out_before_it_dealt() -> None:
    run = Federation(make_plan(N), dies_before={0: ShareKeys}).run()
    state = run.opening(CollectingUpdates)
    drops(state, Complaint(0, bytes(32)), DropReason.FALSE_ACCUSATION, "0 dealt nothing to 4")


def judged(state: CollectingUpdates, key: bytes) -> tuple[Aborted, RecordEvidence]:
    step = server.step(state, Received(LIAR, Complaint(0, key)))
    assert isinstance(step.state, Aborted)
    evidence = step.effects[0]
    assert isinstance(evidence, RecordEvidence)
    assert all(isinstance(e, SendTo) for e in step.effects[1:])
    assert len(step.effects) == N + 1
    return step.state, evidence


def test_a_false_accusation_is_rejected() -> None:
    verdict, evidence = judged(opening(CollectingUpdates), true_key(0, LIAR))
    assert (verdict.reason, verdict.blamed) == (AbortReason.COMPLAINT_REJECTED, frozenset({LIAR}))
    assert evidence == RecordEvidence(LIAR, DropReason.FALSE_ACCUSATION, None)


def test_a_key_that_opens_nothing_is_a_dispute() -> None:
    verdict, evidence = judged(opening(CollectingUpdates), bytes(32))
    assert (verdict.reason, verdict.blamed) == (AbortReason.COMPLAINT_DISPUTED, frozenset({0, LIAR}))
    assert evidence == RecordEvidence(0, DropReason.DISPUTED_CIPHERTEXT, LIAR)


@pytest.mark.parametrize("field", ["self_commitment", "mask_commitment"])
def test_a_true_accusation_is_upheld(field: str) -> None:
    state = opening(CollectingUpdates)
    honest = state.dealings[0]
    shares = tuple(
        replace(s, **{field: bytes(32)}) if s.holder == LIAR else s  # type: ignore[arg-type]
        for s in honest.message.shares
    )
    bad = replace(honest, message=replace(honest.message, shares=shares))
    verdict, evidence = judged(replace(state, dealings={**state.dealings, 0: bad}), true_key(0, LIAR))
    assert (verdict.reason, verdict.blamed) == (AbortReason.COMPLAINT_UPHELD, frozenset({0}))
    assert evidence == RecordEvidence(0, DropReason.DISHONEST_DEALER, LIAR)


# --- uploads, streams and time --------------------------------------------------------------------------------------


def test_an_upload_is_added_once_and_only_while_its_stage_is_open() -> None:
    state = opening(CollectingUpdates)
    step = server.step(state, UploadCompleted(LIAR))
    assert step.effects == (AddUpdate(LIAR),)
    assert isinstance(step.state, CollectingUpdates)
    ignores(step.state, UploadCompleted(LIAR))
    ignores(replace(state, lost=frozenset({LIAR})), UploadCompleted(LIAR))
    for kind in COLLECTING:
        if kind is not CollectingUpdates:
            ignores(opening(kind), UploadCompleted(LIAR))


@pytest.mark.parametrize("event", [MasksRemoved(), DealerConvicted(0, "")])
@pytest.mark.parametrize("kind", COLLECTING)
def test_masks_are_not_removed_before_their_time(kind: type[State], event: Event) -> None:
    with pytest.raises(IllegalEvent, match=f"in state {kind.__name__}"):
        server.step(opening(kind), event)


def test_the_deadline_of_a_stage_that_is_over_changes_nothing() -> None:
    for kind in COLLECTING:
        for stage in Stage:
            if stage is not opening(kind).stage:
                ignores(opening(kind), DeadlinePassed(stage))


@pytest.mark.parametrize("kind", COLLECTING)
def test_whoever_has_not_answered_at_the_deadline_is_out(kind: type[Collecting]) -> None:
    state = closing(kind)
    step = server.step(state, DeadlinePassed(state.stage))
    assert step.effects[0] == DropPeer(LIAR, state.stage, DropReason.DEADLINE, "no answer before the deadline")
    assert not isinstance(step.state, kind | Aborted)


@pytest.mark.parametrize("kind", COLLECTING)
def test_too_few_answers_end_the_session(kind: type[Collecting]) -> None:
    state = opening(kind)
    for sender in (0, 1):
        state = answered(state, sender)
    step = server.step(state, DeadlinePassed(state.stage))
    assert isinstance(step.state, Aborted)
    assert step.state.reason is AbortReason.TOO_FEW_PARTICIPANTS
    assert step.state.detail == f"2 answered while {state.stage.value} was open"
    told = [e.recipient for e in step.effects if isinstance(e, SendTo)]
    assert told == list(range(N))


def answered(state: Collecting, sender: int) -> Collecting:
    messages: dict[type, ParticipantMessage] = {
        CollectingKeys: answer(AdvertiseKeys, sender),
        CollectingShares: answer(ShareKeys, sender),
        CollectingSignatures: answer(ConsistencyCheck, sender),
        CollectingUnmask: answer(Unmask, sender),
    }
    event: Event = UploadCompleted(sender)
    if not isinstance(state, CollectingUpdates):
        event = Received(sender, messages[type(state)])
    following = server.step(state, event).state
    assert isinstance(following, type(state))
    return following


@pytest.mark.parametrize("kind", COLLECTING)
def test_exactly_the_threshold_suffices_and_one_less_does_not(kind: type[Collecting]) -> None:
    state = opening(kind)  # t = 4 of 5
    for sender in (0, 1, 2):
        state = answered(state, sender)
    assert isinstance(server.step(state, DeadlinePassed(state.stage)).state, Aborted)
    state = answered(state, 3)
    assert not isinstance(server.step(state, DeadlinePassed(state.stage)).state, kind | Aborted)


@pytest.mark.parametrize("kind", [CollectingKeys, CollectingShares, CollectingUpdates])
def test_the_plans_least_number_of_survivors_counts_before_the_sets_are_put(kind: type[Collecting]) -> None:
    run = Federation(make_plan(N, min_survivors=5), dies_before={LIAR: DIES_BEFORE_ANSWER[kind]}).run()
    assert run.aborted.reason is AbortReason.TOO_FEW_PARTICIPANTS
    assert isinstance(run.history[-1][0], kind)


@pytest.mark.parametrize("kind", [CollectingSignatures, CollectingUnmask])
def test_afterwards_only_the_threshold_counts(kind: type[Collecting]) -> None:
    run = Federation(make_plan(N, min_survivors=5), dies_before={LIAR: DIES_BEFORE_ANSWER[kind]}).run()
    assert len(run.survivors) == N
    run.assert_exact()


@pytest.mark.parametrize("kind", [CollectingKeys, CollectingShares, CollectingUpdates])
def test_a_member_that_is_away_is_waited_for_while_its_update_is_at_stake(kind: type[Collecting]) -> None:
    step = server.step(closing(kind), Disconnected(LIAR))
    assert step == Step(replace(closing(kind), away=frozenset({LIAR})))
    for event in (Lost(LIAR, DropReason.DISCONNECTED, ""), DeadlinePassed(closing(kind).stage)):
        assert not isinstance(server.step(step.state, event).state, kind | Aborted)


@pytest.mark.parametrize("kind", [CollectingSignatures, CollectingUnmask])
def test_a_member_that_is_away_is_not_waited_for_where_the_others_suffice(kind: type[Collecting]) -> None:
    assert not isinstance(server.step(closing(kind), Disconnected(LIAR)).state, kind | Aborted)


@pytest.mark.parametrize("kind", [CollectingSignatures, CollectingUnmask])
def test_members_that_are_away_are_waited_for_where_the_others_do_not_suffice(kind: type[Collecting]) -> None:
    state = opening(kind)
    for sender in (0, 1):
        state = answered(state, sender)
    for sender in (2, 3, 4):
        following = server.step(state, Disconnected(sender)).state
        assert isinstance(following, kind)
        state = following
    assert server.outstanding(state) == {2, 3, 4}
    for sender in (2, 3):
        back = server.step(state, Reconnected(sender)).state
        assert isinstance(back, kind)
        state = back
    state = answered(state, 2)
    assert not isinstance(server.step(state, Received(3, answer_to(kind, 3))).state, kind | Aborted)


def answer_to(kind: type[Collecting], sender: int) -> ParticipantMessage:
    return answer(ConsistencyCheck, sender) if kind is CollectingSignatures else answer(Unmask, sender)


def test_a_stage_waits_for_everyone_present() -> None:
    for kind in COLLECTING:
        state = opening(kind)
        for sender in range(N - 1):
            state = answered(state, sender)
        assert server.outstanding(state) == {LIAR}


@pytest.mark.parametrize("kind", COLLECTING)
def test_a_reconnected_member_is_asked_again_to_the_letter(kind: type[Collecting]) -> None:
    state = replace(opening(kind), away=frozenset({LIAR, 3}))
    asked = next(e for before, _, s in clean_run(N).history for e in s.effects if is_request(e, before, kind))
    if kind is CollectingKeys:
        asked = SendTo(LIAR, clean_run(N).proposal)
    step = server.step(state, Reconnected(LIAR))
    assert step.effects == (asked,)
    assert step.state == replace(state, away=frozenset({3}))


def is_request(effect: object, before: State, kind: type[Collecting]) -> bool:
    """Whether this is what opened the stage for the liar."""
    follows = {
        CollectingKeys: CollectingKeys,
        CollectingShares: CollectingKeys,
        CollectingUpdates: CollectingShares,
        CollectingSignatures: CollectingUpdates,
        CollectingUnmask: CollectingSignatures,
    }
    return isinstance(effect, SendTo) and effect.recipient == LIAR and isinstance(before, follows[kind])


def test_a_lost_member_that_reconnects_is_asked_nothing() -> None:
    for kind in COLLECTING:
        state = replace(opening(kind), lost=frozenset({LIAR}), away=frozenset({LIAR}))
        assert server.step(state, Reconnected(LIAR)) == Step(replace(state, away=frozenset()))
    run = Federation(make_plan(N), dies_before={LIAR: AdvertiseKeys}).run()
    left_out = replace(run.opening(CollectingShares), lost=frozenset(), away=frozenset({LIAR}))
    assert server.step(left_out, Reconnected(LIAR)) == Step(replace(left_out, away=frozenset()))


# --- the end --------------------------------------------------------------------------------------------------------


def test_once_enough_shares_are_in_nobody_is_needed_any_more() -> None:
    state = opening(RemovingMasks)
    for event in (
        Received(0, answer(Unmask, 0)),
        Disconnected(0),
        Reconnected(0),
        Lost(0, DropReason.REVOKED, ""),
        DeadlinePassed(Stage.UNMASK),
        UploadCompleted(0),  # of a member whose stream outlived its deadline
    ):
        ignores(state, event)


@pytest.mark.parametrize("kind", [*COLLECTING, RemovingMasks])
def test_a_session_can_be_cancelled_until_it_is_over(kind: type[State]) -> None:
    step = server.step(opening(kind), Cancelled(AbortReason.CANCELLED, "the job was aborted"))
    assert step.state == Aborted(clean_session(), AbortReason.CANCELLED, "the job was aborted")
    assert [e.recipient for e in step.effects if isinstance(e, SendTo)] == list(range(N))


def clean_session() -> Session:
    return opening(CollectingKeys).session


def test_nothing_moves_a_session_that_is_over() -> None:
    for over in (opening(Completed), Aborted(clean_session(), AbortReason.CANCELLED, "")):
        assert server.outstanding(over) == frozenset()
        for event in (Cancelled(AbortReason.CANCELLED, ""), MasksRemoved(), Received(0, ANSWERS[0]), Reconnected(0)):
            ignores(over, event)


def test_sets_are_put_once() -> None:
    """What step 3 asks is one set for everyone, and a reconnection does not change it."""
    asked = [e.message for e in clean_run(N).effects if isinstance(e, SendTo) and isinstance(e.message, SurvivorSets)]
    assert len(asked) == N
    assert len(set(asked)) == 1
