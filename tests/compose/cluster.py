"""The cluster of docker-compose.yml as a test drives it: `make up`, faults by `docker`, a job watched line by line.

Nothing here sleeps: what a test waits for is a line that a researcher would see, for at most `PATIENCE_S`. Every name
is that of a project of its own, so a cluster that somebody runs beside the tests is left alone. Not a test itself.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[2]
PROJECT: Final = "maskwork-test"
PARTICIPANTS: Final = 5
PATIENCE_S: Final = 240.0
LINES_SHOWN: Final = 40
"""Of a command that failed: the build of an image says a lot before."""


def why_no_engine() -> str | None:
    """Why no container can be run here; None when one can."""
    if shutil.which("docker") is None:
        return "no container engine: there is no docker command"
    for command, what in ((["docker", "info"], "no engine answers"), (["docker", "compose", "version"], "no Compose")):
        asked = subprocess.run(command, capture_output=True, text=True, timeout=30)
        if asked.returncode != 0:
            said = (asked.stderr.strip() or asked.stdout.strip()).splitlines()
            return f"no container engine: {what} ({said[-1] if said else 'no word why'})"
    return None


class Cluster:
    """One project of docker-compose.yml."""

    def __init__(self) -> None:
        self.environment = {**os.environ, "COMPOSE_PROJECT_NAME": PROJECT}
        self.up_s = 0.0

    def up(self) -> None:
        self._forget()  # what a run that was killed may have left: volumes of two federations do not fit together
        began = time.monotonic()
        self._run("make", "up", f"PARTICIPANTS={PARTICIPANTS}", timeout_s=600)
        self.up_s = time.monotonic() - began

    def down(self) -> None:
        """What `make down` does, and the volumes too."""
        self._run("make", "down")
        self._forget()

    def _forget(self) -> None:
        self.compose("--profile", "researcher", "down", "--volumes", "--remove-orphans")

    def compose(self, *arguments: str) -> str:
        return self._run("docker", "compose", *arguments)

    def docker(self, *arguments: str) -> str:
        return self._run("docker", *arguments)

    def inspect(self, container: str) -> dict[str, Any]:
        (found,) = json.loads(self.docker("inspect", container))
        assert isinstance(found, dict)
        return found

    def containers(self, service: str) -> list[str]:
        """Ids of a service's containers, those that have ended too, in the order of their number."""
        lines = self.compose("ps", "--all", "--format", "{{.Name}} {{.ID}}", service).splitlines()
        return [line.split()[1] for line in sorted(lines, key=lambda line: int(line.split()[0].rpartition("-")[2]))]

    def site_of(self, container: str) -> str:
        """The site that a replica says it has become, the last time that it began."""
        logged = self._run("docker", "logs", container, also_stderr=True)
        return str(re.findall(r"^this replica is (site-\d+)$", logged, re.MULTILINE)[-1])

    def researcher(self, *arguments: str) -> bytes:
        """Run a researcher's command to its end; what it wrote to standard output."""
        done = subprocess.run(
            ["docker", "compose", "run", "--rm", "--no-TTY", "researcher", *arguments],
            cwd=ROOT, env=self.environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE_S,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    @contextmanager
    def submitted(self, job_file: Path, *, seed: int) -> Iterator[Watched]:
        """Submit a job as the README says, and watch it."""
        job_file.chmod(0o644)  # the container's user is nobody here
        environment = {**self.environment, "MASKWORK_JOB": str(job_file), "MASKWORK_SEED": str(seed)}
        watched = Watched(["docker", "compose", "run", "--rm", "--no-TTY", "researcher", "submit"], environment)
        try:
            yield watched
        finally:
            watched.close()

    def _run(self, *command: str, also_stderr: bool = False, timeout_s: float = PATIENCE_S) -> str:
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=timeout_s,
        )  # fmt: skip
        if done.returncode != 0:
            said = "\n".join((done.stdout + done.stderr).splitlines()[-LINES_SHOWN:])
            raise AssertionError(f"{' '.join(command)} ended with {done.returncode}:\n{said}")
        return done.stdout + done.stderr if also_stderr else done.stdout


class Watched:
    """A job that is watched: every line as it comes."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self.lines: list[str] = []
        self._grew = threading.Condition()
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._grew:
                self.lines.append(line.rstrip())
                self._grew.notify_all()
        with self._grew:
            self._ended = True
            self._grew.notify_all()

    def until(self, pattern: str, *, since: int = 0) -> int:
        """The number of the first line, from line `since` on, in which `pattern` is found."""

        def found() -> Iterator[int]:
            return (at for at in range(since, len(self.lines)) if re.search(pattern, self.lines[at]))

        deadline = time.monotonic() + PATIENCE_S
        with self._grew:
            self._grew.wait_for(lambda: any(True for _ in found()) or self._ended, deadline - time.monotonic())
            at = next(found(), None)
        assert at is not None, f"no line like {pattern!r}, from line {since} on:\n" + "\n".join(self.lines)
        return at

    def wait(self) -> int:
        """Its exit code: the job's verdict."""
        code = self._process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        return code

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
