"""Audit logs of real processes over loopback: heads kept by sites, a fork refused and told, and what an auditor may do.

The coordinator that forks its history is production's own, started again from an older copy of its state directory:
what an operator does who restores a backup, and what one does who wants something not to have happened.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from tests.e2e.services import MASKWORK, SITES, World, spec

from maskwork.audit.lines import Entry, decode_line
from maskwork.audit.log import read_lines
from maskwork.audit.reading import judge
from maskwork.audit.records import HeadKept, HistoryRefused, Operator, PlanDeclined
from maskwork.audit_client import fetch, last_record_at
from maskwork.errors import UserError
from maskwork.net.identity import Role

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module"), pytest.mark.xdist_group("audit")]

WHOLE = ("site-a", "site-b", "site-c", "site-d")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """A coordinator and four sites after one job of two rounds."""
    world = World(tmp_path_factory.mktemp("audited"))
    await world.gate.open()
    try:
        await world.start_coordinator()
        for site in SITES:
            await world.start_site(site)
        async with world.job("first", rounds=2) as watch:
            assert (await watch.ended()).state == "completed"
        yield world
    finally:
        await world.close()


def site_log(world: World, site: str) -> Path:
    return world.home / f"state-{site}" / "audit.log"


def entries(path: Path) -> list[Entry]:
    """What is in a log at this moment; the last line may be half written."""
    return [decode_line(line) for line in read_lines(path) if line.endswith(b"\n")]


def of(path: Path, kind: type) -> list[Entry]:
    return [entry for entry in entries(path) if isinstance(entry.record, kind)]


async def maskwork(*arguments: str | Path) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        MASKWORK,
        *map(str, arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


async def fetched(world: World, out: Path, *, role: Role = Role.AUDITOR) -> tuple[int, int]:
    files = world.identity(role, "eve")
    return await asyncio.to_thread(fetch, world.address, files, out, now=time.time())


async def test_an_auditor_fetches_a_log_that_verifies_against_every_site(world: World, tmp_path: Path) -> None:
    out, ca = tmp_path / "coordinator.log", world.identity(Role.AUDITOR, "eve").ca
    had, added = await fetched(world, out)
    assert (had, out.stat().st_size) == (0, added)
    against = [word for site in SITES for word in ("--against", site_log(world, site))]
    code, said = await maskwork("audit", "verify", out, "--ca", ca, *against, "--json")
    told = json.loads(said)
    assert (code, told["good"], told["problems"]) == (0, True, [])
    assert sorted(told["compared_with"]) == sorted(SITES)
    assert told["owner"] == "spiffe://ward/coordinator/main"

    forged = tmp_path / "forged.log"
    lines = out.read_bytes().splitlines(keepends=True)
    at = next(entry.index for entry in entries(out) if entry.kind == "committed")
    forged.write_bytes(b"".join(lines).replace(b'"examples":40.0', b'"examples":41.0', 1))
    code, said = await maskwork("audit", "verify", forged, "--ca", ca)
    assert code == 1
    assert f"record {at} (committed): altered" in said


async def test_every_site_keeps_a_head_before_it_answers(world: World) -> None:
    for site in SITES:
        kinds = [entry.kind for entry in entries(site_log(world, site))]
        assert kinds.count("head-kept") == kinds.count("plan") >= 2
        for entry in of(site_log(world, site), HeadKept):
            # Signed sets come after: nothing of a session is signed before its head is on the disk.
            signed = [e.index for e in entries(site_log(world, site)) if e.kind == "sets-signed"]
            assert [i for i in signed if i > entry.index]


async def test_fetching_again_goes_on_where_the_file_ends(world: World, tmp_path: Path) -> None:
    out = tmp_path / "coordinator.log"
    await fetched(world, out)
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:5]))
    had, _ = await fetched(world, out, role=Role.OPERATOR)
    assert had == len(b"".join(lines[:5]))
    assert out.read_bytes().startswith(whole)
    out.write_bytes(whole + b"x" * (1 << 20))
    with pytest.raises(UserError, match="the coordinator's log is shorter"):
        await fetched(world, out)


async def test_nothing_is_appended_to_what_is_no_log_of_this_coordinator(world: World, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.log", tmp_path / "coordinator.log"
    await fetched(world, whole)
    lines = whole.read_bytes().splitlines(keepends=True)
    another = lines[4].replace(b'"head":"', b'"head":"0', 1)
    for there in (b"".join(lines[:4]) + another, b"a note\n", b"a note", site_log(world, "site-a").read_bytes()[:2000]):
        out.write_bytes(there)
        with pytest.raises(UserError, match=f"{out} is not a log of the coordinator at {world.address}"):
            await fetched(world, out)
        assert out.read_bytes() == there
    out.write_bytes(b"".join(lines[:5]) + lines[5][:70])  # a fetch that broke off
    assert (await fetched(world, out))[0] == out.read_bytes().index(lines[5]) + 70
    assert out.read_bytes().startswith(whole.read_bytes())


@pytest.mark.parametrize(
    ("lines", "at"),
    [(b"", 0), (b"a", 0), (b"a\n", 0), (b"a\nb", 0), (b"a\nbc\n", 2), (b"a\nbc\nd", 2), (b"\n\n", 1)],
)
async def test_a_log_is_gone_on_with_from_its_last_whole_record(lines: bytes, at: int, tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(lines)
    assert last_record_at(tmp_path / "log") == at


@pytest.mark.parametrize("role", [Role.PARTICIPANT, Role.RESEARCHER, Role.COORDINATOR])
async def test_nobody_else_may_read_the_log(role: Role, world: World, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="to operators and auditors only"):
        await fetched(world, tmp_path / "log", role=role)


async def test_an_auditor_reads_everything_and_changes_nothing(world: World, tmp_path: Path) -> None:
    async with world.client(Role.AUDITOR) as auditor:
        (job,) = await auditor.list_jobs()
        assert (await auditor.get(job.job_id)).job.job_id == job.job_id
        assert [event async for event in auditor.watch(job.job_id)]
        model = await auditor.export(job.job_id, tmp_path / "m.safetensors")
        assert model.digest == job.model_digest
        with pytest.raises(UserError, match="may not do this"):
            await auditor.submit(spec("forbidden"), world.model())
        with pytest.raises(UserError, match="may not do this"):
            await auditor.abort(job.job_id)
    await fetched(world, tmp_path / "log")
    asked = [e.record for e in of(tmp_path / "log", Operator)]
    assert [(o.action, o.by) for o in asked if isinstance(o, Operator)] == [
        ("submit", "spiffe://ward/researcher/someone"),
        ("export", "spiffe://ward/auditor/someone"),
    ]


async def test_a_report_says_what_was_found(world: World, tmp_path: Path) -> None:
    log, ca = tmp_path / "coordinator.log", world.identity(Role.AUDITOR, "eve").ca
    await fetched(world, log)
    sites = [word for site in SITES[:2] for word in ("--site-log", site_log(world, site))]
    page, data = tmp_path / "report.html", tmp_path / "report.json"
    code, said = await maskwork(
        "audit", "report", "first", "--log", log, "--ca", ca, *sites, "--out", page, "--json", data
    )
    assert code == 0, said
    told = json.loads(data.read_text())
    assert {claim["outcome"] for claim in told["claims"]} == {"holds"}
    assert told["final_model"] == told["rounds"][-1]["model_out"]
    assert [m["name"] for m in told["members"]] == list(SITES)
    left = {site["site"]: site for site in told["left"]}
    assert left["site-a"]["sessions"] == 2
    assert left["site-a"]["bytes_by_kind"]["update"] > 0
    assert "the plans" in left["site-d"]["source"]


@pytest.mark.timeout(900)  # two restarts of the coordinator, one of each site, four jobs
async def test_a_forked_coordinator_is_refused_and_told_and_goes_on_once_the_operator_accepts(
    world: World, tmp_path: Path
) -> None:
    """Last in this module: the federation's history is another one afterwards."""
    assert await world.coordinator.terminate() == 0
    backup = tmp_path / "backup"
    shutil.copytree(world.home / "coordinator-state", backup)
    await world.start_coordinator()
    async with world.job("second") as watch:
        assert (await watch.ended()).state == "completed"
    assert await world.coordinator.terminate() == 0
    real = tmp_path / "real.log"
    shutil.copy(world.home / "coordinator-state" / "audit.log", real)

    shutil.rmtree(world.home / "coordinator-state")
    shutil.copytree(backup, world.home / "coordinator-state")
    marks = {site: len(world.sites[site].lines) for site in SITES}
    await world.start_coordinator()
    async with world.job("third") as watch:
        told = {}
        for site in SITES:
            told[site] = await world.sites[site].logged("the coordinator shows another history", since=marks[site])
            await world.coordinator.logged("participant dropped", participant=site, reason="declined")
        details = await world.details(watch.job_id)
        assert {d.participant for d in details.drops} == set(SITES)
        assert all(d.detail.startswith("audit: ") for d in details.drops), details.drops

        for site in SITES:  # both signed heads are evidence in the site's own log, with the plan
            refused = of(site_log(world, site), HistoryRefused)[-1].record
            assert isinstance(refused, HistoryRefused)
            assert refused.kept_head != refused.offered_head
            assert refused.kept_size > 0
            assert len(refused.kept_signature) == len(refused.offered_signature) == 64
            declined = of(site_log(world, site), PlanDeclined)[-1].record
            assert isinstance(declined, PlanDeclined)
            assert declined.code == "audit"

        roots = world.authority.roots
        against = judge(world.home / "coordinator-state" / "audit.log", roots, [site_log(world, "site-a")])
        assert any("was shown" in p.what or "cut off" in p.what for p in against.problems), against.problems
        assert any("refused a history" in note for note in against.notes)
        # The log that the sites were shown is good, but for the plan of the fork, which the coordinator signed too.
        true = judge(real, roots, [site_log(world, "site-a")]).problems
        assert {(p.log, p.kind) for p in true} == {("site-a", "plan")}

        for site in SITES:  # the operators were asked, and every one of them accepts
            assert await world.sites[site].terminate() == 0
            said = told[site]["remedy"].rpartition("with ")[2].split()
            code, output = await maskwork(
                *("participant", "accept-history", "--config", world.site_config(site)),
                *(*said, "--reason", "restored from a backup"),
            )
            assert code == 0, output
            await world.start_site(site)
        assert (await watch.ended()).state == "completed"
    log = world.home / "coordinator-state" / "audit.log"
    found = judge(log, world.authority.roots, [site_log(world, site) for site in SITES])
    assert found.problems == []
    assert sum("accepted another history" in note for note in found.notes) == len(SITES)
