"""Two stories for two sites: other plans, other survivors, both secrets of one member; and plans that nobody may make.

With `2t > m + c` two sets of t holders share an honest one, and an honest one signs once. What that is worth is counted
here in shares: what every site gave away over the control streams, whatever it was asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
from pydantic import ValidationError
from tests.attacks.liar_coordinator import SITES, Liar, Session, against, changed

from maskwork.job import Cohort
from maskwork.participant.policy import Policy
from maskwork.secagg import server_states as core
from maskwork.secagg.encoding import Encoding, Rotation
from maskwork.secagg.errors import AbortReason, DeclineCode
from maskwork.secagg.keys import ShareKind
from maskwork.secagg.messages import (
    AdvertiseKeys,
    Advertisements,
    ConsistencyCheck,
    Members,
    SessionClosed,
    SurvivorSets,
    SurvivorSignatures,
    Unmask,
)
from maskwork.secagg.plan import RoundPlan, StatisticSpec, session_id
from maskwork.wire import codec
from maskwork.wire.codec import Response
from maskwork.wire.v1 import plan_pb2

EVERYONE: Final = frozenset(range(4))
WITHOUT_D: Final = frozenset(range(3))


# --- different plans ------------------------------------------------------------------------------------------------

OTHER_PLANS: Final[dict[str, Callable[[Liar, RoundPlan], RoundPlan]]] = {
    "model": lambda liar, plan: replace(plan, model_digest=liar.model(1.0)),
    "roster": lambda _, plan: replace(plan, roster=plan.roster[::-1]),
    "a member more": lambda liar, plan: liar.plan((*SITES, "site-e"), model_digest=plan.model_digest),
    "clip norm": lambda _, plan: replace(plan, encoding=Encoding(2.0, 10, 16, 20, Rotation.NONE)),
    "statistics": lambda _, plan: replace(plan, statistics=(plan.statistics[0], StatisticSpec("train.loss", 1.0))),
    "deadlines": lambda _, plan: replace(plan, deadlines=replace(plan.deadlines, unmask_ms=1)),
    "nonce": lambda _, plan: replace(plan, nonce=bytes(16)),
}


@pytest.mark.parametrize("difference", OTHER_PLANS)
async def test_two_halves_of_a_cohort_that_are_shown_different_plans(difference: str, tmp_path: Path) -> None:
    """Attack: half of the sites get another model, roster or parameter than the rest, each half signed and complete,
    and what one half advertises is relayed to the other. Expected: the session id is the hash of the plan's bytes and
    under every signature, so each site finds that the other half did not sign for its session, and leaves.
    """
    async with against(tmp_path) as (liar, _):
        one = liar.plan(SITES)
        other = OTHER_PLANS[difference](liar, one)
        shown = {name: one if name < "site-c" else other for name in SITES}
        ids = {name: session_id(codec.encode_plan(plan)) for name, plan in shown.items()}
        for name, plan in shown.items():
            liar.say(name, ids[name], liar.offer(plan), cohort=plan.cohort)
        said = {name: await liar.answer(name, ids[name], AdvertiseKeys) for name in SITES}
        for name, plan in shown.items():
            index = {n: plan.participants(frozenset(range(plan.cohort))).index(n) for n in SITES}
            advertised = tuple(sorted((index[n], said[n]) for n in SITES if n != name))
            message = Advertisements(frozenset(index.values()), advertised, ())
            liar.say(name, ids[name], message, cohort=plan.cohort)
        for name in SITES:
            await liar.leaves(name, ids[name], AbortReason.BAD_PEER_SIGNATURE)
        assert not liar.uploads


# --- different survivors --------------------------------------------------------------------------------------------


def given_away(liar: Liar, session: Session) -> Counter[tuple[int, ShareKind]]:
    """How many shares of each secret the coordinator has been given by all sites together."""
    return Counter((s.owner, s.kind) for name in SITES for s in liar.revealed(name, session.id))


def never_closed(alter: Callable[[str, Response], Any]) -> Callable[[str, Response], Any]:
    """A session that this coordinator does not end for anybody, whatever the core finds out about its lies."""
    return lambda name, message: () if isinstance(message, SessionClosed) else alter(name, message)


async def two_stories(liar: Liar, sets_for: Callable[[str], Members]) -> Session:
    """A session in which each site was told of its own survivors, and has signed for those."""

    def lie(name: str, sets: SurvivorSets) -> SurvivorSets:
        return replace(sets, u3=sets_for(name))

    session = liar.open(liar.plan(SITES), never_closed(changed(SurvivorSets, lie)))
    for name in SITES:
        await liar.answer(name, session.id, ConsistencyCheck)
    return session


async def signatures(liar: Liar, session: Session, *names: str) -> SurvivorSignatures:
    return SurvivorSignatures(
        tuple([(session.index(n), (await liar.answer(n, session.id, ConsistencyCheck)).signature) for n in names])
    )


@pytest.mark.parametrize("with_signatures_of", ["everybody", "those who were told the same"])
async def test_a_site_alive_to_some_and_gone_to_others(with_signatures_of: str, tmp_path: Path) -> None:
    """Attack: two sites are told that site-d dropped out, two that it did not: together they would give away both its
    mask key and its self mask, and so its update. Expected: before a share leaves, a site wants t signatures over the
    very sets that it signed; nobody gets them, and not one share leaves.
    """
    async with against(tmp_path) as (liar, _):
        told = {name: WITHOUT_D if name < "site-c" else EVERYONE for name in SITES}
        session = await two_stories(liar, told.__getitem__)
        everybody = with_signatures_of == "everybody"
        for name in SITES:
            like = [n for n in SITES if session.index(n) in told[name] and (everybody or told[n] == told[name])]
            liar.say(name, session.id, await signatures(liar, session, *like))
            reason = AbortReason.BAD_PEER_SIGNATURE if everybody else AbortReason.TOO_FEW_SIGNATURES
            await liar.leaves(name, session.id, reason)
        assert not given_away(liar, session)


async def test_a_colluding_member_that_signs_for_two_survivor_sets_does_not_suffice(tmp_path: Path) -> None:
    """Attack: the same with a member (site-c) that signs whatever the coordinator wants, as c = 1 tolerates. Expected:
    one story finds its t = 3 signatures, the other does not; with the colluder's own shares counted for both kinds, no
    secret reaches t shares of both kinds.
    """
    async with against(tmp_path) as (liar, _):
        told = {"site-a": WITHOUT_D, "site-b": WITHOUT_D, "site-c": WITHOUT_D, "site-d": EVERYONE}
        session = await two_stories(liar, told.__getitem__)
        liar.say("site-a", session.id, first := await signatures(liar, session, *SITES[:3]))
        liar.say("site-b", session.id, first)
        for name in SITES[:2]:
            await liar.answer(name, session.id, Unmask)
        sets = SurvivorSets(EVERYONE, EVERYONE, EVERYONE)
        colluder = liar.signer("site-c").sign(ConsistencyCheck.signed_bytes(sets, 4, session=session.id, sender=2))
        own = (await liar.answer("site-d", session.id, ConsistencyCheck)).signature
        liar.say("site-d", session.id, SurvivorSignatures(((2, colluder), (3, own))))
        await liar.leaves("site-d", session.id, AbortReason.TOO_FEW_SIGNATURES)
        shares = given_away(liar, session)
        for owner in range(4):
            held = [shares[owner, kind] + 1 for kind in ShareKind]  # and the colluder's own, of either kind
            assert min(held) < session.plan.graph.threshold, (owner, held)
        assert shares[3, ShareKind.MASK_SECRET] == 2, "the story that was told to three was believed"


@pytest.mark.parametrize("when", ["before the signatures", "after the answer"])
async def test_asking_for_both_shares_of_a_member(when: str, tmp_path: Path) -> None:
    """Attack: site-d is a survivor, and then, in the same session, a dropout after all, or a coordinator that was
    restarted claims so: the holders would add the share of its mask key to that of its self mask. Flower releases both
    on request, since its lists of the living and the dead need not be disjoint. Expected: a second U3 is equivocation;
    of each member one kind of share has left each holder, whatever was asked.
    """
    async with against(tmp_path) as (liar, _):
        early = when == "before the signatures"
        alter = changed(SurvivorSignatures, lambda _n, m: None if early else m)
        session = liar.open(liar.plan(SITES), never_closed(alter))
        await session.until(core.CollectingUnmask if early else core.Completed)
        for name in SITES[:3]:
            liar.say(name, session.id, SurvivorSets(EVERYONE, EVERYONE, WITHOUT_D))
        for name in SITES[:3]:
            reason = AbortReason.EQUIVOCATION if early else AbortReason.UNEXPECTED_MESSAGE
            await liar.leaves(name, session.id, reason)
        for name in SITES:
            owners = Counter(share.owner for share in liar.revealed(name, session.id))
            assert set(owners.values()) <= {1}, "one share of each member, of one kind"
        assert given_away(liar, session)[3, ShareKind.MASK_SECRET] == 0


async def test_other_signatures_after_the_answer_bring_no_second_answer(tmp_path: Path) -> None:
    """Attack: once it has answered, a site is asked again under fewer signatures. Expected: equivocation; a request
    that is the same to the letter gets the same answer to the letter, and no other does.
    """
    async with against(tmp_path) as (liar, _):
        session = liar.open(liar.plan(SITES), never_closed(lambda _name, message: (message,)))
        await session.until(core.Completed)
        three = await signatures(liar, session, *SITES[:3])
        everybody = await signatures(liar, session, *SITES)
        liar.say("site-a", session.id, everybody)
        await liar.answer("site-a", session.id, Unmask, count=2)
        liar.say("site-a", session.id, three)
        await liar.leaves("site-a", session.id, AbortReason.EQUIVOCATION)
        assert len(set(liar.answers("site-a", session.id, Unmask))) == 1


# --- plans that nobody may make -------------------------------------------------------------------------------------


def forged_plan(plan: RoundPlan, **graph: int) -> bytes:
    """A plan's bytes in canonical form, with what no `RoundPlan` can hold."""
    message = plan_pb2.RoundPlan.FromString(codec.encode_plan(plan))
    for name, value in graph.items():
        setattr(message.graph, name, value)
    return message.SerializeToString(deterministic=True)


async def not_a_word(liar: Liar, plan_bytes: bytes, plan: RoundPlan, sites: dict[str, Any]) -> None:
    """A plan that is none is not answered, and nothing is written down or made for it."""
    session = session_id(plan_bytes)
    for name, running in sites.items():
        liar.say(name, session, liar.offer_bytes(plan_bytes, plan))
        await liar.settled(name)
        assert not [m for s, m in liar.heard[name] if s == session]
        assert not running.ledger.plans("ward")


@pytest.mark.parametrize(("threshold", "colluders"), [(0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 2), (5, 1)])
async def test_a_threshold_that_the_coordinator_chose_for_itself(
    threshold: int, colluders: int, tmp_path: Path
) -> None:
    """Attack: t = 1, and every single holder opens everybody's secrets; or any t with 2t ≤ m + c, so that two stories
    find t holders each. Elsewhere the threshold is the server's to choose and nobody checks it. Expected: no site takes
    the bytes for a plan, whatever its policy says.
    """
    async with against(tmp_path, names=SITES[:1]) as (liar, sites):
        plan = liar.plan(SITES)
        assert forged_plan(plan, threshold=3, colluders=1) == codec.encode_plan(plan)
        await not_a_word(liar, forged_plan(plan, threshold=threshold, colluders=colluders), plan, sites)


async def test_a_plan_that_tolerates_no_colluder_is_declined(tmp_path: Path) -> None:
    """Attack: a plan that is in order but for c = 0, and a colluder in the cohort. Expected: the default policy, which
    wants one tolerated, declines, and the operator reads why.
    """
    async with against(tmp_path, names=SITES[:1]) as (liar, _):
        offer = liar.offer(liar.plan(SITES, colluders=0))
        await liar.declines("site-a", offer, DeclineCode.COLLUDERS, "tolerated colluders 0 < 1")


async def test_a_cohort_of_two(tmp_path: Path) -> None:
    """Attack: a cohort of two, in which each member, or one member and the coordinator, reads the other's update off
    the sum. Expected: there is no such plan; no site answers.
    """
    async with against(tmp_path, names=SITES[:1]) as (liar, sites):
        plan = liar.plan(SITES[:3])
        message = plan_pb2.RoundPlan.FromString(codec.encode_plan(plan))
        del message.roster[2]
        message.graph.degree, message.graph.threshold, message.min_survivors = 1, 2, 2
        await not_a_word(liar, message.SerializeToString(deterministic=True), plan, sites)


@pytest.mark.parametrize("survivors", [{0, 1}, {0}])
async def test_a_sum_over_two_survivors(survivors: set[int], tmp_path: Path) -> None:
    """Attack: a cohort of four of which two "dropped out" after everybody has uploaded. Expected: no survivor signs."""
    async with against(tmp_path) as (liar, _):
        lie = changed(SurvivorSets, lambda _n, sets: replace(sets, u3=frozenset(survivors)))
        session = liar.open(liar.plan(SITES), never_closed(lie))
        for index in survivors:
            await liar.leaves(SITES[index], session.id, AbortReason.TOO_FEW_PARTICIPANTS)
        assert not given_away(liar, session)


async def test_a_cohort_below_the_sites_own_floor(tmp_path: Path) -> None:
    """Attack: a cohort that the plan admits and this site does not. Expected: it declines and says so."""
    async with against(tmp_path, names=()) as (liar, _):
        from tests.attacks.liar_coordinator import site

        async with site(liar, "site-a", policy=Policy(min_weight_cap=1, min_cohort=5)):
            await liar.declines("site-a", liar.offer(liar.plan(SITES)), DeclineCode.COHORT_TOO_SMALL, "cohort 4 < 5")


def test_a_job_for_two_is_none() -> None:
    """Attack: a researcher asks for a cohort of two, to read one site's update. Expected: no such job."""
    for key in ("min_participants", "min_survivors", "max_participants"):
        with pytest.raises(ValidationError, match=key):
            Cohort.model_validate({key: 2})
    with pytest.raises(ValidationError, match=r"cohort\.participants"):
        Cohort(participants=("site-a", "site-b"))
