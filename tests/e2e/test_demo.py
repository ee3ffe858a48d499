"""`maskwork demo` for real: its result in a few rounds, and what is left behind when it is stopped or killed."""

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from maskwork.participant.local.children import Children, ended_text
from maskwork.participant.local.failure import RunFailed
from maskwork.tensors import read_vector

pytestmark = pytest.mark.e2e

COMMAND = [sys.executable, "-P", "-c", "from maskwork.cli import main; main()", "demo"]
GUARDIAN = [sys.executable, "-P", "-m", "maskwork.participant.local.guardian"]
GONE_WITHIN_S = 30.0
FIELDS = {
    "participants",
    "rounds",
    "rounds_committed",
    "dropouts_injected",
    "dropouts_recovered",
    "rejoined",
    "accuracy",
    "max_abs_difference_of_weights",
    "uplink_bytes_per_parameter",
    "round_seconds_median",
    "stage_seconds",
    "model",
}
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); signal.pause()"


@pytest.mark.timeout(400)
def test_a_short_demo_keeps_every_promise(tmp_path: Path) -> None:
    done = subprocess.run([*COMMAND, "--rounds", "6"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    path = tmp_path / done.stdout.splitlines()[-1]
    assert path.parent.parent == tmp_path / "runs"
    summary = json.loads(path.read_text())
    assert set(summary) == FIELDS
    assert (summary["participants"], summary["rounds"], summary["rounds_committed"]) == (5, 6, 6)
    assert (summary["dropouts_injected"], summary["dropouts_recovered"], summary["rejoined"]) == (2, 2, 2)
    assert abs(summary["accuracy"]["masked"] - summary["accuracy"]["plain"]) <= 0.01
    assert min(summary["accuracy"].values()) > 0.85
    assert 3.37 < summary["uplink_bytes_per_parameter"] < 4
    masked, plain = (read_vector(path.parent / "models" / f"{name}.safetensors")[1] for name in ("masked", "plain"))
    assert float(np.abs(masked - plain).max()) == pytest.approx(summary["max_abs_difference_of_weights"])
    assert 0 < summary["max_abs_difference_of_weights"] < 0.1  # equal would mean that nothing was ever encoded
    assert len(list((path.parent / "logs").glob("*.log"))) == 6
    assert not descendants(tmp_path)


@pytest.mark.timeout(200)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_nothing_outlives_the_demo(tmp_path: Path, number: signal.Signals, code: int) -> None:
    # A shell that starts something in the background has it ignore SIGINT, and so would our child.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(
        COMMAND, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if "submitted" in line:
                break
        pids = [pid for pid in descendants(tmp_path) if pid != process.pid]
        assert len(pids) >= 7  # the coordinator, five sites and the guardian, at least
        descriptors = [fd for pid in pids if (fd := opened(pid)) is not None]
        process.send_signal(number)
        said = process.stdout.read() + process.stderr.read()
        assert process.wait() == code
    assert ("stopped" in said) is (number != signal.SIGKILL)
    assert "Traceback" not in said
    assert all(gone(fd) for fd in descriptors)


@pytest.mark.timeout(60)
async def test_a_process_that_ends_on_its_own_is_an_error_at_once(tmp_path: Path) -> None:
    async with Children(tmp_path) as children:
        await children.start("site-x", "participant", "run", "--config", str(tmp_path / "missing.toml"))
        with pytest.raises(RunFailed, match="site-x ended with exit code 1") as caught:
            await children.during(forever())
        assert caught.value.process == "site-x"
    assert "missing.toml" in (tmp_path / "site-x.log").read_text()


async def test_an_error_of_ones_own_comes_first(tmp_path: Path) -> None:
    async with Children(tmp_path) as children:
        with pytest.raises(ZeroDivisionError):
            await children.during(failing())


async def forever() -> None:
    await asyncio.get_running_loop().create_future()


async def failing() -> None:
    raise ZeroDivisionError


@pytest.mark.timeout(20)
@pytest.mark.parametrize("stubborn", [False, True])
def test_the_guardian_ends_who_is_left(stubborn: bool) -> None:
    program = STUBBORN if stubborn else "import signal; print('here', flush=True); signal.pause()"
    children = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) for _ in range(2)]
    try:
        for child in children:
            assert child.stdout is not None
            child.stdout.readline()
        left, ended = children
        with subprocess.Popen(GUARDIAN, stdin=subprocess.PIPE) as guardian:
            assert guardian.stdin is not None
            guardian.stdin.write(f"+{left.pid}\n+{ended.pid}\n-{ended.pid}\n".encode())
            guardian.stdin.close()
            assert guardian.wait() == 0
        assert left.wait() == (-signal.SIGKILL if stubborn else -signal.SIGTERM)
        assert ended.poll() is None, "one that the demo had seen end was signalled all the same"
    finally:
        for child in children:
            child.kill()
            child.communicate()


@pytest.mark.parametrize(
    ("code", "text"),
    [(0, "ended with exit code 0"), (-9, "was ended by SIGKILL"), (-99, "was ended by signal 99")],
)
def test_how_a_process_ended(code: int, text: str) -> None:
    assert ended_text(code) == text


def descendants(folder: Path) -> list[int]:
    """The processes that run in `folder`: the demo, its children and theirs all stay where they were started."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "cwd").readlink() == folder:
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def opened(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def gone(descriptor: int) -> bool:
    """Whether a process ends in time."""
    ready, _, _ = select.select([descriptor], [], [], GONE_WITHIN_S)
    os.close(descriptor)
    return bool(ready)
