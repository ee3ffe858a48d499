"""A federation of real processes on loopback: certificates, configurations, logs, and a gate on every training.

Nothing here sleeps: what a test waits for is a line of a log, an event of a watched job or a site at the gate, each
for at most `PATIENCE_S`. Not a test itself.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from maskwork import job_events as events
from maskwork.job import Cohort, Deadlines, EncodingSpec, JobSpec
from maskwork.jobs_client import JobsClient
from maskwork.net.authority import Authority
from maskwork.net.identity import IdentityFiles, Role
from maskwork.tensors import Schema, TensorSpec, write_model

PATIENCE_S = 100.0
MASKWORK = Path(sys.executable).parent / "maskwork"
SITES = ("site-a", "site-b", "site-c", "site-d")

Line = dict[str, Any]


class Service:
    """One process of ours, with every line that it logged, kept in a file as well if there is a `log`."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path | None = None) -> None:
        self.name, self.process = name, process
        self.lines: list[Line] = []
        self._log: BinaryIO | None = None if log is None else log.open("xb", buffering=0)
        self._grew = asyncio.Condition()
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def start(
        cls, name: str, *arguments: str, environment: dict[str, str] | None = None, log: Path | None = None
    ) -> "Service":
        with open(os.devnull if log is None else log.with_suffix(".out"), "wb") as stdout:
            process = await asyncio.create_subprocess_exec(
                MASKWORK,
                *arguments,
                stdout=stdout,
                stderr=asyncio.subprocess.PIPE,
                # Tests look at what /proc tells of their services, which is root's alone otherwise.
                env={**os.environ, "MASKWORK_DEBUGGABLE": "1", **(environment or {})},
            )
        return cls(name, process, log)

    async def _read(self) -> None:
        assert self.process.stderr is not None
        async for raw in self.process.stderr:
            if self._log is not None:
                self._log.write(raw)
            text = raw.decode(errors="replace").rstrip()
            try:
                line = json.loads(text)
            except ValueError:
                line = {"event": text, "unstructured": True}
            async with self._grew:
                self.lines.append(line)
                self._grew.notify_all()
        async with self._grew:
            self.lines.append({"event": "", "end": True})
            self._grew.notify_all()
        if self._log is not None:
            self._log.close()

    async def logged(self, event: str, *, count: int = 1, since: int = 0, **fields: object) -> Line:
        """The `count`th line with this event and these fields, from line `since` on."""

        def found() -> list[Line]:
            return [e for e in self.lines[since:] if e["event"] == event and fields.items() <= e.items()]

        async with asyncio.timeout(PATIENCE_S), self._grew:
            await self._grew.wait_for(lambda: len(found()) >= count or self.ended)
        assert len(found()) >= count, f"{self.name} ended without logging {event!r}:\n{self.text}"
        return found()[count - 1]

    @property
    def ended(self) -> bool:
        return bool(self.lines) and "end" in self.lines[-1]

    @property
    def text(self) -> str:
        return "\n".join(e["event"] if "unstructured" in e else json.dumps(e) for e in self.lines)

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def wait(self) -> int:
        """Its exit code; every line it wrote is read."""
        async with asyncio.timeout(PATIENCE_S):
            code = await self.process.wait()
            await self._reader
        return code

    async def kill(self) -> None:
        self.send(signal.SIGKILL)
        assert await self.wait() == -signal.SIGKILL

    async def terminate(self) -> int:
        self.send(signal.SIGCONT)
        self.send(signal.SIGTERM)
        return await self.wait()

    def assert_clean(self) -> None:
        """No traceback, no complaint of the interpreter or of a library."""
        assert "Traceback" not in self.text, self.text
        assert not [e for e in self.lines if "unstructured" in e], self.text


class Gate:
    """Where sites wait before they train. Open for those that are not held."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.held: set[str] = set()
        self._waiting: dict[str, asyncio.StreamWriter] = {}
        self._changed = asyncio.Condition()
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        self._server = await asyncio.start_unix_server(self._arrived, self.path)

    async def _arrived(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        site = (await reader.readline()).decode().strip()
        async with self._changed:
            if site in self.held:
                self._waiting[site] = writer
                self._changed.notify_all()
            else:
                writer.write(b".")
        await reader.read()  # until the site hangs up
        async with self._changed:
            if self._waiting.get(site) is writer:
                del self._waiting[site]
                self._changed.notify_all()
        writer.close()

    async def reached(self, site: str) -> None:
        async with asyncio.timeout(PATIENCE_S), self._changed:
            await self._changed.wait_for(lambda: site in self._waiting)

    async def left(self, site: str) -> None:
        """The site's training does not wait any more: it was ended."""
        async with asyncio.timeout(PATIENCE_S), self._changed:
            await self._changed.wait_for(lambda: site not in self._waiting)

    def release(self, site: str, answer: bytes = b".") -> None:
        self.held.discard(site)
        if (writer := self._waiting.pop(site, None)) is not None:
            writer.write(answer)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in self._waiting.values():
            writer.close()


class Watch:
    """The events of one job as they come, over a connection that is taken up again when the coordinator restarts."""

    def __init__(self, client: JobsClient, job_id: str) -> None:
        self.job_id = job_id
        self.events: list[events.WatchEvent] = []
        self._grew = asyncio.Condition()
        self._task = asyncio.create_task(self._read(client))

    async def _read(self, client: JobsClient) -> None:
        async for event in client.watch(self.job_id):
            async with self._grew:
                self.events.append(event)
                self._grew.notify_all()

    async def until(self, wanted: Callable[[events.WatchEvent], bool], *, since: int = 0) -> events.WatchEvent:
        """The first event, from event `since` on, for which `wanted` holds."""
        try:
            async with asyncio.timeout(PATIENCE_S), self._grew:
                await self._grew.wait_for(lambda: any(map(wanted, self.events[since:])) or self._task.done())
        except TimeoutError:
            raise AssertionError("\n".join(["no such event among:", *map(repr, self.events)])) from None
        if self._task.done():
            self._task.result()
        return next(e for e in self.events[since:] if wanted(e))

    async def stage(self, stage: str, *, round_number: int | None = None, since: int = 0) -> None:
        await self.until(
            lambda e: (
                isinstance(e, events.StageOpened)
                and e.stage == stage
                and (round_number is None or e.round_number == round_number)
            ),
            since=since,
        )

    async def answered(self, stage: str, *participants: str, since: int = 0) -> None:
        for name in participants:
            await self.until(
                lambda e, name=name: (  # type: ignore[misc]
                    isinstance(e, events.Answered) and (e.stage, e.participant) == (stage, name)
                ),
                since=since,
            )

    async def committed(self, round_number: int) -> events.RoundCommitted:
        event = await self.until(lambda e: isinstance(e, events.RoundCommitted) and e.round_number == round_number)
        assert isinstance(event, events.RoundCommitted)
        return event

    async def ended(self) -> events.JobSummary:
        event = await self.until(lambda e: isinstance(e, events.JobSummary) and e.ended)
        assert isinstance(event, events.JobSummary)
        return event

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


class World:
    """A federation called "ward" in one folder; with `logs`, what each process says is kept there, a file each."""

    def __init__(self, home: Path, *, logs: Path | None = None) -> None:
        self.home, self.logs = home, logs
        self.authority = Authority.create("ward", now=time.time())
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.gate = Gate(home / "gate")
        self.all: list[Service] = []
        self.models = 0
        self.sites: dict[str, Service] = {}
        self.coordinator: Service

    def identity(self, role: Role, name: str) -> IdentityFiles:
        directory = self.home / f"{role.value}-{name}"
        if not directory.exists():
            addresses = ["127.0.0.1"] if role is Role.COORDINATOR else []
            self.authority.issue(role, name, now=time.time(), ip_addresses=addresses).write(directory)
        return IdentityFiles.in_directory(directory)

    def coordinator_config(self, **changes: str | float) -> Path:
        self.identity(Role.COORDINATOR, "main")
        keys = {"listen": self.address, "identity": "coordinator-main", "state": "coordinator-state", **changes}
        path = self.home / f"coordinator-{len(self.all)}.toml"
        path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items()))
        return path

    def site_config(self, site: str, **changes: str) -> Path:
        self.identity(Role.PARTICIPANT, site)
        (self.home / "policy.toml").write_text("min_weight_cap = 1\n")  # these sites have ten examples each
        keys = {"coordinator": self.address, "identity": f"participant-{site}", "state": f"state-{site}"}
        keys |= {"policy": "policy.toml", **changes}
        name, use, options = self.task(site)
        path = self.home / f"{site}-{len(self.all)}.toml"
        path.write_text(
            "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
            + f"[tasks.{name}]\nuse = {json.dumps(use)}\n[tasks.{name}.options]\n"
            + "".join(f"{key} = {json.dumps(value)}\n" for key, value in options.items())
        )
        return path

    def task(self, site: str) -> tuple[str, str, dict[str, object]]:
        """What a site trains: the task's name, its import path and its options."""
        options = {"gate": str(self.gate.path), "site": site, "step": 0.25 * (1 + SITES.index(site))}
        return "gated", "gated_task:Gated", options

    async def start_coordinator(self) -> Service:
        self.coordinator = await self.start("coordinator", "coordinator", self.coordinator_config())
        await self.coordinator.logged("coordinator ready")
        return self.coordinator

    async def start_site(self, site: str) -> Service:
        self.sites[site] = await self.start(site, "participant", self.site_config(site))
        return self.sites[site]

    async def start(self, name: str, group: str, config: Path, *, environment: dict[str, str] | None = None) -> Service:
        task = {"PYTHONPATH": str(Path(__file__).parent)}
        service = await Service.start(
            name,
            *(group, "run", "--config", str(config)),
            environment=task if environment is None else environment,
            log=None if self.logs is None else self.logs / f"{len(self.all):04}-{name}.log",
        )
        self.all.append(service)
        return service

    def client(self, role: Role = Role.RESEARCHER) -> JobsClient:
        return JobsClient(self.address, self.identity(role, "someone"))

    def model(self) -> Path:
        """A model that no job began with before: on one model, sites answer for one survivor set only."""
        self.models += 1
        path = self.home / f"initial-{self.models}.safetensors"
        weights = np.full(2, float(self.models), np.float32)
        write_model(path, Schema((TensorSpec("weight", "F32", (1, 2)),)), weights, {})
        return path

    @asynccontextmanager
    async def job(self, name: str, **changes: Any) -> AsyncIterator[Watch]:
        """Submit a job and watch it."""
        async with self.client() as client:
            watch = Watch(client, await client.submit(spec(name, **changes), self.model()))
            try:
                yield watch
            finally:
                await watch.close()

    async def details(self, job_id: str) -> events.JobDetails:
        async with self.client() as client:
            return await client.get(job_id)

    async def close(self) -> None:
        for service in self.all:
            if service.process.returncode is None:
                service.process.kill()
                await service.wait()
        await self.gate.close()


def spec(name: str, *, rounds: int = 1, sites: Sequence[str] = SITES, minimum: int = 3) -> JobSpec:
    return JobSpec(
        name=name,
        task="gated",
        rounds=rounds,
        metrics={"train.loss": 10.0},
        encoding=EncodingSpec(weight_cap=10),  # every site has as many examples: the mean is the plain one
        cohort=Cohort(participants=tuple(sites), min_participants=minimum, wait_s=20.0),
        deadlines=Deadlines(reconnect_s=0.05),
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def descendants(pid: int) -> list[int]:
    """A process, its children, and theirs."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            fields = stat.read_text().rpartition(")")[2].split()
            parents[int(stat.parent.name)] = int(fields[1])
    found = [pid]
    for parent in found:
        found += [child for child, of in parents.items() if of == parent]
    return found
