"""Sessions on the neighbour graph: above 128 participants, k and t from the published search."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from functools import cache

import pytest
from tests.secagg.cohort import NOW, make_plan, make_site, signer
from tests.secagg.harness import Federation

from maskwork.secagg import client, server, server_states
from maskwork.secagg.client_states import (
    Aborted,
    AdvertisedKeys,
    Event,
    SignedSets,
    SiteRules,
    State,
    Uploading,
    UploadUpdate,
)
from maskwork.secagg.encoding import Encoding, Rotation
from maskwork.secagg.errors import AbortReason, DropReason
from maskwork.secagg.graph import GraphKind, NeighbourGraph, window_pair_bound
from maskwork.secagg.keys import ShareKind
from maskwork.secagg.messages import (
    AdvertiseKeys,
    Advertisements,
    ConsistencyCheck,
    ShareKeys,
    SurvivorSets,
    SurvivorSignatures,
    Unmask,
)
from maskwork.secagg.plan import GRAPH_SIGMA, GraphPlan, sparse_parameters
from maskwork.secagg.server_states import (
    CollectingShares,
    CollectingSignatures,
    CollectingUpdates,
    DeadlinePassed,
    Received,
    UploadCompleted,
)

N = 150
ALL = frozenset(range(N))
GAPS = {0, 3, 5, 10, 11, 12, 13, 16, 18} | {N - i for i in (20, 19, 18, 17, 16, 15, 13, 12, 11, 10, 9, 7, 3, 1)}
"""On an unpermuted ring of k = 20: without them one of them is left with 6 holders, everyone else with 7 or more."""


@cache
def run_with_dropouts() -> Federation:
    """One member gone before it advertised, one before it dealt, one before its upload, one after it."""
    gone = {5: AdvertiseKeys, 17: ShareKeys, 60: UploadUpdate}
    return Federation(make_plan(N), dies_before=gone, dies_after={99: UploadUpdate}).run()


def ring() -> tuple[int, ...]:
    return run_with_dropouts().opening(CollectingUpdates).graph.ring_order


def test_dropouts_at_different_steps_on_the_sparse_graph() -> None:
    run = run_with_dropouts()
    assert run.survivors == ALL - {5, 17, 60}
    run.assert_exact()


def test_everyone_sees_the_graph_that_the_coordinator_sees() -> None:
    run = run_with_dropouts()
    graph = run.opening(CollectingUpdates).graph
    assert graph.kind is GraphKind.SPARSE
    for index in ALL - {5, 17, 60, 99}:
        assert run.members[index].before(Uploading).graph == graph


def test_each_member_deals_with_its_neighbours_only() -> None:
    run = run_with_dropouts()
    graph = run.opening(CollectingUpdates).graph
    dealt = run.members[0].answer(ShareKeys)
    assert [s.holder for s in dealt.shares] == [v for v in graph.neighbours(0) if v != 5]
    assert all(s.ciphertext for s in dealt.shares)
    answer = run.members[0].answer(Unmask)
    assert [s.owner for s in answer.shares] == [v for v in graph.neighbours(0) if v not in (5, 17)]
    for share in answer.shares:
        assert share.kind is (ShareKind.MASK_SECRET if share.owner == 60 else ShareKind.SELF_SEED)


def test_the_ring_follows_from_what_everyone_advertised() -> None:
    """A coordinator cannot choose it: the seed takes in every advertisement, so one changed key moves everybody."""
    other = Federation(make_plan(N), seed=1).run_to(CollectingShares)
    assert other.opening(CollectingShares).graph.ring_order != ring()


# --- what a participant refuses -------------------------------------------------------------------------------------


def refused(state: State, message: Event, reason: AbortReason, because: str) -> None:
    step = client.step(state, message, now=NOW)
    assert isinstance(step.state, Aborted), step.state
    assert step.state.reason is reason
    assert because in step.state.detail


@pytest.mark.parametrize("whose", ["own", "a neighbour's"])
def test_a_digest_that_is_not_the_advertisements(whose: str) -> None:
    member = run_with_dropouts().members[0]
    message = member.message(Advertisements)
    index = 0 if whose == "own" else message.advertised[0][0]
    at = sorted(message.u1).index(index)
    digests = (*message.digests[:at], bytes(32), *message.digests[at + 1 :])
    because = f"the digest of advertisement {index} is not that advertisement's"
    refused(member.before(AdvertisedKeys), replace(message, digests=digests), AbortReason.EQUIVOCATION, because)


def test_digests_left_out() -> None:
    member = run_with_dropouts().members[0]
    message = replace(member.message(Advertisements), digests=())
    refused(member.before(AdvertisedKeys), message, AbortReason.EQUIVOCATION, "the digest of advertisement")


def test_digests_that_give_other_neighbours() -> None:
    """The digest of a stranger is taken on trust, but it decides who the neighbours are."""
    member = run_with_dropouts().members[0]
    message = member.message(Advertisements)
    known = {0, *dict(message.advertised)}
    at = next(i for i, index in enumerate(sorted(message.u1)) if index not in known)
    digests = (*message.digests[:at], bytes(32), *message.digests[at + 1 :])
    because = "not those of the graph"
    refused(member.before(AdvertisedKeys), replace(message, digests=digests), AbortReason.WRONG_NEIGHBOURS, because)


def sets_without(gone: set[int]) -> SurvivorSets:
    sets = run_with_dropouts().opening(CollectingSignatures).sets
    return replace(sets, u3=sets.u3 - gone)


def uploading(index: int = 0, **rules: object) -> Uploading:
    state = run_with_dropouts().members[index].before(Uploading)
    site = make_site(index, N, rules=replace(SiteRules(), **rules))  # type: ignore[arg-type]
    return replace(state, session=replace(state.session, site=site))


def around(place: int, count: int) -> set[int]:
    return {ring()[(place + i) % N] for i in range(count)}


def test_survivors_that_leave_two_gaps_in_the_ring() -> None:
    """Two whole runs of k/2 positions missing: whoever sits between them could be read as a group."""
    graph = run_with_dropouts().opening(CollectingUpdates).graph
    half, at = graph.degree // 2, graph.ring_order.index(0)
    gaps = around(at + 20, half) | around(at + 70, half)
    refused(uploading(), sets_without(gaps), AbortReason.RING_CUT, "two gaps")


def test_as_many_survivors_missing_here_and_there_do_not_cut_the_ring() -> None:
    plan, graph = run_with_dropouts().plan, run_with_dropouts().opening(CollectingUpdates).graph
    half, at = graph.degree // 2, graph.ring_order.index(0)
    bound = window_pair_bound(N, corrupt=plan.graph.corrupt, window=half, sigma=GRAPH_SIGMA)
    assert 0 < bound < 2 * half
    scattered = {graph.ring_order[(at + 7 + 13 * i) % N] for i in range(2 * half)}
    assert isinstance(client.step(uploading(), sets_without(scattered), now=NOW).state, SignedSets)


def test_the_cut_is_measured_over_half_the_degree_at_the_plans_sigma_and_corrupt_fraction() -> None:
    """A plan in which each of them gives another bound, and survivors on either side of the true one."""
    n, ring_of = 300, tuple(range(300))
    found = sparse_parameters(n, 100, 50)
    half, corrupt = found.degree // 2, Fraction(100, 1000)
    bound = window_pair_bound(n, corrupt=corrupt, window=half, sigma=GRAPH_SIGMA)
    for window, fraction, sigma in ((half // 2, corrupt, 100), (half, Fraction(50, 1000), 100), (half, corrupt, 40)):
        assert window_pair_bound(n, corrupt=fraction, window=window, sigma=sigma) < bound
    colluders = 2 * found.threshold - found.degree - 1
    graph = GraphPlan(GraphKind.SPARSE, found.degree, found.threshold, colluders, 100, 50)
    encoding = Encoding(1.0, 100, 12, 22, Rotation.NONE)
    state, everyone = uploading(), frozenset(range(n))
    state = replace(
        state,
        session=replace(state.session, plan=make_plan(n, graph=graph, encoding=encoding)),
        graph=NeighbourGraph(GraphKind.SPARSE, found.degree, ring_of),
        u1=everyone,
        u2=everyone,
    )
    runs = [*range(60, 60 + half), *range(200, 200 + half)]  # of the ring, far from the member itself
    for left, refuses in ((bound, True), (bound + 1, False)):
        u3 = everyone - frozenset(runs[left:])
        step = client.step(state, SurvivorSets(everyone, everyone, u3), now=NOW)
        reason = step.state.reason if isinstance(step.state, Aborted) else None
        assert reason is (AbortReason.RING_CUT if refuses else None)


def test_a_policy_counts_only_survivors_that_the_site_verified_itself() -> None:
    """147 survive, but this site checked the certificates of k neighbours and its own."""
    because = "survivors verified here are fewer than the policy's 12"
    refused(uploading(min_survivors=12), sets_without(set()), AbortReason.POLICY, because)
    assert isinstance(client.step(uploading(min_survivors=8), sets_without(set()), now=NOW).state, SignedSets)


def test_a_signature_of_a_survivor_that_holds_no_share_of_ours() -> None:
    run = run_with_dropouts()
    member = run.members[0]
    holders = run.opening(CollectingUpdates).graph.holders(0)
    stranger = next(i for i in sorted(run.survivors) if i not in holders and i > 100)
    signature = run.members[stranger].answer(ConsistencyCheck).signature
    message = member.message(SurvivorSignatures)
    more = SurvivorSignatures(tuple(sorted((*message.signatures, (stranger, signature)))))
    refused(member.before(SignedSets), more, AbortReason.BAD_SETS, f"a signature of {stranger}")
    own = SurvivorSignatures(tuple(sorted((*message.signatures, (0, member.answer(ConsistencyCheck).signature)))))
    refused(member.before(SignedSets), own, AbortReason.BAD_SETS, "a signature of 0")


# --- what the coordinator does --------------------------------------------------------------------------------------


def test_a_dropout_whose_holders_are_gone_ends_the_session_before_anybody_signs() -> None:
    """Its mask key could not be put together: that is known when U3 is, and no signature is asked for.

    Where 2t > k no such set was found in which every survivor still has t holders, so the graph here is a denser one
    (k = 20 under t = 7) than any plan has: one dropout is left with 6 holders, everyone in U3 with 7 or more.
    """
    run = Federation(make_plan(N)).run_to(CollectingUpdates)
    graph = NeighbourGraph(GraphKind.SPARSE, 20, tuple(range(N)))
    state = replace(run.opening(CollectingUpdates), graph=graph)
    living = ALL - GAPS
    assert min(len(living & set(graph.holders(i))) for i in GAPS) == 6
    assert min(len(living & set(graph.holders(i))) for i in living) == 7
    for index in sorted(living):
        following = server.step(state, UploadCompleted(index)).state
        assert isinstance(following, CollectingUpdates)
        state = following
    step = server.step(state, DeadlinePassed(state.stage))
    assert isinstance(step.state, server_states.Aborted)
    assert step.state.reason is AbortReason.TOO_FEW_PARTICIPANTS


def test_a_dropout_whose_holders_do_not_sign_ends_the_session_before_unmasking() -> None:
    """Whoever is in U2 has a secret to be opened, in U3 or not. The graph is the one of the test before."""
    graph, living = NeighbourGraph(GraphKind.SPARSE, 20, tuple(range(N))), ALL - GAPS
    run = Federation(make_plan(N)).run_to(CollectingSignatures)
    sets = SurvivorSets(ALL, ALL, living)
    state = replace(run.opening(CollectingSignatures), graph=graph, sets=sets)
    for index in sorted(living):
        signed = ConsistencyCheck.signed_bytes(sets, N, session=run.id, sender=index)
        following = server.step(state, Received(index, ConsistencyCheck(signer(index).sign(signed)))).state
        if index != max(living):
            assert isinstance(following, CollectingSignatures)
            state = following
    assert isinstance(following, server_states.Aborted)
    assert following.reason is AbortReason.TOO_FEW_PARTICIPANTS


def test_every_drop_on_the_sparse_graph_is_for_the_reason_it_happened() -> None:
    assert run_with_dropouts().drops == dict.fromkeys((5, 17, 60, 99), DropReason.DISCONNECTED)
