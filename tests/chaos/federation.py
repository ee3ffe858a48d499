"""The federation under fire: `World` with five sites, each behind a proxy of its own, and processes that carry a mark.

The mark is in the environment of a process and of everything that it ever starts, so that after a kill the system can
be asked who is left. It breaks nothing by itself; `campaign` does. Not a test itself.
"""

import asyncio
import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.chaos.known_update import CLIP_NORM, SCHEMA, SITES, WEIGHT_CAP, initial_vector
from tests.chaos.proxy import Proxy
from tests.e2e.services import Service, World, descendants

from maskwork.job import Cohort, Deadlines, EncodingSpec, JobSpec
from maskwork.tensors import write_model

COORDINATOR: Final = "coordinator"
MARK: Final = "MASKWORK_CHAOS"
GONE_WITHIN_S: Final = 5.0
LOOK_AGAIN_S: Final = 0.02
ROOT: Final = Path(__file__).resolve().parents[2]


@dataclass(slots=True)
class Life:
    """One process of a service, from its start to its end.

    Attributes:
        service: "coordinator" or a site.
        number: Of this start, from 0, among all starts.
        started_at: Unix time, before the process was started.
        ended_at: Unix time; 0.0 while it lives.
        code: How it ended, as `subprocess` says it; None while it lives.
        killed: Whether the run killed it.
        orphans: Processes that it started and that were still there `GONE_WITHIN_S` after its kill.
    """

    service: str
    number: int
    started_at: float
    ended_at: float = 0.0
    code: int | None = None
    killed: bool = False
    orphans: tuple[int, ...] = ()


class Federation(World):
    """Starts, kills, and starts again."""

    def __init__(self, home: Path) -> None:
        (home / "logs").mkdir(parents=True)
        super().__init__(home, logs=home / "logs")
        self.proxies: dict[str, Proxy] = {}
        self.addresses: dict[str, str] = {}
        self.lives: list[Life] = []
        self.services: dict[str, Service] = {}
        self._life: dict[str, Life] = {}

    async def open(self) -> None:
        """Every site's proxy; no process yet."""
        for site in SITES:
            self.proxies[site] = Proxy(self.port)
            self.addresses[site] = await self.proxies[site].open()

    def task(self, site: str) -> tuple[str, str, dict[str, object]]:
        return "known", "tests.chaos.known_task:Known", {"site": site}

    def model(self) -> Path:
        self.models += 1
        path = self.home / f"initial-{self.models}.safetensors"
        write_model(path, SCHEMA, initial_vector(self.models), {})
        return path

    async def begin(self, name: str) -> Service:
        """Start a service that does not run. It may not be ready yet, and may not live to be."""
        life = Life(name, len(self.lives), time.time())
        self.lives.append(life)
        self._life[name] = life
        group = "coordinator" if name == COORDINATOR else "participant"
        config = (
            self.coordinator_config()
            if name == COORDINATOR
            else self.site_config(name, coordinator=self.addresses[name])
        )
        environment = {"PYTHONPATH": str(ROOT), MARK: self._mark(life)}
        service = self.services[name] = await self.start(name, group, config, environment=environment)
        return service

    async def is_ready(self, name: str) -> bool:
        """Wait until a coordinator that was started answers; not so if it is killed before that."""
        service, life = self.services[name], self._life[name]
        try:
            await service.logged("coordinator ready")
        except AssertionError:
            if not life.killed:
                raise
        return self.services[name] is service and not life.killed

    def runs(self, name: str) -> bool:
        return name in self.services and self.services[name].process.returncode is None

    def send(self, name: str, number: signal.Signals) -> None:
        """A signal to a service, if it runs."""
        if self.runs(name):
            self.services[name].send(number)

    async def end(self, name: str) -> None:
        """SIGKILL a service, and look for what it leaves behind."""
        life, service = self._life[name], self.services[name]
        life.killed = service.process.returncode is None
        if life.killed:
            service.process.kill()
        life.code, life.ended_at = await service.wait(), time.time()
        life.orphans = await self._left_by(life)

    async def drain(self, name: str) -> None:
        """SIGTERM a service that lives, and wait for its end."""
        life, service = self._life[name], self.services[name]
        if service.process.returncode is None:
            await service.terminate()
        life.code, life.ended_at = await service.wait(), time.time()
        life.orphans = await self._left_by(life)

    def workers(self, name: str) -> list[int]:
        """The worker processes of a service: its children are the fork server and its like, theirs are workers."""
        pid = self.services[name].process.pid
        children = {p for p in descendants(pid)[1:] if _parent(p) == pid}
        return [p for p in descendants(pid)[1:] if p not in children]

    def kill_workers(self, name: str) -> int:
        """SIGKILL the worker processes of a service; how many there were."""
        killed = 0
        for pid in self.workers(name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                killed += 1
        return killed

    def job_spec(self, name: str, *, rounds: int) -> JobSpec:
        return JobSpec(
            name=name,
            task="known",
            rounds=rounds,
            max_attempts=1_000_000,
            metrics={"train.loss": 100.0},
            encoding=EncodingSpec(clip_norm=CLIP_NORM, weight_cap=WEIGHT_CAP),
            cohort=Cohort(participants=SITES, min_participants=3, wait_s=2.0),
            deadlines=Deadlines(
                advertise_keys_s=5, share_keys_s=5, masked_update_s=8, consistency_check_s=5, unmask_s=5, reconnect_s=1
            ),
        )

    async def close(self) -> None:
        for proxy in self.proxies.values():
            await proxy.close()
        await super().close()

    def _mark(self, life: Life) -> str:
        return f"{self.home.resolve()}#{life.number}"

    async def _left_by(self, life: Life) -> tuple[int, ...]:
        # Nobody tells of the end of a process that is not one's child, so this looks again until there is none.
        deadline = time.monotonic() + GONE_WITHIN_S
        while (left := marked(self._mark(life))) and time.monotonic() < deadline:
            await asyncio.sleep(LOOK_AGAIN_S)
        return left


def marked(mark: str) -> tuple[int, ...]:
    """Processes that live and carry this mark: one that was started with it, and everything that it started."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended, or is not ours to read
            if wanted in environment.read_bytes().split(b"\0"):
                found.append(int(environment.parent.name))
    return tuple(pid for pid in found if pid != os.getpid() and _alive(pid))


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"  # a zombie has ended; who adopted it has not read that yet


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
