"""`maskwork job` and `maskwork model export` as processes, against a JobService on loopback with real mTLS."""

import asyncio
import hashlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.jobs import scripted_events as make
from tests.jobs.fake_job_service import FakeJobService, Federation, a_model, serving, summary

from maskwork.job_events import JobDetails, PastAttempt
from maskwork.net.authority import Authority
from maskwork.net.identity import Role

pytestmark = pytest.mark.e2e

PATIENCE_S = 100.0
RUNNING = summary()
COMPLETED = summary(state="completed", committed=2, total=2)
FAILED = summary(state="failed", committed=1, total=2)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return Federation(tmp_path_factory.mktemp("ward"))


@pytest.fixture
def service(federation: Federation) -> FakeJobService:
    return FakeJobService(federation.authority.roots, jobs=[RUNNING])


@pytest.fixture
async def target(federation: Federation, service: FakeJobService) -> AsyncIterator[str]:
    async with serving(federation, service) as address:
        yield address


PROGRAM = """
import sys
from importlib.metadata import EntryPoint
from maskwork.cli import ENTRY_POINT_GROUP, run
points = {name: (EntryPoint(name, f"maskwork.job_commands:{app}", ENTRY_POINT_GROUP),)
          for name, app in (("job", "app"), ("model", "model_app"))}
run(points, sys.argv[1:])
"""


class Shell:
    """Runs `maskwork …` as a process of its own, with the two environment variables set."""

    def __init__(self, target: str, federation: Federation) -> None:
        identity = str(federation.researcher.cert.parent)
        self.environment = {**os.environ, "MASKWORK_COORDINATOR": target, "MASKWORK_IDENTITY": identity}

    async def start(self, *arguments: str | Path) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        words = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
        return await asyncio.create_subprocess_exec(*words, stdout=pipe, stderr=pipe, env=self.environment)

    async def __call__(self, *arguments: str | Path) -> tuple[int, str, str]:
        process = await self.start(*arguments)
        out, err = await asyncio.wait_for(process.communicate(), PATIENCE_S)
        assert process.returncode is not None
        return process.returncode, out.decode(), err.decode()


@pytest.fixture
def maskwork(target: str, federation: Federation) -> Shell:
    return Shell(target, federation)


async def test_submit_and_watch(maskwork: Shell, service: FakeJobService, tmp_path: Path) -> None:
    a_model(tmp_path)
    (tmp_path / "job.toml").write_text('name="digits"\ntask="digits"\nrounds=2\nmodel="m.safetensors"\n')
    service.watches = [[RUNNING, make.committed(1), make.committed(2), COMPLETED]]
    code, out, err = await maskwork("job", "submit", tmp_path / "job.toml", "--watch")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == RUNNING.job_id
    assert "round 2/20 committed: 5 of 5 sites" in lines[-2]
    assert "completed" in lines[-1]
    assert len(service.submitted_model) == (tmp_path / "m.safetensors").stat().st_size


async def test_a_failed_job_is_exit_code_1(maskwork: Shell, service: FakeJobService) -> None:
    service.watches = [[RUNNING, make.committed(1), FAILED]]
    code, out, _ = await maskwork("job", "watch", "digits")
    assert code == 1
    assert "is failed" in out


async def test_ctrl_c_stops_watching_and_not_the_job(maskwork: Shell, service: FakeJobService) -> None:
    service.watches = [[RUNNING, make.committed(1)]]
    service.hold = asyncio.Event()
    process = await maskwork.start("job", "watch", "3f9")
    assert process.stdout is not None
    await asyncio.wait_for(process.stdout.readline(), PATIENCE_S)
    process.send_signal(signal.SIGINT)
    _, err = await asyncio.wait_for(process.communicate(), PATIENCE_S)
    assert process.returncode == 130
    assert err.decode() == "stopped watching; the job goes on. Come back with `maskwork job watch 3f9a1c`\n"
    assert service.aborted == []


async def test_list_and_show(maskwork: Shell, service: FakeJobService) -> None:
    service.jobs = [RUNNING, summary("a81200", name="chest", state="failed")]
    service.details["a81200"] = JobDetails(
        service.jobs[1],
        (make.committed(1),),
        (PastAttempt(2, 1, "aborted", "complaint-upheld", make.T0), PastAttempt(1, 1, "committed", "", make.T0)),
        (make.dropped("north", 2),),
    )
    (code, listed, _), (_, listed_json, _), (code_of_show, shown, _), (_, shown_json, _) = await asyncio.gather(
        maskwork("job", "list"),
        maskwork("job", "list", "--json"),
        maskwork("job", "show", "chest"),
        maskwork("job", "show", "a8", "--json"),
    )
    assert code == code_of_show == 0
    assert [line.split()[:5] for line in listed.splitlines()[1:]] == [
        ["3f9a1c", "digits", "digits", "running", "0/20"],
        ["a81200", "chest", "digits", "failed", "0/20"],
    ]
    assert [job["job_id"] for job in json.loads(listed_json)] == ["3f9a1c", "a81200"]
    assert json.loads(listed_json)[0]["model_digest"] == RUNNING.model_digest.hex()
    for words in ("researcher/ada", "train.loss", "attempt 1 aborted: complaint-upheld", "north is out at masked-upd"):
        assert words in shown
    assert "attempt 1 committed" not in shown
    assert json.loads(shown_json)["rounds"][0]["statistics"]["eval.accuracy"] == 0.875


async def test_abort(maskwork: Shell, service: FakeJobService) -> None:
    service.jobs = [RUNNING, summary("a81200", name="chest", state="completed", committed=20)]
    done, late = await asyncio.gather(maskwork("job", "abort", "3f"), maskwork("job", "abort", "chest"))
    assert done == (0, "digits (3f9a1c) is aborted, 0 of 20 rounds\n", "")
    assert late == (1, "", "error: chest (a81200) is completed already: there is nothing to abort\n")
    assert service.aborted == ["3f9a1c"]


async def test_export_command(maskwork: Shell, federation: Federation, service: FakeJobService, tmp_path: Path) -> None:
    service.model = bytes(range(256)) * 2000
    service.signed = federation.signed(service.model, job_id=RUNNING.job_id, round_number=3)
    code, out, err = await maskwork("model", "export", "digits", "-o", tmp_path / "m.safetensors", "--round", "3")
    assert (code, err) == (0, "")
    assert hashlib.sha256(service.model).hexdigest() in out
    assert (tmp_path / "m.safetensors").read_bytes() == service.model
    assert service.exported_rounds == [3]
    ca = str(federation.researcher.ca)
    code, out, err = await maskwork("model", "verify", tmp_path / "m.safetensors", "--ca", ca)
    assert (code, err) == (0, "")
    assert f"job {RUNNING.job_id}, round 3" in out
    (tmp_path / "m.safetensors").write_bytes(service.model[:-1])
    code, out, err = await maskwork("model", "verify", tmp_path / "m.safetensors", "--ca", ca)
    assert (code, out) == (1, "")
    assert "is not the file that was signed" in err


async def test_a_model_of_a_coordinator_that_does_not_sign_is_told_and_no_older_signature_stays(
    maskwork: Shell, service: FakeJobService, tmp_path: Path
) -> None:
    service.model = bytes(1000)
    (tmp_path / "m.sig").write_text("of a file that was here before")
    code, _, err = await maskwork("model", "export", "digits", "-o", tmp_path / "m")
    assert (code, err.startswith("not signed: ")) == (0, True)
    assert not (tmp_path / "m.sig").exists()


async def test_an_error_is_one_sentence_and_exit_code_1(maskwork: Shell, tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text('name="digits"\ntask="digits"\nrunds=2\nmodel="m.safetensors"\n')
    unknown, misspelt = await asyncio.gather(
        maskwork("job", "watch", "zz"), maskwork("job", "submit", tmp_path / "job.toml")
    )
    assert unknown == (1, "", "error: no job has the id or name 'zz': `maskwork job list` shows the 1 there are\n")
    assert misspelt[0] == 1
    assert "did you mean rounds?" in misspelt[2]


async def test_the_terminal_is_not_littered(
    maskwork: Shell, federation: Federation, service: FakeJobService, tmp_path: Path
) -> None:
    stranger = Authority.create("ward", now=federation.now).issue(Role.RESEARCHER, "ada", now=federation.now)
    files = stranger.write(tmp_path / "stranger")
    code, out, err = await maskwork("job", "list", "--identity", files.cert.parent)
    assert (code, out) == (1, "")
    assert err.startswith("error: cannot connect to localhost")
    assert len(err.splitlines()) == 1
