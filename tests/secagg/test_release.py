"""What never leaves a participant: a second survivor set's signature, both shares of one peer, two close sums."""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.secagg.cohort import MODEL_DIGEST, NOW, make_plan, make_proposal, make_site, name_of, signer
from tests.secagg.harness import Federation, clean_run

from maskwork.secagg import client
from maskwork.secagg.client_states import (
    Aborted,
    Event,
    RecordRelease,
    Send,
    SharedKeys,
    SignedSets,
    SiteRules,
    State,
    Unmasked,
    Uploading,
    UploadUpdate,
)
from maskwork.secagg.errors import AbortReason
from maskwork.secagg.keys import ShareKind
from maskwork.secagg.messages import (
    ConsistencyCheck,
    DeliveredShares,
    Proposal,
    SessionClosed,
    SurvivorSets,
    SurvivorSignatures,
    Unmask,
)
from maskwork.secagg.plan import session_id

N = 5
ALL = frozenset(range(N))


def sets_of(u3: frozenset[int]) -> SurvivorSets:
    return SurvivorSets(ALL, ALL, u3)


def signatures_over(sets: SurvivorSets) -> SurvivorSignatures:
    """Everybody colludes with the coordinator and signs whatever it likes."""
    made = []
    for index in sorted(sets.u3):
        body = ConsistencyCheck.signed_bytes(sets, N, session=clean_run(N).id, sender=index)
        made.append((index, signer(index).sign(body)))
    return SurvivorSignatures(tuple(made))


def fed(state: State, *events: Event) -> tuple[State, list[object]]:
    """The state after some events, and every message that went out."""
    sent: list[object] = []
    for event in events:
        step = client.step(state, event, now=NOW)
        state = step.state
        sent += [e.message for e in step.effects if isinstance(e, Send)]
    return state, sent


def uploading() -> Uploading:
    return clean_run(N).members[0].before(Uploading)


def test_two_different_survivor_sets_are_never_both_signed() -> None:
    wide, narrow = sets_of(ALL), sets_of(ALL - {4})
    for first, second in ((wide, narrow), (narrow, wide)):
        state, sent = fed(uploading(), first, second)
        assert isinstance(state, Aborted)
        assert state.reason is AbortReason.EQUIVOCATION
        assert len([m for m in sent if isinstance(m, ConsistencyCheck)]) == 1
        _, more = fed(state, second, first, signatures_over(first), signatures_over(second))
        assert more == []


def test_two_different_survivor_sets_are_never_both_answered() -> None:
    """Asked twice with different sets, properly signed by everyone else, it answers for the first only."""
    wide, narrow = sets_of(ALL), sets_of(ALL - {4})
    state, sent = fed(uploading(), wide, signatures_over(wide), signatures_over(narrow))
    assert isinstance(state, Aborted)
    assert [type(m) for m in sent[:2]] == [ConsistencyCheck, Unmask]
    assert not any(isinstance(m, Unmask) for m in sent[2:])
    state, sent = fed(uploading(), wide, signatures_over(narrow))
    assert isinstance(state, Aborted)
    assert not any(isinstance(m, Unmask) for m in sent)


EVENTS: list[Event] = [
    clean_run(N).members[0].message(DeliveredShares),
    *(sets_of(ALL - gone) for gone in (frozenset[int](), frozenset({4}), frozenset({3}), frozenset({0}))),
    *(signatures_over(sets_of(ALL - gone)) for gone in (frozenset[int](), frozenset({4}), frozenset({3}))),
    SurvivorSignatures(()),
]


@settings(max_examples=300, deadline=None)
@given(order=st.lists(st.sampled_from(range(len(EVENTS))), max_size=8))
def test_both_shares_of_one_peer_never_leave_whatever_is_asked(order: list[int]) -> None:
    state, sent = fed(uploading(), *(EVENTS[i] for i in order))
    revealed = defaultdict(set)
    for message in sent:
        if isinstance(message, Unmask):
            for share in message.shares:
                revealed[share.owner].add(share.kind)
    assert all(len(kinds) == 1 for kinds in revealed.values())
    assert len({m for m in sent if isinstance(m, ConsistencyCheck)}) <= 1
    assert len({m for m in sent if isinstance(m, Unmask)}) <= 1
    assert isinstance(state, Aborted | Unmasked | SignedSets | Uploading)


@pytest.mark.parametrize("gone", [frozenset[int](), frozenset({3}), frozenset({4})])
def test_the_kind_of_each_share_follows_from_who_survived(gone: frozenset[int]) -> None:
    sets = sets_of(ALL - gone)
    _, sent = fed(uploading(), sets, signatures_over(sets))
    answer = sent[-1]
    assert isinstance(answer, Unmask)
    assert [s.owner for s in answer.shares] == list(range(N))
    for share in answer.shares:
        assert share.kind is (ShareKind.MASK_SECRET if share.owner in gone else ShareKind.SELF_SEED)


def test_over_a_whole_session_no_secret_gets_t_shares_of_both_kinds() -> None:
    run = Federation(make_plan(N), dies_before={2: UploadUpdate}).run()
    kinds = defaultdict(set)
    for member in run.members:
        for message in member.answers(Unmask):
            for share in message.shares:
                kinds[share.owner].add(share.kind)
    assert kinds == {i: {ShareKind.MASK_SECRET if i == 2 else ShareKind.SELF_SEED} for i in range(N)}


def test_a_repeated_request_gets_the_cached_answer_and_no_second_record() -> None:
    member = clean_run(N).members[0]
    state = member.before(Unmasked)
    step = client.step(state, member.message(SurvivorSignatures), now=NOW)
    assert step == client.step(step.state, member.message(SurvivorSignatures), now=NOW)
    assert step.effects == (Send(state.sent),)


# --- the same model -------------------------------------------------------------------------------------------------


def released_by(run: Federation) -> tuple[frozenset[str], ...]:
    records = [e for e in run.members[0].effects if isinstance(e, RecordRelease)]
    assert all(r.model_digest == MODEL_DIGEST for r in records)
    return tuple(frozenset(r.survivors) for r in records)


def second_attempt(first: Federation, *, rules: SiteRules, gone: dict[int, type]) -> Federation:
    plan = make_plan(N, attempt=2, nonce=b"\2" * 16, threshold=3)
    sites = {i: make_site(i, N, rules=rules) for i in range(N)}
    return Federation(plan, seed=1, sites=sites, dies_before=gone).run()


def test_a_retry_on_the_same_model_is_no_differencing_machine() -> None:
    """The first sum was over everyone; a second one without site 4 would give site 4's update away."""
    first = clean_run(N)
    rules = SiteRules(released=released_by(first), highest_attempt=(3, 1))
    again = second_attempt(first, rules=rules, gone={4: UploadUpdate})
    assert again.mean is None
    for member in again.members[:4]:
        assert isinstance(member.state, Aborted)
        assert member.state.reason is AbortReason.SAME_MODEL
        assert member.answers(ConsistencyCheck) == []


def test_the_same_survivors_may_be_summed_again() -> None:
    first = clean_run(N)
    rules = SiteRules(released=released_by(first), highest_attempt=(3, 1))
    second_attempt(first, rules=rules, gone={}).assert_exact()


def test_a_policy_may_allow_sets_that_differ_enough() -> None:
    rules = SiteRules(min_survivor_difference=2, released=(frozenset(map(name_of, range(N))),))
    assert second_attempt(clean_run(N), rules=rules, gone={4: UploadUpdate}).mean is None
    second_attempt(clean_run(N), rules=rules, gone={4: UploadUpdate, 3: UploadUpdate}).assert_exact()


def test_nothing_of_one_session_is_used_in_another() -> None:
    first, again = clean_run(N), second_attempt(clean_run(N), rules=SiteRules(), gone={})
    assert first.id != again.id
    for one, two in zip(first.members, again.members, strict=True):
        assert not set(one.sent) & set(two.sent)
        assert one.upload != two.upload


def test_messages_of_one_session_mean_nothing_in_another() -> None:
    """The same seed, so the same keys and shares: only the session differs, and every signature fails."""
    other = Federation(make_plan(N, attempt=2)).run()
    mine = clean_run(N).members[0]
    theirs = other.members[0]
    reasons = []
    for message, state in (
        (theirs.received[1], mine.history[0][0]),
        (theirs.received[2], mine.before(SharedKeys)),
        (theirs.message(SurvivorSignatures), mine.before(SignedSets)),
    ):
        assert not isinstance(message, SessionClosed)
        aborted = client.step(state, message, now=NOW).state
        assert isinstance(aborted, Aborted)
        reasons.append(aborted.reason)
    assert reasons == [AbortReason.BAD_PEER_SIGNATURE] * 3


# --- one coordinator, two stories -----------------------------------------------------------------------------------

CHANGES: list[dict[str, object]] = [
    {"attempt": 2},
    {"round_number": 4},
    {"nonce": b"\1" * 16},
    {"model_digest": b"\1" * 32},
    {"training_digest": b"\1" * 32},
    {"threshold": 5},
    {"colluders": 1},
    {"min_survivors": 4},
    {"audit_head": b"\1" * 32},
    {"previous_survivors": b"\1" * 32},
    {"revocation_digest": b"\1" * 32},
    {"revocation_number": 1},
    {"parameters": 41},
    {"job": "job-2"},
    {"roster": (*make_plan(4).roster, make_plan(6).roster[5])},
    {"deadlines": replace(make_plan(N).deadlines, unmask_ms=1)},
]


def test_plans_that_differ_in_anything_are_different_sessions() -> None:
    sessions = {session_id(make_proposal(make_plan(N, **change)).plan_bytes) for change in ({}, *CHANGES)}
    assert len(sessions) == len(CHANGES) + 1


@pytest.mark.parametrize("change", [{"audit_head": b"\1" * 32}, {"training_digest": b"\1" * 32}])
def test_participants_shown_different_plans_do_not_trust_each_others_keys(change: dict[str, object]) -> None:
    """Half of the cohort is told another history: no session comes of it."""
    other = make_proposal(make_plan(N, **change))
    run = Federation(make_plan(N), downlink=lambda i, m: (other,) if i >= 3 and isinstance(m, Proposal) else (m,))
    run.run()
    assert run.aborted.reason is AbortReason.TOO_FEW_PARTICIPANTS
    assert {i for i, reason in run.drops.items() if reason.value == "bad-signature"} == {3, 4}


def test_participants_shown_different_sets_do_not_unmask() -> None:
    """Two U3, each big enough: at most one of them can find t signatures."""
    mine, theirs = frozenset({0, 1, 2, 3}), frozenset({1, 2, 3, 4})
    for split in itertools.combinations({1, 2, 3}, 2):
        told = {i: mine if i == 0 or i in split else theirs for i in range(N)}
        states = {i: client.step(clean_run(N).members[i].before(Uploading), sets_of(told[i]), now=NOW) for i in told}
        for u3 in (mine, theirs):
            signed = [
                (i, e.message.signature)
                for i, step in states.items()
                for e in step.effects
                if told[i] == u3 and isinstance(e, Send) and isinstance(e.message, ConsistencyCheck)
            ]
            for i, step in states.items():
                if told[i] == u3:
                    _, sent = fed(step.state, SurvivorSignatures(tuple(signed)))
                    assert not any(isinstance(m, Unmask) for m in sent)
