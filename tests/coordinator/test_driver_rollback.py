"""A model that turns out to be damaged: the job goes on from the newest one that is intact, durably, and says so."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import numpy as np
import pytest
from tests.coordinator.local_federation import (
    SITES,
    InlineWorker,
    LocalCoordinator,
    LocalSite,
    connect_all,
    federation,
    mean_update,
    model_of,
)

from maskwork import job_events as events
from maskwork.coordinator.board import EventBoard
from maskwork.coordinator.jobs import JobDesk
from maskwork.coordinator.records import AttemptOutcome, JobState
from maskwork.coordinator.vault import Vault
from maskwork.secagg.errors import DeclineCode
from maskwork.secagg.messages import AdvertiseKeys, Decline
from maskwork.wire.codec import OpenSession

THREE = SITES[:3]
P = ParamSpec("P")
R = TypeVar("R")


def break_file(coordinator: LocalCoordinator, digest: bytes, how: str) -> None:
    path = coordinator.models.path(digest)
    if how == "missing":
        path.unlink()
    else:
        whole = bytearray(path.read_bytes())
        whole[-1] ^= 1  # one bit of the last weight: still a readable model, but another one
        path.write_bytes(whole)


def rounds_of(coordinator: LocalCoordinator) -> list[int]:
    return [r.round_number for r in coordinator.store.rounds("job-1")]


def outcomes(coordinator: LocalCoordinator) -> list[tuple[int, int, AttemptOutcome | None]]:
    return [(a.round_number, a.attempt, a.outcome) for a in coordinator.store.attempts("job-1")]


async def run_until(
    folder: Path, silent_after: int, *, rounds: int, vault: Vault | None = None
) -> tuple[LocalCoordinator, dict[str, LocalSite]]:
    """Three sites commit `silent_after` rounds; in the next one site-c says nothing any more, and everything stops."""
    coordinator, sites = LocalCoordinator(folder, vault=vault), {name: LocalSite(name) for name in THREE}
    coordinator.start()
    coordinator.add_job(rounds=rounds)
    heard = {"count": 0}
    hear = sites["site-c"]._hear

    async def counted(response: object) -> None:
        opening = response.HasField("open_session")  # type: ignore[attr-defined]
        heard["count"] += opening
        if opening and heard["count"] > silent_after:
            sites["site-c"].silent = {AdvertiseKeys}
        await hear(response)  # type: ignore[arg-type]

    sites["site-c"]._hear = counted  # type: ignore[method-assign]
    await connect_all(coordinator, sites)
    await sites["site-c"].until_heard(OpenSession, count=silent_after + 1)
    await coordinator.settled()
    assert rounds_of(coordinator) == list(range(1, silent_after + 1))
    await coordinator.crash()
    for site in sites.values():
        assert site._pump is not None
        site._pump.cancel()
    del sites["site-c"]._hear
    sites["site-c"].silent = set()
    return coordinator, sites


def model_after(coordinator: LocalCoordinator, number: int) -> bytes:
    before = LocalCoordinator(coordinator.folder)
    record = before.record()
    by_round = {0: record.initial_model} | {r.round_number: r.model for r in before.store.rounds("job-1")}
    before.store.close()
    return by_round[number]


@pytest.mark.parametrize("how", ["missing", "damaged"])
async def test_a_damaged_newest_model_rolls_back_to_the_round_before_and_the_job_goes_on(
    tmp_path: Path, how: str
) -> None:
    stopped, sites = await run_until(tmp_path, 2, rounds=3)
    break_file(stopped, model_after(stopped, 2), how)
    async with federation(tmp_path) as (restarted, _):
        await connect_all(restarted, sites)
        record = await restarted.until_ended()
        assert record.state is JobState.COMPLETED
        # Three rounds were asked for and three are in; the second one committed, was taken back, and is not among them.
        assert (record.rounds_committed, record.rolled_back, rounds_of(restarted)) == (3, 1, [1, 3, 4])
        assert outcomes(restarted) == [
            (1, 1, AttemptOutcome.COMMITTED),
            (2, 1, AttemptOutcome.ROLLED_BACK),
            (3, 1, AttemptOutcome.ABORTED),
            (3, 2, AttemptOutcome.COMMITTED),
            (4, 1, AttemptOutcome.COMMITTED),
        ]
        np.testing.assert_allclose(model_of(restarted, record.current_model), 3 * mean_update(THREE), atol=1e-4)
        (taken,) = restarted.store.rolled_back_rounds("job-1")
        assert taken.committed.survivors == THREE
        assert taken.reason.startswith("round 2 rolled back to the model of round 1, the newest that is intact: ")
        assert f": model {taken.committed.model.hex()} is " in taken.reason
        assert str(tmp_path) not in taken.reason, (
            "where the coordinator keeps its models is not a researcher's business"
        )
        assert (taken.reason.endswith("is missing"), "SHA-256" in taken.reason) == (how == "missing", how == "damaged")


async def test_every_plan_after_a_rollback_is_higher_than_any_that_a_site_has_seen(tmp_path: Path) -> None:
    stopped, sites = await run_until(tmp_path, 2, rounds=3)
    break_file(stopped, model_after(stopped, 2), "missing")
    async with federation(tmp_path) as (restarted, _):
        await connect_all(restarted, sites)
        await restarted.until_ended()
    for site in sites.values():
        plans = [m.proposal.plan for _, m in site.heard if isinstance(m, OpenSession)]
        positions = [(p.round_number, p.attempt) for p in plans]
        assert positions == sorted(set(positions))  # what a site's ledger asks: each higher than all before
        assert [p.rounds_total for p in plans[-2:]] == [4, 4]  # a site's policy sees that one more sum is released
        assert plans[-2].model_digest == plans[1].model_digest  # the redone round starts where the lost one did


async def test_a_rolled_back_round_is_redone_by_its_own_survivors_alone_and_says_who_is_missing(tmp_path: Path) -> None:
    stopped, sites = await run_until(tmp_path, 2, rounds=3)
    break_file(stopped, model_after(stopped, 2), "missing")
    async with federation(tmp_path) as (restarted, _):
        for name in ("site-a", "site-b"):
            await sites[name].connect(restarted.driver)
        await LocalSite("site-d").connect(restarted.driver)  # enough sites, but not those who answered on this model
        waiting = await restarted.until(lambda e: isinstance(e, events.Waiting) and "Missing: site-c." in e.detail)
        assert isinstance(waiting, events.Waiting)
        assert "round 2 rolled back to the model of round 1" in waiting.detail
        assert "for the same survivors (site-a, site-b, site-c). Missing: site-c. Start them again" in waiting.detail
        for command in ("maskwork job abort job-1", "maskwork model export job-1 --round N", "maskwork model init"):
            assert command in waiting.detail
        await sites["site-c"].connect(restarted.driver)
        record = await restarted.until_ended()
        assert record.state is JobState.COMPLETED
        assert restarted.store.rounds("job-1")[1].survivors == THREE


async def test_a_rollback_passes_over_every_model_that_is_damaged_and_may_reach_the_initial_one(tmp_path: Path) -> None:
    stopped, sites = await run_until(tmp_path, 2, rounds=3)
    for number in (1, 2):
        break_file(stopped, model_after(stopped, number), "damaged")
    async with federation(tmp_path) as (restarted, _):
        await connect_all(restarted, sites)
        record = await restarted.until_ended()
        assert (record.state, record.rounds_committed, record.rolled_back) == (JobState.COMPLETED, 3, 2)
        assert rounds_of(restarted) == [3, 4, 5]
        reasons = {taken.reason for taken in restarted.store.rolled_back_rounds("job-1")}
        assert all(r.startswith("rounds 1 to 2 rolled back to the initial model") for r in reasons)
        np.testing.assert_allclose(model_of(restarted, record.current_model), 3 * mean_update(THREE), atol=1e-4)


async def test_when_no_model_is_intact_the_job_fails_and_says_what_is_possible(tmp_path: Path) -> None:
    stopped, _ = await run_until(tmp_path, 1, rounds=3)
    for number in (0, 1):
        break_file(stopped, model_after(stopped, number), "damaged")
    newest = model_after(stopped, 1).hex()
    async with federation(tmp_path) as (restarted, _):
        record = await restarted.until_ended()
        assert record.state is JobState.FAILED
        assert record.reason.startswith("no model of this job is intact, from the initial one to the newest: ")
        assert f"model {newest} is damaged" in record.reason
        assert str(tmp_path) not in record.reason
        assert "Submit another job whose `model` is an export of yours" in record.reason
        assert rounds_of(restarted) == [1]  # nothing was taken back: the record is as it was


async def test_a_rollback_survives_a_kill_right_after_it(tmp_path: Path) -> None:
    stopped, sites = await run_until(tmp_path, 2, rounds=3)
    break_file(stopped, model_after(stopped, 2), "missing")
    async with federation(tmp_path) as (once, _):
        await once.until(lambda e: isinstance(e, events.Waiting))
    async with federation(tmp_path) as (again, _):
        # Still told why nobody but the same survivors will do, though it was another process that rolled back.
        await sites["site-a"].connect(again.driver)
        waiting = await again.until(lambda e: isinstance(e, events.Waiting) and "Missing: site-b, site-c." in e.detail)
        assert isinstance(waiting, events.Waiting)
        assert "round 2 rolled back" in waiting.detail
        for name in ("site-b", "site-c"):
            await sites[name].connect(again.driver)
        record = await again.until_ended()
        assert (record.state, record.rolled_back) == (JobState.COMPLETED, 1)


@pytest.mark.parametrize("how", ["missing", "damaged"])
async def test_a_model_damaged_while_the_job_runs_is_found_and_rolled_back(tmp_path: Path, how: str) -> None:
    _, sites = await run_until(tmp_path, 1, rounds=2)
    async with federation(tmp_path) as (restarted, _):
        await sites["site-a"].connect(restarted.driver)
        await restarted.until(lambda e: isinstance(e, events.Waiting))
        break_file(restarted, restarted.record().current_model, how)
        if how == "damaged":  # sites find out: what they fetch is not what the plan names
            for site in sites.values():
                site.silent = {AdvertiseKeys}
        for name in ("site-b", "site-c"):
            await sites[name].connect(restarted.driver)
        if how == "damaged":
            for site in sites.values():
                await site.until_heard(OpenSession, count=3)
                site.silent = set()
            await asyncio.gather(*(s.say(Decline(DeclineCode.WRONG_MODEL, "not the digest")) for s in sites.values()))
        record = await restarted.until_ended()
        assert (record.state, record.rolled_back) == (JobState.COMPLETED, 1)
        np.testing.assert_allclose(model_of(restarted, record.current_model), 2 * mean_update(THREE), atol=1e-4)


class BreakingWorker(InlineWorker):
    """Damages the model that the `count`th sum is to be added to, right before that."""

    coordinator: LocalCoordinator
    count = 2

    async def call(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        if function.__name__ == "release":
            self.count -= 1
            if self.count == 0:
                break_file(self.coordinator, self.coordinator.record().current_model, "damaged")
        return await super().call(function, *args, **kwargs)


async def test_a_model_damaged_when_the_next_one_is_made_from_it_is_found_and_rolled_back(tmp_path: Path) -> None:
    worker = BreakingWorker()
    async with federation(tmp_path, THREE, worker=worker) as (coordinator, sites):
        worker.coordinator = coordinator
        coordinator.add_job(rounds=2)
        await connect_all(coordinator, sites)
        record = await coordinator.until_ended()
        assert (record.state, record.rolled_back) == (JobState.COMPLETED, 1)
        np.testing.assert_allclose(model_of(coordinator, record.current_model), 2 * mean_update(THREE), atol=1e-4)


async def test_a_job_that_was_rolled_back_says_so_to_whoever_looks_at_it(tmp_path: Path) -> None:
    stopped, _ = await run_until(tmp_path, 2, rounds=3)
    break_file(stopped, model_after(stopped, 2), "missing")
    async with federation(tmp_path) as (restarted, _):
        await restarted.until(lambda e: isinstance(e, events.Waiting))
        desk = JobDesk(store=restarted.store, models=restarted.models, board=EventBoard(), max_model_bytes=1)
        details = desk.details("job-1")
    assert (details.job.state, details.job.rounds_committed, details.job.rounds_total) == ("running", 1, 3)
    assert details.job.reason.startswith("round 2 rolled back to the model of round 1")
    assert [r.round_number for r in details.rounds] == [1]
    assert [(a.outcome, a.reason) for a in details.attempts if a.round_number == 2] == [
        ("rolled-back", details.job.reason)
    ]
