"""Services whose world fails: disks that are full or read-only, no descriptors left, and ends that somebody waits for.

What counts as failure: an error without its file and its remedy, a traceback, something committed that is gone, a
service that needs a hand once the cause is mended, a process that outlives its bound.
"""

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
from tests.e2e.services import MASKWORK, PATIENCE_S, SITES, Service, World, descendants, spec
from tests.small_disk import SmallDisk, small_disk

from maskwork import job_events as events
from maskwork.errors import UserError
from maskwork.stopping import STOP_WITHIN_S
from maskwork.tensors import Schema, TensorSpec, write_model

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("services")]
THREE = SITES[:3]
FEW = 9
"""Descriptors: enough to load the program, too few for its event loop."""


@pytest_asyncio.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A federation that nobody has started yet."""
    world = World(tmp_path)
    await world.gate.open()
    try:
        yield world
    finally:
        await world.close()


async def started(world: World, *sites: str) -> None:
    await world.start_coordinator()
    for site in sites:  # one after the other: each loads torch
        await (await world.start_site(site)).logged("connected")


# --- storage --------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(world: World) -> Iterator[SmallDisk]:
    """The coordinator's whole state directory on a small disk."""
    with small_disk(
        world.home / "coordinator-state", megabytes=320
    ) as mounted:  # more than is kept free of submissions
        yield mounted


async def test_a_full_disk_at_the_coordinator_is_said_waited_for_and_nothing_is_lost(
    world: World, disk: SmallDisk
) -> None:
    await started(world, "site-a", "site-b")
    async with world.job("full", rounds=2, sites=THREE) as watch:
        await watch.until(lambda e: isinstance(e, events.Waiting) and "2 of the 3" in e.detail)
        disk.fill_but(1 << 20)  # too little for a round, enough for rows
        await world.start_site("site-c")
        waiting = await watch.until(lambda e: isinstance(e, events.Waiting) and "the disk is full" in e.detail)
        assert isinstance(waiting, events.Waiting)
        assert str(disk.root / "sessions") in waiting.detail
        assert "a round needs" in waiting.detail
        async with world.client() as client:
            with pytest.raises(UserError, match="has no room for this model"):
                await client.submit(spec("too-big", sites=THREE), big_model(world))
            assert len(await client.list_jobs()) == 1  # the job that could not be stored is not there by half
        assert not list((disk.root / "models").glob(".incoming-*"))
        disk.empty()
        assert (await watch.ended()).state == "completed"  # by itself
        details = await world.details(watch.job_id)
    assert [(a.round_number, a.attempt, a.outcome) for a in details.attempts] == [
        (1, 1, "committed"),
        (2, 1, "committed"),
    ]
    assert await world.coordinator.terminate() == 0
    world.coordinator.assert_clean()


def big_model(world: World) -> Path:
    path = world.home / "big.safetensors"
    size = 1 << 20  # four megabytes
    write_model(path, Schema((TensorSpec("weight", "F32", (1, size)),)), np.zeros(size, np.float32), {})
    return path


async def test_a_database_without_room_ends_the_coordinator_with_one_line_and_it_goes_on_when_started_again(
    world: World, disk: SmallDisk
) -> None:
    await started(world, "site-a", "site-b")
    async with world.job("no-rows", rounds=1, sites=THREE) as watch:
        await watch.until(lambda e: isinstance(e, events.Waiting) and "2 of the 3" in e.detail)
        disk.fill()
        async with world.client() as client:
            with contextlib.suppress(UserError):  # the abort is a row; it cannot be written
                await client.abort(watch.job_id)
        ended = world.coordinator
        assert await ended.wait() == 1
        told = [e["event"] for e in ended.lines if "unstructured" in e]
        assert len(told) == 1, ended.text
        (line,) = told
        assert line.startswith(f"error: {disk.root / 'coordinator.sqlite'}: the disk is full")
        assert "Free some space" in line
        disk.empty()
        await started(world, "site-c")
        assert (await watch.ended()).state == "completed"


@pytest.mark.parametrize("group", ["coordinator", "participant"])
async def test_a_read_only_state_directory_is_named_at_the_start(world: World, group: str) -> None:
    with small_disk(world.home / "read-only") as mounted:
        mounted.remount("ro")
        if group == "coordinator":
            config = world.coordinator_config(state="read-only")
        else:
            config = world.site_config("site-a", state="read-only")
        service = await world.start("read-only", group, config)
        assert await service.wait() == 1
        (line,) = [e["event"] for e in service.lines if "unstructured" in e]
        assert line.startswith(f"error: {mounted.root}/")
        assert "read-only" in line
        assert "mount its file system writable" in line


async def test_without_descriptors_a_coordinator_says_which_limit_to_raise(world: World) -> None:
    config = world.coordinator_config()
    done = await asyncio.to_thread(
        subprocess.run,
        ["/bin/sh", "-c", f"ulimit -n {FEW}; exec {MASKWORK} coordinator run --config {config}"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 1
    assert "as many files open as it may" in done.stderr
    assert "LimitNOFILE" in done.stderr


# --- ends -----------------------------------------------------------------------------------------------------------


async def test_a_drain_ends_in_time_with_training_running_peers_stuck_and_more_signals_arriving(world: World) -> None:
    await started(world, *SITES)
    world.gate.held = {"site-a"}
    async with world.job("stuck") as watch:
        await world.gate.reached("site-a")
        await watch.answered("masked-update", "site-b", "site-c", "site-d")
        for site in ("site-b", "site-c"):
            world.sites[site].send(signal.SIGSTOP)
        began = time.monotonic()
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            world.coordinator.send(number)
        assert await world.coordinator.wait() == 0
        assert time.monotonic() - began < STOP_WITHIN_S
        world.coordinator.assert_clean()
        # A site in training whose coordinator is gone, and another that only now hears anything.
        began = time.monotonic()
        assert await world.sites["site-a"].terminate() == 0
        assert await world.sites["site-b"].terminate() == 0
        assert time.monotonic() - began < STOP_WITHIN_S
        await world.gate.left("site-a")


async def test_a_site_ends_in_time_though_its_coordinator_is_stopped(world: World) -> None:
    await started(world, *THREE)
    world.gate.held = {"site-a"}
    async with world.job("deaf", sites=THREE):
        await world.gate.reached("site-a")
        world.coordinator.send(signal.SIGSTOP)
        began = time.monotonic()
        world.sites["site-a"].send(signal.SIGINT)
        assert await world.sites["site-a"].terminate() == 0
        assert time.monotonic() - began < STOP_WITHIN_S
        world.coordinator.send(signal.SIGCONT)


async def test_a_coordinator_drained_after_asking_for_unmasking_resumes_that_session(world: World) -> None:
    await started(world, *SITES)
    world.gate.held = {"site-d"}
    async with world.job("drained-late") as watch:
        await watch.answered("masked-update", "site-a", "site-b", "site-c")
        await world.gate.reached("site-d")
        world.sites["site-a"].send(signal.SIGSTOP)  # has uploaded; will not sign for now
        world.gate.release("site-d")
        await watch.answered("consistency-check", "site-b", "site-c", "site-d")
        world.sites["site-d"].send(signal.SIGSTOP)  # has signed; what is asked next, it will not hear
        world.sites["site-a"].send(signal.SIGCONT)
        await watch.answered("unmask", "site-a", "site-b", "site-c")
        assert await world.coordinator.terminate() == 0
        world.sites["site-d"].send(signal.SIGCONT)
        restarted = await world.start_coordinator()
        await restarted.logged("session resumed", job=watch.job_id)
        assert (await watch.ended()).state == "completed"
        details = await world.details(watch.job_id)
    assert [(a.attempt, a.outcome) for a in details.attempts] == [(1, "committed")]


BUSY = """
import asyncio
from maskwork.stopping import Stop

async def main():
    Stop(within_s=0.2)
    print("ready", flush=True)
    while True:  # a loop that never comes round again
        pass

asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_service_whose_loop_is_busy_ends_in_time_all_the_same(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.wait(PATIENCE_S) == 0


@pytest.mark.parametrize("who", ["coordinator", "site-a"])
async def test_nothing_outlives_a_service_that_was_killed_in_the_middle_of_a_round(world: World, who: str) -> None:
    await started(world, *THREE)
    world.gate.held = {"site-a"}
    async with world.job("orphans", rounds=2, sites=THREE) as watch:
        await world.gate.reached("site-a")
        world.gate.release("site-a")
        world.gate.held = {"site-a"}  # again, in the second round
        await watch.committed(1)  # so that the coordinator has its worker too
        await world.gate.reached("site-a")
        service: Service = world.coordinator if who == "coordinator" else world.sites[who]
        family = descendants(service.process.pid)
        assert len(family) >= 3  # itself, the fork server, the worker
        watching = [os.pidfd_open(pid) for pid in family[1:]]
        await service.kill()
        for descriptor in watching:
            await asyncio.wait_for(asyncio.to_thread(ended, descriptor), PATIENCE_S)
            os.close(descriptor)


def ended(descriptor: int) -> None:
    readable, _, _ = select.select([descriptor], [], [], PATIENCE_S)
    assert readable, "it outlives its parent"
