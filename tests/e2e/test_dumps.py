"""No core dumps: of the services, and of every worker that they start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.e2e.services import World

from maskwork.dumps import DEBUGGABLE

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel tells of it on Linux alone"),
]

TELL_AT_THE_END = """
import atexit
def tell():
    import resource, sys
    from maskwork.dumps import dumpable
    print("AT THE END", dumpable(), resource.getrlimit(resource.RLIMIT_CORE), file=sys.stderr)
atexit.register(tell)
"""


# In an interpreter of its own: a test before it may have called a command that forbids its process to be dumped.
COMPARE_WITH_A_WORKER = """
import asyncio, resource
from maskwork.dumps import dumpable
from maskwork.worker import WorkerProcess

async def main():
    print(dumpable())
    async with WorkerProcess(name="undumped") as worker:
        print(await worker.call(dumpable), await worker.call(resource.getrlimit, resource.RLIMIT_CORE))

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_a_worker_cannot_be_dumped_although_its_parent_can(tmp_path: Path) -> None:
    program = tmp_path / "compare.py"
    program.write_text(COMPARE_WITH_A_WORKER)
    environment = {**os.environ, DEBUGGABLE: ""}
    ran = subprocess.run(
        [sys.executable, program], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert ran.stdout.splitlines() == ["True", "False (0, 0)"]


@pytest.mark.parametrize("group", ["coordinator", "participant"])
async def test_a_service_cannot_be_dumped_from_its_beginning_to_its_end(tmp_path: Path, group: str) -> None:
    world = World(tmp_path)
    (tmp_path / "sitecustomize.py").write_text(TELL_AT_THE_END)
    environment = {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parent}", DEBUGGABLE: ""}
    config = world.coordinator_config() if group == "coordinator" else world.site_config("site-a")
    service = await world.start("it", group, config, environment=environment)
    try:
        await service.logged("coordinator ready" if group == "coordinator" else "not connected")
        limits = Path(f"/proc/{service.process.pid}/limits").read_text()
        (core,) = (line.split()[4:6] for line in limits.splitlines() if line.startswith("Max core file size"))
        assert core == ["0", "0"]
        assert await service.terminate() == 0
    finally:
        await world.close()
    assert "AT THE END False (0, 0)" in service.text


def test_only_who_asks_for_it_can_debug_a_process() -> None:
    program = "from maskwork.dumps import *; forbid_core_dumps(); print(dumpable())"
    for value, said in (("", "False"), ("0", "False"), ("1", "True")):
        ran = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, DEBUGGABLE: value},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert ran.stdout.strip() == said


@pytest.mark.parametrize("forbidden", [True, False])
def test_a_process_that_crashes_leaves_no_core(tmp_path: Path, forbidden: bool) -> None:
    """And the kernel would have dumped this very process otherwise, unless it dumps none on this machine."""
    program = f"""
import os, resource
hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
os.chdir({str(tmp_path)!r})
from maskwork.dumps import forbid_core_dumps
{forbidden} and forbid_core_dumps()
os.abort()
"""
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", program], {**os.environ, DEBUGGABLE: ""})
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGABRT
    if forbidden:
        assert not os.WCOREDUMP(status)
        assert list(tmp_path.iterdir()) == []
