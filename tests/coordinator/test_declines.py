"""Sites that decline: what a job's waiting and failed reasons say of them, and when they are asked again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import structlog
from tests.coordinator.local_federation import FOUR, SITES, connect_all, federation
from tests.coordinator.test_rounds import NOW, decide, opened, run

from maskwork import job_events as events
from maskwork.coordinator import rounds
from maskwork.coordinator.jobs import JobDesk
from maskwork.coordinator.records import JobState
from maskwork.coordinator.rounds import GiveUp, Wait
from maskwork.secagg.errors import AbortReason, DeclineCode
from maskwork.secagg.messages import AdvertiseKeys, Decline, Withdraw
from maskwork.wire.codec import OpenSession

COHORT = Decline(DeclineCode.COHORT_TOO_SMALL, "cohort 4 < 5")
SHARE = Decline(DeclineCode.PARTICIPATION, "participation in 2 of 3 rounds > 0.5")

# --- between sessions -----------------------------------------------------------------------------------------------


def test_who_declined_and_why_is_said_while_a_job_waits_and_when_it_fails() -> None:
    drops = {"b": "declined: cohort 4 < 5", "c": "withdrew: trusted survivors verified here 1 < 2"}
    state = rounds.after_abort(
        run(max_attempts=1),
        reason=AbortReason.TOO_FEW_PARTICIPANTS,
        excluded={"b": drops["b"]},
        barred={},
        now=NOW,
        drops=drops,
    )
    said = "too-few-participants; b declined: cohort 4 < 5; c withdrew: trusted survivors verified here 1 < 2"
    assert state.last_abort == said
    _, decision = decide(state, "a", "b", "c", now=NOW + 60)
    assert isinstance(decision, GiveUp)
    assert f"The last time: {said}." in decision.reason
    _, decision = decide(replace(state, failures=0), "a", "b", "c", now=NOW + 60)
    assert decision == Wait("2 of the 3 sites needed are ready; b declined: cohort 4 < 5", None)


def test_a_site_that_sits_out_is_not_asked_in_this_round_and_is_asked_in_the_next() -> None:
    why = {"d": "declined: participation in 2 of 3 rounds > 0.5"}
    state = rounds.after_abort(
        run({"participants": ["a", "b", "c", "d"], "wait_s": 0}),
        reason=AbortReason.CANCELLED,
        excluded={},
        sitting_out=why,
        barred={},
        now=NOW,
    )
    state, decision = decide(state, "a", "b", "c", "d", now=NOW + 60)
    assert opened(decision) == ("a", "b", "c")
    _, decision = decide(state, "a", "b", "d", now=NOW + 60)
    assert decision == Wait(
        "2 of the 3 sites needed are ready; d declined: participation in 2 of 3 rounds > 0.5; not connected: c", None
    )
    following = rounds.after_commit(state, model=bytes(32), survivors=("a", "b", "c"))
    assert following is not None
    _, decision = decide(following, "a", "b", "c", "d", now=NOW + 60)
    assert opened(decision) == ("a", "b", "c", "d")


def test_a_site_that_sits_out_is_asked_again_when_it_connects_anew_and_when_the_storage_failed_it_is_not() -> None:
    state = rounds.after_abort(
        run({"wait_s": 0}),
        reason=AbortReason.STORAGE_FAILED,
        excluded={},
        sitting_out={"d": "declined: not now"},
        barred={},
        now=NOW,
        detail="the disk is full",
    )
    _, decision = decide(state, "a", "b", "c", "d", now=NOW + 60)
    assert opened(decision) == ("a", "b", "c")
    _, decision = decide(rounds.readmit(state, "d"), "a", "b", "c", "d", now=NOW + 60)
    assert opened(decision) == ("a", "b", "c", "d")


# --- through the driver ---------------------------------------------------------------------------------------------


async def test_a_site_that_declines_for_its_share_is_asked_in_the_next_round_without_connecting_anew(
    tmp_path: Path,
) -> None:
    async with federation(tmp_path) as (coordinator, sites):
        coordinator.add_job(rounds=2, cohort=FOUR)
        resting = sites["site-d"]
        resting.silent = {AdvertiseKeys}
        await connect_all(coordinator, sites)
        await resting.until_heard(OpenSession)
        resting.silent = set()
        await resting.say(SHARE)
        await coordinator.until_ended()
        assert [r.survivors for r in coordinator.store.rounds("job-1")] == [SITES[:3], SITES]
        (drop,) = coordinator.store.drops("job-1")
        assert (drop.participant, drop.reason, drop.detail) == ("site-d", "declined", f"participation: {SHARE.detail}")


async def test_a_job_that_waits_for_sites_that_declined_says_so_to_whoever_asks(tmp_path: Path) -> None:
    async with federation(tmp_path) as (coordinator, sites):
        coordinator.add_job(cohort={"min_participants": 4, "max_participants": 4, "wait_s": 0})
        sites["site-b"].silent = {AdvertiseKeys}
        sites["site-c"].silent = {AdvertiseKeys}
        await connect_all(coordinator, sites)
        for name, message in (("site-b", COHORT), ("site-c", Withdraw(AbortReason.POLICY, "trusted 1 < 2"))):
            await sites[name].until_heard(OpenSession)
            await sites[name].say(message)
        aborted = await coordinator.until(lambda e: isinstance(e, events.AttemptAborted))
        assert isinstance(aborted, events.AttemptAborted)
        said = "3 of the 4 sites needed are ready; site-b declined: cohort 4 < 5"
        await coordinator.until(lambda e: isinstance(e, events.Waiting) and e.detail == said)
        desk = JobDesk(
            store=coordinator.store, models=coordinator.models, board=coordinator.driver.board, max_model_bytes=1
        )
        details = desk.details("job-1")
        assert (details.job.state, details.job.reason) == ("running", f"waiting: {said}")
        assert [(d.participant, d.reason, d.detail) for d in details.drops] == [
            ("site-b", "declined", "cohort-too-small: cohort 4 < 5"),
            ("site-c", "withdrew", "policy: trusted 1 < 2"),
        ]
        assert desk.list()[0].reason == ""


async def test_a_job_that_fails_since_sites_declined_names_them(tmp_path: Path) -> None:
    async with federation(tmp_path) as (coordinator, sites):
        coordinator.add_job(max_attempts=1, cohort=FOUR)
        for name in ("site-b", "site-c"):
            sites[name].silent = {AdvertiseKeys}
        await connect_all(coordinator, sites)
        for name in ("site-b", "site-c"):
            await sites[name].until_heard(OpenSession)
            await sites[name].say(COHORT)
        record = await coordinator.until_ended()
        assert record.state is JobState.FAILED
        assert "site-b declined: cohort 4 < 5; site-c declined: cohort 4 < 5" in record.reason


async def test_a_refusal_is_logged_in_the_words_of_the_site(tmp_path: Path) -> None:
    async with federation(tmp_path) as (coordinator, sites):
        coordinator.add_job(cohort=FOUR)
        sites["site-b"].silent = {AdvertiseKeys}
        with structlog.testing.capture_logs() as logged:
            await connect_all(coordinator, sites)
            await sites["site-b"].until_heard(OpenSession)
            await sites["site-b"].say(COHORT)
            await coordinator.until_ended()
        (line,) = [e for e in logged if e["event"] == "participant dropped"]
        assert line["said"] == "site-b declined: cohort 4 < 5"
