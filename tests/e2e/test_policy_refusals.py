"""A site's refusal with real processes: what the operator reads, what the job says, what the site has on record.

What counts as failure: a sum that a site's policy refuses, a refusal that is not readable in its own words at every
surface, a traceback, an exit code other than the one named. Nothing here waits for time to pass.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from tests.e2e.services import MASKWORK, PATIENCE_S, SITES, World

from maskwork import job_events as events
from maskwork.net.identity import Role

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module"), pytest.mark.xdist_group("services")]

POLICIES = {
    "site-a": 'trusted_participants = ["site-d"]\nmin_trusted_survivors = 1\n',
    "site-b": "min_cohort = 5\n",
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """Four sites; site-a wants site-d in every sum, site-b wants a cohort of five."""
    world = World(tmp_path_factory.mktemp("ward"))
    await world.gate.open()
    try:
        await world.start_coordinator()
        for site in SITES:
            changes = {"policy": f"{site}.policy.toml"} if site in POLICIES else {}
            if site in POLICIES:
                (world.home / f"{site}.policy.toml").write_text("min_weight_cap = 1\n" + POLICIES[site])
            config = world.site_config(site, **changes)
            world.sites[site] = await world.start(site, "participant", config)
        await asyncio.gather(*(world.sites[site].logged("connected") for site in SITES))
        yield world
    finally:
        await world.close()


async def maskwork(world: World, *words: str | Path) -> tuple[int, str]:
    """Run a command as a researcher: its exit code and what it printed."""
    files = world.identity(Role.RESEARCHER, "someone")
    environment = {"MASKWORK_COORDINATOR": world.address, "MASKWORK_IDENTITY": str(files.cert.parent)}
    process = await asyncio.create_subprocess_exec(
        MASKWORK, *map(str, words), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, env=environment
    )
    out, _ = await asyncio.wait_for(process.communicate(), PATIENCE_S)
    assert process.returncode is not None
    return process.returncode, out.decode()


async def test_a_round_goes_on_without_a_site_that_declined_and_everybody_reads_why(world: World) -> None:
    async with world.job("without-b") as watch:
        committed = await watch.committed(1)
        assert (committed.survivors, committed.dropouts) == (("site-a", "site-c", "site-d"), ("site-b",))
        await watch.ended()
        _, watched = await maskwork(world, "job", "watch", watch.job_id)
        code, shown = await maskwork(world, "job", "show", watch.job_id)
    assert code == 0
    assert "round 1, attempt 1: site-b declined: cohort 4 < 5" in shown
    drops = [e for e in watch.events if isinstance(e, events.Dropped)]
    assert [(e.participant, e.reason, e.detail) for e in drops] == [
        ("site-b", "declined", "cohort-too-small: cohort 4 < 5")
    ]
    line = await world.coordinator.logged("participant dropped", participant="site-b")
    assert line["said"] == "site-b declined: cohort 4 < 5"
    assert "completed" in watched


async def test_a_job_that_cannot_do_without_a_site_waits_and_says_who_declined_and_why(world: World) -> None:
    said = "3 of the 4 sites needed are ready; site-b declined: cohort 4 < 5"
    async with world.job("needs-b", rounds=2, minimum=4) as watch:
        watching = asyncio.create_task(maskwork(world, "job", "watch", watch.job_id))
        await watch.until(lambda e: isinstance(e, events.Waiting) and e.detail == said)
        _, shown = await maskwork(world, "job", "show", watch.job_id)
        assert f"running: waiting: {said}" in shown
        await maskwork(world, "job", "abort", watch.job_id)
        code, watched = await watching
    assert code == 1
    assert f"waiting: {said}" in watched


async def test_the_site_has_the_plan_on_record_and_its_owner_sees_which_rule_it_broke(
    world: World, tmp_path: Path
) -> None:
    """While the agent runs."""
    state, policy = world.home / "state-site-b", world.home / "site-b.policy.toml"
    code, listed = await maskwork(world, "participant", "plans", "--state", state)
    assert code == 0
    (line, *_) = [line for line in listed.splitlines() if "without-b" in line]
    assert line.rstrip().endswith("declined: cohort 4 < 5")
    _, plan = await maskwork(world, "participant", "plans", "--state", state, "--json", line.split()[0])
    (tmp_path / "plan.json").write_text(plan)
    check = ("participant", "check-policy", tmp_path / "plan.json", "--policy", policy, "--state", state)
    code, explained = await maskwork(world, *check)
    assert (code, explained.splitlines()[-1]) == (1, "would decline: cohort 4 < 5")
    policy_of_others = world.home / "policy.toml"
    code, _ = await maskwork(world, "participant", "check-policy", tmp_path / "plan.json", "--policy", policy_of_others)
    assert code == 0


async def test_a_site_whose_trusted_member_is_lost_signs_nothing_and_says_so(world: World) -> None:
    assert await world.sites["site-b"].terminate() == 0
    await (await world.start_site("site-b")).logged("connected")  # under the policy of the others, this time
    world.gate.held = {"site-d"}
    said = "site-a withdrew: trusted survivors verified here 0 < 1"
    async with world.job("without-d") as watch:
        watching = asyncio.create_task(maskwork(world, "job", "watch", watch.job_id))
        await watch.answered("masked-update", "site-a", "site-b", "site-c")
        await world.gate.reached("site-d")
        await world.sites["site-d"].kill()
        world.gate.release("site-d")
        dropped = await watch.until(lambda e: isinstance(e, events.Dropped) and e.participant == "site-a")
        assert isinstance(dropped, events.Dropped)
        assert (dropped.stage, dropped.reason) == ("consistency-check", "withdrew")
        await watch.until(lambda e: isinstance(e, events.AttemptAborted))  # the other two are fewer than t
        await maskwork(world, "job", "abort", watch.job_id)
        code, watched = await watching
        _, shown = await maskwork(world, "job", "show", watch.job_id)
        assert not [e for e in watch.events if isinstance(e, events.RoundCommitted)]
    assert code == 1
    assert f"round 1: {said}" in watched
    assert f"round 1, attempt 1: {said}" in shown
    for service in world.all:
        service.assert_clean()
