"""The processes of a simulated federation: production's own drivers, between ports that can fail.

A `CoordinatorProcess` and a `SiteProcess` are what `maskwork coordinator run` and `maskwork participant run` are,
without gRPC and without other processes: the drivers, the stores, the model files, the spools and the whole protocol
are production's. A worker runs its calls when it is told to; entropy comes from the seed.

A process can be killed between any two of its durable writes, sends and worker calls, from the inside: a `Fuse` burns
down with each of them. Of what is killed nothing remains but its files.
"""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import shutil
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar, cast
from weakref import WeakSet

from tests.simulation.identities import COORDINATOR_CERTIFICATE, COORDINATOR_SIGNER, FEDERATION, Member

from maskwork.coordinator.audit import LOG_NAME as COORDINATOR_LOG_NAME
from maskwork.coordinator.audit import Trail
from maskwork.coordinator.audit_store import AuditedStore
from maskwork.coordinator.driver import Driver as CoordinatorDriver
from maskwork.coordinator.job_runner import Federation
from maskwork.coordinator.models import ModelStore
from maskwork.participant.audit import LOG_NAME, SiteTrail, is_held, lacking
from maskwork.participant.config import TaskConfig
from maskwork.participant.driver import Driver as SiteDriver
from maskwork.participant.ledger import Ledger
from maskwork.participant.policy import Policy
from maskwork.participant.work import Link, SiteIdentity
from maskwork.worker import WorkerDied

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

EPOCH = 1_800_000_000.0
TASK = "sums"


_PROCESS: contextvars.ContextVar[Fuse] = contextvars.ContextVar("process")


_OF_THE_WORLD: set[asyncio.Task[Any]] = set()


def task_of_a_process(
    loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, Any], **options: Any
) -> asyncio.Task[Any]:
    """A task factory: each task is noted as its process's, so that a killed process has none left.

    The world's own tasks are kept alive until they end: what they wait for may be a dead process's, and so garbage.
    """
    task = asyncio.Task(work, loop=loop, **options)
    context: contextvars.Context = options.get("context") or contextvars.copy_context()
    if (process := context.get(_PROCESS)) is not None:
        process.tasks.add(task)
    else:
        _OF_THE_WORLD.add(task)
        task.add_done_callback(_OF_THE_WORLD.discard)
    return task


class Killed(BaseException):
    """A process was killed here. Not an `Exception`: no handler of production's may catch it."""


class Fuse:
    """Counts what a process does to the world, and kills it when it was told to; knows every task of the process."""

    def __init__(self) -> None:
        self.left: int | None = None
        self.burnt = False
        self.tasks: WeakSet[asyncio.Task[Any]] = WeakSet()

    def start(self, main: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run the process; every task that comes of it is its own."""
        context = contextvars.copy_context()
        context.run(_PROCESS.set, self)
        return asyncio.get_running_loop().create_task(main, context=context)

    def end(self) -> None:
        """Nothing of the process runs any more."""
        self.burnt = True
        for task in tuple(self.tasks):
            task.cancel()

    def tick(self) -> None:
        """Before and after each effect on the world."""
        if self.burnt:
            raise Killed
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                self.burnt = True
                raise Killed


def fused(thing: T, fuse: Fuse, after: Callable[[str, tuple[Any, ...], dict[str, Any]], None]) -> T:
    """`thing` with a fuse before and after each call of a method; `after` hears of each that took effect."""

    class Fused:
        def __getattr__(self, name: str) -> Any:
            found = getattr(thing, name)
            if not callable(found):
                return found

            def call(*args: Any, **kwargs: Any) -> Any:
                fuse.tick()
                result = found(*args, **kwargs)
                after(name, args, kwargs)
                fuse.tick()
                return result

            return call

    return cast("T", Fused())


@dataclass(eq=False)
class _Call:
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    answer: asyncio.Future[Any]


class SimulatedWorker:
    """A worker process: one call after the other, each done when `finish` says so. `run` is what a call does."""

    def __init__(self, run: Callable[[Callable[..., Any], tuple[Any, ...]], Any], fuse: Fuse) -> None:
        self._run = run
        self._fuse = fuse
        self._calls: deque[_Call] = deque()
        self.ended: Callable[[], None] = lambda: None

    @property
    def current(self) -> str | None:
        """The name of what it is at."""
        return self._calls[0].function.__name__ if self._calls else None

    async def start(self) -> None:
        """Nothing to load."""

    async def call(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        self._fuse.tick()
        call = _Call(function, args, asyncio.get_running_loop().create_future())
        self._calls.append(call)
        try:
            answer = cast("R", await call.answer)
        except asyncio.CancelledError:
            if self._calls and self._calls[0] is call:
                self.ended()  # a call that is cancelled ends its worker
            raise
        finally:
            if call in self._calls:
                self._calls.remove(call)
        self._fuse.tick()
        return answer

    def finish(self) -> None:
        """Do what the first call asks."""
        if not self._calls:
            return
        call = self._calls.popleft()
        try:
            result = self._run(call.function, call.arguments)
        except Exception as error:  # as a worker does: whatever it is goes back to the caller
            call.answer.set_exception(error)
        else:
            call.answer.set_result(result)

    def die(self) -> None:
        """End in the middle of the first call, with all that was in memory."""
        if self._calls:
            self.ended()
            self._calls.popleft().answer.set_exception(WorkerDied("the worker was ended by SIGKILL"))

    async def close(self) -> None:
        """It ends."""

    def vanish(self) -> None:
        """End with the process that it belongs to: nobody waits any more."""
        while self._calls:
            self._calls.popleft().answer.cancel()


class Entropy:
    """Fresh bytes for everybody in a run: no two draws are alike, and the seed gives them all."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._drawn = 0

    def __call__(self, length: int) -> bytes:
        self._drawn += 1
        return hashlib.shake_256(f"{self._seed} {self._drawn}".encode()).digest(length)


class Observer(Protocol):
    """Who watches what processes do to the world; the invariants are behind it."""

    def coordinator_wrote(self, method: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """A method of the coordinator's store took effect."""
        ...

    def site_wrote(self, site: str, method: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """A method of a site's ledger took effect."""
        ...

    def aggregate(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """Run a call of the coordinator's worker."""
        ...

    def train(self, site: str, kept: set[bytes], function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """Run a call of a site's worker, which holds the updates of the sessions in `kept`."""
        ...


def open_trail(folder: Path, clock: Callable[[], float]) -> Trail:
    """The coordinator's audit log; what is killed here is a process, not the machine, so nothing need be synced."""
    return Trail.open(
        folder / COORDINATOR_LOG_NAME,
        federation=FEDERATION,
        certificate=COORDINATOR_CERTIFICATE,
        signer=COORDINATOR_SIGNER,
        clock=clock,
        fsync=lambda _: None,
    )


@dataclass(eq=False)
class CoordinatorProcess:
    """One life of the coordinator."""

    folder: Path
    template: Path
    entropy: Entropy
    observer: Observer
    fuse: Fuse = field(default_factory=Fuse)

    def __post_init__(self) -> None:
        loop = asyncio.get_running_loop()
        database = self.folder / "coordinator.sqlite"
        if not database.exists():
            shutil.copy(self.template, database)
        clock = lambda: EPOCH + loop.time()  # noqa: E731
        self.trail = open_trail(self.folder, clock)
        self.store = AuditedStore.open(f"sqlite:///{database}", clock=clock)
        audit = fused(self.trail, self.fuse, lambda *_: None)
        self.store.follow(audit)
        self.models = ModelStore(self.folder / "models", fsync=lambda _: None)
        self.worker = SimulatedWorker(self.observer.aggregate, self.fuse)
        sessions = self.folder / "sessions"
        sessions.mkdir(exist_ok=True)
        self.driver = CoordinatorDriver(
            federation=Federation(FEDERATION, COORDINATOR_CERTIFICATE, COORDINATOR_SIGNER),
            store=fused(self.store, self.fuse, self.observer.coordinator_wrote),
            models=self.models,
            worker=self.worker,
            sessions=sessions,
            max_uploads=2,
            clock=clock,
            ticks=loop.time,
            entropy=self.entropy,
            audit=audit,
        )
        self.loop = self.fuse.start(self.driver.run())

    def kill(self) -> None:
        """What SIGKILL leaves: no word to anybody, the files as they are."""
        self.fuse.end()
        self.worker.vanish()
        self.driver.hang_up()
        self.store.close()
        self.trail.close()


@dataclass(eq=False)
class SiteProcess:
    """One life of a site's agent."""

    member: Member
    folder: Path
    template: Path
    entropy: Entropy
    observer: Observer
    link: Link
    fuse: Fuse = field(default_factory=Fuse)

    def __post_init__(self) -> None:
        loop = asyncio.get_running_loop()
        scratch = self.folder / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)  # as the process does at its start
        database = self.folder / "ledger.sqlite"
        if not database.exists():
            self.folder.mkdir()
            shutil.copy(self.template, database)
        name, kept = self.member.name, set[bytes]()
        self.ledger = Ledger.open(self.folder)
        self.trail = SiteTrail.open(
            self.folder / LOG_NAME,
            federation=FEDERATION,
            certificate=self.member.certificate,
            signer=self.member.signer,
            clock=lambda: EPOCH + loop.time(),
            fsync=lambda _: None,
        )
        must_hold = is_held(self.trail, self.ledger.last_audit_head(FEDERATION))
        assert must_hold, "the site's log does not hold the head that its ledger knows"
        known = self.ledger
        missing = lacking(self.trail, taken_up=known.sessions_taken_up(), released=known.sessions_released())
        assert not missing, f"the site's ledger lacks {missing}"
        self.worker = SimulatedWorker(
            lambda function, arguments: self.observer.train(name, kept, function, arguments), self.fuse
        )
        self.worker.ended = kept.clear
        self.driver = SiteDriver(
            identity=SiteIdentity(FEDERATION, name, self.member.fingerprint, self.member.signer, self.member.verifier),
            ledger=fused(self.ledger, self.fuse, lambda *wrote: self.observer.site_wrote(name, *wrote)),
            policy=Policy(min_weight_cap=1),
            tasks={TASK: TaskConfig(use="nowhere:Nothing")},
            seed=1,
            scratch=scratch,
            make_worker=lambda _name, _task: self.worker,
            clock=lambda: EPOCH + loop.time(),
            entropy=self.entropy,
            audit=fused(self.trail, self.fuse, lambda *_: None),
        )
        self.driver.link = self.link
        self.loop = self.fuse.start(self._run())

    async def _run(self) -> None:
        await self.driver.prepare()
        await self.driver.run()

    def kill(self) -> None:
        """What SIGKILL leaves."""
        self.fuse.end()
        self.worker.vanish()
        self.ledger.close()
        self.trail.close()
