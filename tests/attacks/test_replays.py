"""What was said once, said again: in another attempt, round or job, after a restart, or twice in one session.

And what a coordinator can gain by asking again on the same model: two sums whose difference is one site's update.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest
from tests.attacks.liar_coordinator import SITES, Alter, Liar, Session, against, changed, listening, site

from maskwork.secagg import server_states as core
from maskwork.secagg.errors import AbortReason, DeclineCode
from maskwork.secagg.messages import (
    Advertisements,
    DeliveredShares,
    SurvivorSets,
    SurvivorSignatures,
)
from maskwork.secagg.plan import RoundPlan, survivors_digest
from maskwork.wire.codec import Response, UploadGrant, UploadReady

# --- from another session -------------------------------------------------------------------------------------------

LATER: Final[dict[str, Callable[[Liar, RoundPlan, int], RoundPlan]]] = {
    "attempt": lambda liar, plan, n: liar.plan(SITES, model_digest=plan.model_digest, attempt=n),
    "round": lambda liar, plan, n: liar.plan(
        SITES,
        model_digest=liar.model(1.0),
        round_number=4,
        attempt=n,
        previous_survivors=survivors_digest(SITES),
    ),
    "job": lambda liar, plan, n: liar.plan(SITES, model_digest=plan.model_digest, job="another", attempt=n),
}
"""Sessions that sites take part in after a first one, by what tells them apart from it."""


class Recorder:
    """Everything that the coordinator said in a session, and the same said in a later one."""

    def __init__(self) -> None:
        self.said: dict[str, list[Response]] = defaultdict(list)

    def record(self, name: str, message: Response) -> Sequence[Response | bytes]:
        self.said[name].append(message)
        return (message,)

    def again(self, kind: type) -> Alter:
        return changed(kind, lambda name, _: next(m for m in self.said[name] if isinstance(m, kind)))


@pytest.mark.parametrize("another", LATER)
async def test_what_was_signed_for_another_session_is_replayed(another: str, tmp_path: Path) -> None:
    """Attack: keys, shares or signatures of an earlier attempt, round or job, all genuine, in place of this one's: keys
    whose secrets were opened then would be used again. Or everything is this session's but the share of one dealer.
    Expected: every signature carries the session id; all leave.
    """
    async with against(tmp_path) as (liar, _):
        recorder, plan = Recorder(), liar.plan(SITES)
        first = await liar.run(plan, recorder.record)
        assert isinstance(first.state, core.Completed)

        def mix(name: str, message: DeliveredShares) -> DeliveredShares:
            earlier = next(m for m in recorder.said[name] if isinstance(m, DeliveredShares))
            return replace(message, shares=(earlier.shares[0], *message.shares[1:]))

        replays = [recorder.again(kind) for kind in (Advertisements, DeliveredShares, SurvivorSignatures)]
        for number, alter in enumerate((*replays, changed(DeliveredShares, mix)), 2):
            session = liar.open(LATER[another](liar, plan, number), alter)
            await session.all_leave(AbortReason.BAD_PEER_SIGNATURE)


async def test_a_plan_after_a_round_that_went_otherwise(tmp_path: Path) -> None:
    """Attack: the next round's plan claims other survivors of the last one than those for whom this site gave its
    shares: a coordinator that keeps two histories. Expected: declined; sites remember whom they helped to unmask.
    """
    async with against(tmp_path) as (liar, _):
        await released_with_everybody(liar)
        for claimed in ((), SITES[:3]):
            digest, model = survivors_digest(claimed), liar.model(1.0)
            plan = liar.plan(SITES, model_digest=model, round_number=4, previous_survivors=digest)
            for name in SITES:
                await liar.declines(name, liar.offer(plan), DeclineCode.AUDIT, "not those whom this site helped")


async def test_a_plan_of_another_federation_or_by_another_hand(tmp_path: Path) -> None:
    """Attack: a plan that names another federation, and one that was signed by a member instead of the coordinator.
    Expected: declined.
    """
    async with against(tmp_path, names=SITES[:1]) as (liar, _):
        elsewhere = liar.offer(liar.plan(SITES, federation="elsewhere"))
        await liar.declines("site-a", elsewhere, DeclineCode.BAD_PLAN, "the plan is for federation elsewhere")
        offer = liar.offer(liar.plan(SITES))
        signed = replace(offer.proposal, signature=liar.signer("site-d").sign(b"maskwork/v1/sig/plan\0"))
        await liar.declines("site-a", replace(offer, proposal=signed), DeclineCode.BAD_PLAN, "not the coordinator's")


@pytest.mark.parametrize("restarted", [False, True], ids=["running", "restarted"])
async def test_an_old_plan(restarted: bool, tmp_path: Path) -> None:
    """Attack: the plan of a session that is over, or another one under the same or an earlier number, to a site that
    has lost its memory of it since, by a restart. Expected: it is on its disk; declined as stale.
    """
    async with listening(tmp_path) as liar:
        async with site(liar, "site-a"), site(liar, "site-b"), site(liar, "site-c"), site(liar, "site-d"):
            run = await liar.run(liar.plan(SITES, round_number=4, attempt=2))
            assert isinstance(run.state, core.Completed)
            if not restarted:
                await old_plans_are_stale(liar, run)
        if restarted:
            async with site(liar, "site-a"):
                await old_plans_are_stale(liar, run)


async def old_plans_are_stale(liar: Liar, run: Session) -> None:
    for plan in (
        run.plan,
        replace(run.plan, nonce=bytes(16)),
        replace(run.plan, attempt=1),
        replace(run.plan, round_number=3, attempt=7),
    ):
        liar.heard["site-a"].clear()
        await liar.declines("site-a", liar.offer(plan), DeclineCode.STALE_ATTEMPT, "is not above round 4, attempt 2")


async def test_a_participant_that_was_restarted_does_not_go_on_with_its_session(tmp_path: Path) -> None:
    """Attack: a site that has uploaded is restarted, and is asked to sign as if nothing had happened: it would have to
    make up what it knew. Expected: it says nothing in that session ever again; its memory of it is gone.
    """
    async with listening(tmp_path) as liar, site(liar, "site-b"), site(liar, "site-c"), site(liar, "site-d"):
        async with site(liar, "site-a"):
            session = liar.open(liar.plan(SITES), changed(SurvivorSets, lambda n, m: None if n == "site-a" else m))
            await session.until(core.CollectingSignatures)
            assert isinstance(session.state, core.CollectingSignatures)
            sets = session.state.sets
        left = len(liar.heard["site-a"])  # it withdrew when it was stopped in good order
        async with site(liar, "site-a"):
            liar.say("site-a", session.id, sets)
            await liar.settled("site-a")
            assert not [m for s, m in liar.heard["site-a"][left:] if s == session.id]
            liar.heard["site-a"].clear()
            await liar.declines("site-a", session.offer, DeclineCode.STALE_ATTEMPT)


# --- twice in one session -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cut after the last byte", "asked again", "asked again from the middle"])
async def test_an_upload_that_is_asked_for_twice(how: str, tmp_path: Path) -> None:
    """Attack: the coordinator loses an upload, or says so, and asks for it again from offset zero: under other masks or
    another rounding the two would be a two-time pad. Expected: a session encodes and masks once; the same bytes.
    """
    async with against(tmp_path) as (liar, _):
        if how == "cut after the last byte":
            liar.cut_uploads_at = 0
        session = liar.open(liar.plan(SITES), changed(SurvivorSets, lambda _n, _m: None))
        await session.until(core.CollectingSignatures)
        (name, uploads), *_ = sorted(((n, liar.uploads[session.id, n]) for n in SITES), key=lambda item: -len(item[1]))
        if how != "cut after the last byte":
            offset = 7 if how == "asked again from the middle" else 0
            while len(uploads) == 1:  # a site that has not heard of the end of its first upload takes up no second one
                liar.say(name, session.id, UploadGrant(offset, 0))
                with suppress(TimeoutError):
                    async with asyncio.timeout(0.5):
                        await liar.until(lambda: len(uploads) > 1)
            assert all(again == uploads[0][offset:] for again in uploads[1:])
        assert len(uploads) > 1
        assert all(uploads[0].endswith(again) for again in uploads[1:])
        assert len(uploads[0]) > 40
        assert len({liar.uploads[session.id, n][0] for n in SITES}) == 4


# --- again on the same model ----------------------------------------------------------------------------------------


async def released_with_everybody(liar: Liar) -> RoundPlan:
    plan = liar.plan(SITES)
    run = await liar.run(plan)
    assert isinstance(run.state, core.Completed)
    return plan


@pytest.mark.parametrize("job", ["job-1", "another-job"])
async def test_a_coordinator_that_was_restarted_to_unmask_a_smaller_set_on_the_same_model(
    job: str, tmp_path: Path
) -> None:
    """Attack: a sum over four is released; a "restarted" coordinator, or a new job, asks for one over three of them on
    the same model: the difference is the fourth one's update. As a smaller roster, or as the same one with a "dropout"
    after everybody has uploaded. Expected: declined before anything is made; not signed, since a site remembers every
    set that it has answered for on a model, on its disk.
    """
    async with against(tmp_path) as (liar, _):
        model = (await released_with_everybody(liar)).model_digest
        smaller = liar.offer(liar.plan(SITES[:3], model_digest=model, job=job, attempt=2, colluders=1))
        for name in SITES[:3]:
            await liar.declines(name, smaller, DeclineCode.SAME_MODEL, "on this model a sum over 4 sites was released")
        lie = changed(SurvivorSets, lambda _n, sets: replace(sets, u3=frozenset({0, 1, 2})))
        session = liar.open(liar.plan(SITES, model_digest=model, job=job, attempt=3), lie)
        for name in SITES[:3]:
            await liar.leaves(name, session.id, AbortReason.SAME_MODEL)
            assert not liar.revealed(name, session.id)


async def test_the_memory_of_what_was_released_outlives_a_restart(tmp_path: Path) -> None:
    """Attack: the same after every site was restarted. Expected: the same."""
    async with listening(tmp_path) as liar:
        async with site(liar, "site-a"), site(liar, "site-b"), site(liar, "site-c"), site(liar, "site-d"):
            model = (await released_with_everybody(liar)).model_digest
        async with site(liar, "site-a"):
            smaller = liar.offer(liar.plan(SITES[:3], model_digest=model, attempt=2, colluders=1))
            await liar.declines("site-a", smaller, DeclineCode.SAME_MODEL)


async def test_a_member_that_comes_back_to_force_a_difference(tmp_path: Path) -> None:
    """Attack: site-d (in league with the coordinator, or its victim) is gone before the sum over the other three is
    released, and back for another attempt on the same model: the two sums differ in site-d's update alone. Expected:
    those who have answered decline the larger cohort; site-d is left alone in it and uploads nothing more.
    """
    async with against(tmp_path) as (liar, _):
        first = liar.open(liar.plan(SITES), changed(SurvivorSets, lambda n, m: None if n == "site-d" else m))
        await first.until(core.CollectingUpdates)
        first.lose("site-d")
        await first.ends()
        assert isinstance(first.state, core.Completed)
        assert first.state.survivors == frozenset({0, 1, 2})
        liar.hang_up("site-d")
        await liar.connected("site-d")
        second = await liar.run(liar.plan(SITES, model_digest=first.plan.model_digest, attempt=2))
        assert isinstance(second.state, core.Aborted)
        for name in SITES[:3]:
            (declined,) = [m for s, m in liar.heard[name] if s == second.id]
            assert getattr(declined, "code", None) is DeclineCode.SAME_MODEL
        assert not liar.answers("site-d", second.id, UploadReady)
        assert not liar.revealed("site-d", second.id)


async def test_an_almost_equal_model_is_another_one(tmp_path: Path) -> None:
    """Attack: the same differencing on a model that differs in one weight by a hair. **It succeeds**: the rule compares
    digests, and both sums are released. What is left is the site's own `min_survivors`, a fixed list of participants,
    and people who look (docs/threat-model.md, "What remains").
    """
    async with against(tmp_path) as (liar, _):
        await released_with_everybody(liar)
        session = liar.open(liar.plan(SITES, model_digest=liar.model(1e-7), attempt=2))
        await session.until(core.CollectingUpdates)
        session.lose("site-d")
        await session.ends()
        assert isinstance(session.state, core.Completed)
        assert session.state.survivors == frozenset({0, 1, 2})
