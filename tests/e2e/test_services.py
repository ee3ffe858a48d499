"""Coordinator and participants as real processes over loopback: kills, restarts, refusals and orderly ends.

What counts as failure: a round that does not commit, a session that is not the one expected, a traceback or an
unstructured line on standard error, an exit code other than the one named. Nothing here waits for time to pass.
"""

import asyncio
import signal
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
from tests.e2e.services import SITES, Watch, World

from maskwork import job_events as events
from maskwork.net.identity import Role
from maskwork.tensors import read_vector

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module"), pytest.mark.xdist_group("services")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """Four sites that were started before their coordinator; they train only what a test's job asks for."""
    world = World(tmp_path_factory.mktemp("ward"))
    await world.gate.open()
    try:
        for site in SITES:
            await world.start_site(site)
        await asyncio.gather(*(world.sites[site].logged("not connected") for site in SITES))
        await world.start_coordinator()
        yield world
    finally:
        await world.close()


async def test_sites_that_started_first_find_their_coordinator_and_a_job_completes(
    world: World, tmp_path: Path
) -> None:
    async with world.job("plain", rounds=2) as watch:
        ended = await watch.ended()
        assert (ended.state, ended.rounds_committed) == ("completed", 2)
        for number in (1, 2):
            committed = await watch.committed(number)
            assert committed.survivors == SITES
            assert committed.statistics == {"examples": 40.0, "train.loss": 0.5}
        async with world.client() as client:
            exported = await client.export(watch.job_id, tmp_path / "m.safetensors")
    assert exported.digest == ended.model_digest
    # Each site adds 0.25, 0.5, 0.75 or 1 to both weights, with equal weights: 0.625 a round.
    np.testing.assert_allclose(read_vector(exported.path)[1], 1.25, atol=1e-5)


async def test_a_site_killed_before_its_upload_is_a_dropout_and_comes_back(world: World) -> None:
    world.gate.held = {"site-d"}
    async with world.job("before-upload", rounds=2) as watch:
        await watch.stage("masked-update")
        await watch.answered("masked-update", "site-a", "site-b", "site-c")
        await world.gate.reached("site-d")
        await world.sites["site-d"].kill()
        world.gate.release("site-d")
        first = await watch.committed(1)
        assert (first.survivors, first.dropouts) == (SITES[:3], ("site-d",))
        await world.start_site("site-d")
        assert (await watch.committed(2)).survivors == SITES
        details = await world.details(watch.job_id)
    assert [(d.round_number, d.participant, d.reason) for d in details.drops] == [(1, "site-d", "disconnected")]
    assert [a.outcome for a in details.attempts] == ["committed", "committed"]


async def test_a_site_killed_between_upload_and_unmasking_stays_in_the_sum(world: World) -> None:
    world.gate.held = {"site-a"}
    async with world.job("after-upload", rounds=2) as watch:
        await watch.answered("masked-update", "site-b", "site-c", "site-d")
        await world.gate.reached("site-a")
        await world.sites["site-c"].kill()
        world.gate.release("site-a")
        # Its update is in and counts: U3 holds it, and the other three hold enough shares of its self mask.
        assert (await watch.committed(1)).survivors == SITES
        await world.start_site("site-c")
        assert (await watch.committed(2)).survivors == SITES


async def test_a_coordinator_killed_before_unmasking_opens_a_new_attempt(world: World) -> None:
    world.gate.held = {"site-b"}
    async with world.job("killed-early") as watch:
        await watch.answered("masked-update", "site-a", "site-c", "site-d")
        await world.gate.reached("site-b")
        await world.coordinator.kill()
        world.gate.release("site-b")
        restarted = await world.start_coordinator()
        assert (await watch.ended()).state == "completed"
        details = await world.details(watch.job_id)
    assert [(a.attempt, a.outcome) for a in details.attempts] == [(1, "abandoned"), (2, "committed")]
    assert details.rounds[0].survivors == SITES
    assert not [e for e in restarted.lines if e["event"] == "session resumed"]


async def hold_at_unmasking(world: World, watch: Watch) -> None:
    """Bring a session to where unmasking was asked for and one site, stopped, has signed but not answered."""
    await watch.answered("masked-update", "site-a", "site-b", "site-c")
    await world.gate.reached("site-d")
    world.sites["site-a"].send(signal.SIGSTOP)  # has uploaded; will not sign for now
    world.gate.release("site-d")
    await watch.answered("consistency-check", "site-b", "site-c", "site-d")
    world.sites["site-d"].send(signal.SIGSTOP)  # has signed; what is asked next, it will not hear
    world.sites["site-a"].send(signal.SIGCONT)
    await watch.answered("unmask", "site-a", "site-b", "site-c")


async def test_a_coordinator_killed_after_asking_for_unmasking_resumes_that_session(world: World) -> None:
    world.gate.held = {"site-d"}
    async with world.job("killed-late") as watch:
        await hold_at_unmasking(world, watch)
        with sqlite3.connect(world.home / "coordinator-state" / "coordinator.sqlite") as database:
            ((session,),) = database.execute("select session_id from resume").fetchall()
        await world.coordinator.kill()
        world.sites["site-d"].send(signal.SIGCONT)
        restarted = await world.start_coordinator()
        await restarted.logged("session resumed", job=watch.job_id)
        assert (await watch.ended()).state == "completed"
        details = await world.details(watch.job_id)
    assert [(a.attempt, a.outcome) for a in details.attempts] == [(1, "committed")]
    assert details.rounds[0].survivors == SITES
    opened = [e for e in watch.events if isinstance(e, events.AttemptOpened)]
    assert {e.session_id for e in opened} == {session}


async def test_a_task_that_raises_is_a_withdrawal_and_its_site_is_asked_again(world: World) -> None:
    world.gate.held = {"site-b"}
    async with world.job("raises", rounds=2) as watch:
        await world.gate.reached("site-b")
        world.gate.release("site-b", b"!")
        assert (await watch.committed(1)).dropouts == ("site-b",)
        assert (await watch.committed(2)).survivors == SITES
        details = await world.details(watch.job_id)
    assert [(d.participant, d.reason, d.detail) for d in details.drops] == [("site-b", "withdrew", "training-failed")]
    said = await world.sites["site-b"].logged("session aborted", reason="training-failed")
    assert "the data is gone" in said["detail"]


async def test_an_aborted_job_ends_the_training_at_every_site(world: World) -> None:
    world.gate.held = set(SITES)
    async with world.job("aborted") as watch, world.client(Role.OPERATOR) as operator:
        for site in SITES:
            await world.gate.reached(site)
        assert (await operator.abort(watch.job_id)).state == "aborted"
        assert (await watch.ended()).reason == "aborted by spiffe://ward/operator/someone"
        for site in SITES:
            await world.gate.left(site)
    world.gate.held = set()
    async with world.job("after-the-aborted-one") as watch:
        assert (await watch.ended()).state == "completed"


async def test_the_orderly_end_of_a_site_is_told_not_waited_for(world: World) -> None:
    world.gate.held = {"site-d"}
    async with world.job("leaves", rounds=1) as watch:
        await world.gate.reached("site-d")
        await watch.stage("masked-update")
        leaving = world.sites["site-d"]
        assert await leaving.terminate() == 0
        world.gate.release("site-d")
        leaving.assert_clean()
        assert (await watch.committed(1)).dropouts == ("site-d",)
        details = await world.details(watch.job_id)
    assert [(d.participant, d.reason, d.detail) for d in details.drops] == [("site-d", "withdrew", "cancelled")]
    await world.start_site("site-d")


async def test_everybody_ends_in_order_in_the_middle_of_a_round(world: World) -> None:
    world.gate.held = {"site-a"}
    async with world.job("drained") as watch:
        await world.gate.reached("site-a")
        await watch.answered("masked-update", "site-b", "site-c", "site-d")
        assert await world.coordinator.terminate() == 0
        await world.gate.left("site-a")  # it was told
        codes = await asyncio.gather(*(world.sites[site].terminate() for site in SITES))
        assert codes == [0, 0, 0, 0]
    for service in world.all:
        service.assert_clean()
