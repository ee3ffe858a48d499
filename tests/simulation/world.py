"""A whole federation in one process, on a clock of its own, driven by operations.

`World` performs an `Op` whenever nothing in the loop is ready any more, then looks whether a process died of it. What
is possible at a moment is `enabled`; who chooses is a schedule (`schedules`), or a test that knows what it wants.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tests.simulation.identities import ROOTS, VERIFIED_COORDINATOR, Member, member
from tests.simulation.invariants import WEIGHT_CAP, Violation, Watch, must
from tests.simulation.lies import lie_down, lie_up
from tests.simulation.network import Connection, Gone, Greeting, SimulatedLink, Upload
from tests.simulation.operations import COORDINATOR, Channel, Kind, Op
from tests.simulation.processes import (
    EPOCH,
    TASK,
    CoordinatorProcess,
    Entropy,
    Fuse,
    Killed,
    SiteProcess,
    open_trail,
    task_of_a_process,
)
from tests.simulation.virtual_loop import VirtualLoop

from maskwork import job_events as events
from maskwork.audit.reading import Judged, judge
from maskwork.coordinator.audit import LOG_NAME
from maskwork.coordinator.audit_store import AuditedStore
from maskwork.coordinator.models import ModelStore
from maskwork.coordinator.records import AttemptOutcome, JobRecord, JobState
from maskwork.coordinator.store import Store
from maskwork.job import Cohort, Deadlines, JobSpec
from maskwork.participant.client import LinkDown, LinkUp, Said, TransferError
from maskwork.participant.ledger import Ledger
from maskwork.tensors import Schema, TensorSpec, write_model
from maskwork.wire import codec
from maskwork.wire.v1 import federation_pb2
from maskwork.worker import WorkerDied

JOB = "job-1"
PARAMETERS = 24
BETWEEN = "between"
REMOVING = "removing-masks"
DOWN = "down"
STAGES = (
    "advertise-keys",
    "share-keys",
    "masked-update",
    "consistency-check",
    "unmask",
    REMOVING,
    BETWEEN,
    DOWN,
)


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run is about.

    Attributes:
        seed: gives all entropy.
        sites: how many.
        rounds: of the job.
        liars: how many of the sites may be dishonest, the last ones.
    """

    seed: int = 0
    sites: int = 5
    rounds: int = 2
    liars: int = 0


class Schedule(Protocol):
    """Who chooses."""

    def next(self, world: World) -> Op | None:
        """The next operation; None: the run is over."""
        ...


@dataclass(eq=False)
class Place:
    """A site: its identity and files, its process while one runs, its streams, newest last."""

    member: Member
    folder: Path
    process: SiteProcess | None = None
    link: SimulatedLink | None = None
    connections: list[Connection] = field(default_factory=list)


class World:
    """One run. `run` ends when the schedule has nothing more, or raises what went wrong."""

    def __init__(self, settings: Settings, schedule: Schedule) -> None:
        self.settings = settings
        self.watch = Watch()
        self.operations: list[Op] = []
        self.coverage: Counter[tuple[Kind, str]] = Counter()
        self.coordinator: CoordinatorProcess | None = None
        self.until_timer: float | None = None
        self.loop = VirtualLoop(self._idle)
        self.loop.set_task_factory(task_of_a_process)  # type: ignore[arg-type]  # typeshed has it take no options
        self.heard: dict[str, list[bytes]] = {}
        self._schedule = schedule
        self._entropy = Entropy(settings.seed)
        self._home = Path(tempfile.mkdtemp(prefix="maskwork-simulation-", dir=_fast_disk()))
        self.places = {m.name: Place(m, self._home / m.name) for m in map(member, range(settings.sites))}
        self.stage = BETWEEN
        self._crashed_in = BETWEEN
        self._over: asyncio.Event
        self._ended: list[tuple[int, AttemptOutcome]] = []
        self._failure: Violation | None = None
        self.judged: Judged
        self.logs: dict[str, bytes] = {}

    # --- running ----------------------------------------------------------------------------------------------------

    def run(self) -> World:
        """From the first operation to the last."""
        self.loop.set_exception_handler(self._unexpected)
        try:
            self.loop.run_until_complete(self._live())
        finally:
            self._tear_down()
        wrong = [str(problem) for problem in self.judged.problems]
        must(
            not wrong and not self.judged.notes,
            f"an audit log does not tell what happened: {wrong[:5]} {self.judged.notes[:5]}",
        )
        return self

    async def _live(self) -> None:
        self._over = asyncio.Event()
        self._submit()
        self._start_coordinator()
        for place in self.places.values():
            self._start_site(place)
        await self._over.wait()

    def _idle(self, until_timer: float | None) -> None:
        if self._failure is not None:
            raise self._failure
        self._bury()
        self.until_timer = until_timer
        op = self._schedule.next(self)
        if op is None:
            self._over.set()
            self.loop.call_soon(lambda: None)
            return
        self.operations.append(op)
        self.coverage[op.kind, self._stage_for(op)] += 1
        self.perform(op)

    def _unexpected(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        # A process that is killed while a call of its fails never gets to look at the error.
        if not isinstance(error, Killed | WorkerDied | TransferError) and self._failure is None:
            self._failure = Violation(f"{context['message']}: {error!r} {context.get('task')!r}")
            self._failure.__cause__ = error

    def _tear_down(self) -> None:
        if self.coordinator is not None:
            attempts = self.coordinator.store.attempts(JOB)
            self._ended = [(a.round_number, a.outcome) for a in attempts if a.outcome is not None]
        for place in self.places.values():
            if place.process is not None:
                place.process.kill()
        if self.coordinator is not None:
            self.coordinator.kill()
        left = asyncio.all_tasks(self.loop)
        for task in left:
            task.cancel()
        self.loop.set_exception_handler(lambda *_: None)
        with suppress(BaseException):
            self.loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        self.loop.close()
        self.logs = {p.member.name: (p.folder / LOG_NAME).read_bytes() for p in self.places.values()}
        self.logs[COORDINATOR] = (self._home / LOG_NAME).read_bytes()
        self.judged = judge(self._home / LOG_NAME, ROOTS, [place.folder / LOG_NAME for place in self.places.values()])
        shutil.rmtree(self._home, ignore_errors=True)

    # --- what can be seen -------------------------------------------------------------------------------------------

    @property
    def record(self) -> JobRecord:
        """The job as the coordinator has it on its disk."""
        if self.coordinator is not None:
            found = self.coordinator.store.job(JOB)
        else:
            with Store.open(f"sqlite:///{self._home}/coordinator.sqlite") as store:
                found = store.job(JOB)
        assert found is not None
        return found

    @property
    def ended(self) -> list[tuple[int, AttemptOutcome]]:
        """Round and outcome of every attempt that has ended, once the run is over."""
        return self._ended

    @property
    def completed(self) -> bool:
        """Whether every round is committed."""
        return len(self.watch.committed) == self.settings.rounds

    def _stage_for(self, op: Op) -> str:
        if op.kind is Kind.RESTART and op.target == COORDINATOR:
            return self._crashed_in
        return self.stage_now

    @property
    def stage_now(self) -> str:
        """Where the coordinator is: an open stage, removing masks, between two attempts, or down."""
        if self.coordinator is None:
            return DOWN
        return REMOVING if self.coordinator.worker.current == "release" else self.stage

    def connection(self, op: Op) -> Connection | None:
        """The connection that an operation on a channel means: the newest, or an older one."""
        connections = self.places[op.target].connections
        at = len(connections) - 1 - (op.number if op.kind is Kind.DELIVER else 0)
        return connections[at] if 0 <= at < len(connections) else None

    def progress(self) -> Iterator[Op]:
        """Everything that can happen by itself at this moment, but for the passing of time."""
        now = self.loop.time()
        if self.coordinator is None:
            yield Op(Kind.RESTART)
        elif self.coordinator.worker.current is not None:
            yield Op(Kind.WORK)
        for name, place in self.places.items():
            for age, connection in enumerate(reversed(place.connections)):
                for channel in Channel:
                    if connection.channels[channel] and connection.held.get(channel, 0.0) <= now:
                        yield Op(Kind.DELIVER, name, channel, age)
            if place.process is None:
                yield Op(Kind.RESTART, name)
                continue
            if place.process.worker.current is not None:
                yield Op(Kind.WORK, name)
            assert place.link is not None
            if place.link.transfer is not None and self.coordinator is not None:
                yield Op(Kind.TRANSFER, name)
            down = place.link.connection is None and (not place.connections or place.connections[-1].broken)
            if down and self.coordinator is not None:
                yield Op(Kind.HEAL, name)

    # --- operations -------------------------------------------------------------------------------------------------

    def perform(self, op: Op) -> None:
        """Do it, if it can be done."""
        match op.kind:
            case Kind.ADVANCE:
                ahead = 1.0 if self.until_timer is None else self.until_timer
                self.loop.advance(ahead * (1.0 if op.number == 0 else op.number / 4))
            case Kind.WORK | Kind.FAIL_WORK:
                self._work(op)
            case Kind.CRASH | Kind.STOP | Kind.RESTART:
                self._life(op)
            case Kind.CUT | Kind.HEAL:
                self._wire(self.places[op.target], op.kind)
            case Kind.TRANSFER | Kind.BREAK_TRANSFER:
                self._transfer(self.places[op.target], op)
            case _:
                self._message(op)

    def _work(self, op: Op) -> None:
        process = self.coordinator if op.target == COORDINATOR else self.places[op.target].process
        if process is None:
            return
        if op.kind is Kind.WORK:
            process.worker.finish()
        else:
            process.worker.die()

    def _life(self, op: Op) -> None:
        process = self.coordinator if op.target == COORDINATOR else self.places[op.target].process
        match op.kind:
            case Kind.RESTART if process is None:
                if op.target == COORDINATOR:
                    self._start_coordinator()
                else:
                    self._start_site(self.places[op.target])
            case Kind.CRASH if process is not None:
                process.fuse.left = op.number
                if op.number == 0:
                    process.fuse.burnt = True
            case Kind.STOP if process is not None:
                self.loop.create_task(self._stop(process))
            case _:
                pass

    async def _stop(self, process: CoordinatorProcess | SiteProcess) -> None:
        """As `server.serve` and `process._run` end."""
        process.loop.cancel()
        await asyncio.wait({process.loop})
        try:
            if isinstance(process, CoordinatorProcess):
                await process.driver.stop()
            else:
                process.driver.leave()
        except Killed:
            pass
        process.fuse.burnt = True

    def _wire(self, place: Place, kind: Kind) -> None:
        newest = place.connections[-1] if place.connections else None
        if kind is Kind.CUT:
            if newest is not None and not newest.broken:
                newest.cut()
                self._break_transfer(place)
        elif place.process is not None and place.link is not None and place.link.connection is None:
            if self.coordinator is None or (newest is not None and not newest.broken):
                return
            connection = Connection(place.member.name)
            hello = Greeting(place.process.driver.active_session(), place.process.trail.kept_size)
            connection.channels[Channel.UP].append(hello)
            place.connections = [*(c for c in place.connections if not c.over), connection]

    def _transfer(self, place: Place, op: Op) -> None:
        if place.link is None or place.link.transfer is None:
            return
        if op.kind is Kind.BREAK_TRANSFER or self.coordinator is None:
            place.link.transfer.fail()
        else:
            if op.target in self._liars and isinstance(place.link.transfer, Upload) and op.number == 3:
                place.link.transfer.fail()
                return
            place.link.transfer.move(place.member, self.coordinator, op.number)

    @property
    def _liars(self) -> tuple[str, ...]:
        return tuple(self.places)[len(self.places) - self.settings.liars :]

    def _message(self, op: Op) -> None:
        connection = self.connection(op)
        if connection is None or op.channel is None:
            return
        channel = connection.channels[op.channel]
        match op.kind:
            case Kind.DELIVER if channel:
                self._deliver(connection, op.channel)
            case Kind.DROP if channel and isinstance(channel[0], bytes):
                channel.popleft()
            case Kind.DUPLICATE if channel and isinstance(channel[0], bytes):
                channel.appendleft(channel[0])
            case Kind.REORDER if len(channel) > 1 and all(isinstance(i, bytes) for i in (channel[0], channel[1])):
                channel[0], channel[1] = channel[1], channel[0]
            case Kind.DELAY:
                connection.held[op.channel] = self.loop.time() + 1 + 4 * op.number
                self.loop.call_later(1 + 4 * op.number, lambda: None)
            case Kind.LIE_UP:
                self._lie_up(connection, op.number)
            case Kind.LIE_DOWN:
                self._lie_down(connection, op.number)
            case _:
                pass

    def _lie_up(self, connection: Connection, variant: int) -> None:
        channel = connection.channels[Channel.UP]
        if connection.broken or connection.peer is None:
            return
        first = channel[0] if channel else None
        process = self.places[connection.site].process
        session = b"" if process is None else process.driver.active_session()
        message = None
        if isinstance(first, bytes):
            request = federation_pb2.ConnectRequest.FromString(first)
            session, message = request.session_id, codec.decode_request(request)
            channel.popleft()
        channel.appendleft(codec.encode_request(session, lie_up(message, variant)).SerializeToString())

    def _lie_down(self, connection: Connection, variant: int) -> None:
        channel = connection.channels[Channel.DOWN]
        if connection.broken or connection.peer is None:
            return
        first = channel[0] if channel else None
        if isinstance(first, bytes):
            response = federation_pb2.ConnectResponse.FromString(first)
            plan = self.watch.plans.get(response.session_id)
            size = 0 if plan is None else plan.cohort
            lie = lie_down(codec.decode_response(response, size), variant)
            if lie is not None:
                channel[0] = codec.encode_response(response.session_id, lie, size).SerializeToString()
                return
        earlier = self.heard.get(connection.site, [])
        if earlier and not isinstance(first, Greeting):
            channel.appendleft(earlier[(7 * variant) % len(earlier)])

    def _deliver(self, connection: Connection, channel: Channel) -> None:
        item = connection.channels[channel].popleft()
        place = self.places[connection.site]
        if channel is Channel.UP:
            if self.coordinator is not None and connection.coordinator in (None, self.coordinator):
                connection.arrive(item, place.member, self.coordinator)
            return
        if place.process is None or place.link is None or connection is not place.connections[-1]:
            return  # a site has one stream at a time: what an older one still carries, nobody reads
        inbox = place.process.driver.inbox
        match item:
            case Greeting():
                place.link.connection = connection
                inbox.put_nowait(LinkUp(VERIFIED_COORDINATOR))
            case Gone():
                if place.link.connection is connection:
                    place.link.connection = None
                    inbox.put_nowait(LinkDown())
                    self._break_transfer(place)
            case bytes():
                self.heard.setdefault(connection.site, []).append(item)
                inbox.put_nowait(Said(federation_pb2.ConnectResponse.FromString(item)))

    def _break_transfer(self, place: Place) -> None:
        if place.link is not None and place.link.transfer is not None:
            place.link.transfer.fail()

    # --- processes --------------------------------------------------------------------------------------------------

    def _submit(self) -> None:
        models = ModelStore(self._home / "models", fsync=lambda _: None)
        schema = Schema((TensorSpec("w", "F32", (PARAMETERS,)),))
        digest = models.put(lambda path: write_model(path, schema, np.zeros(PARAMETERS, np.float32), {}))
        spec = JobSpec(
            name="job",
            task=TASK,
            rounds=self.settings.rounds,
            max_attempts=1_000_000,
            metrics={"train.loss": 10.0},
            cohort=Cohort(min_participants=3, max_participants=self.settings.sites, wait_s=2),
            encoding={"weight_cap": WEIGHT_CAP, "clip_norm": 5.0},  # type: ignore[arg-type]  # pydantic makes it
            deadlines=Deadlines(
                advertise_keys_s=20,
                share_keys_s=20,
                masked_update_s=60,
                consistency_check_s=20,
                unmask_s=20,
                reconnect_s=5,
            ),
        )
        shutil.copy(coordinator_template(), self._home / "coordinator.sqlite")
        with (
            closing(open_trail(self._home, lambda: EPOCH)) as trail,
            AuditedStore.open(f"sqlite:///{self._home}/coordinator.sqlite") as store,
        ):
            store.follow(trail)
            store.add_job(
                JobRecord(
                    job_id=JOB,
                    name="job",
                    task=TASK,
                    state=JobState.QUEUED,
                    rounds_total=spec.rounds,
                    next_round=1,
                    next_attempt=1,
                    spec_json=spec.canonical_json().decode(),
                    submitted_by="spiffe://simulated/researcher/rosa",
                    submitted_at=EPOCH,
                    initial_model=digest,
                    current_model=digest,
                )
            )

    def _start_coordinator(self) -> None:
        process = CoordinatorProcess(self._home, coordinator_template(), self._entropy, self.watch)
        self.watch.restarted(process.store.rounds(JOB), process.models.verify)
        self.coordinator, self.stage = process, BETWEEN
        self.loop.create_task(self._follow(process))

    async def _follow(self, process: CoordinatorProcess) -> None:
        with process.driver.board.subscribe(JOB) as subscription:
            async for event in subscription:
                if process is not self.coordinator:
                    return
                match event:
                    case events.StageOpened(stage=stage):
                        self.stage = stage
                    case events.AttemptAborted() | events.RoundCommitted():
                        self.stage = BETWEEN
                    case _:
                        pass

    def _start_site(self, place: Place) -> None:
        fuse = Fuse()
        place.link = SimulatedLink(self.watch, fuse)
        place.process = SiteProcess(
            place.member, place.folder, ledger_template(), self._entropy, self.watch, place.link, fuse
        )

    def _bury(self) -> None:
        """Put away what has died; what died of anything but a kill is a failure of the run."""
        process = self.coordinator
        if process is not None and (process.fuse.burnt or process.loop.done()):
            _must_have_been_killed(process)
            self._crashed_in = self.stage_now
            process.kill()
            self.coordinator = None
            for place in self.places.values():
                self._break_transfer(place)
                for connection in place.connections:
                    connection.coordinator_is_gone()
        for place in self.places.values():
            if place.process is not None and (place.process.fuse.burnt or place.process.loop.done()):
                _must_have_been_killed(place.process)
                self._break_transfer(place)
                place.process.kill()
                place.process = None
                if place.connections:
                    place.connections[-1].site_is_gone()


def _must_have_been_killed(process: CoordinatorProcess | SiteProcess) -> None:
    loop = process.loop
    if loop.done() and not loop.cancelled() and not isinstance(error := loop.exception(), Killed):
        raise Violation(f"{type(process).__name__} ended by itself: {error!r}") from error
    must(process.fuse.burnt or (loop.done() and loop.cancelled()), "a process ended and nobody ended it")


def _fast_disk() -> str | None:
    shared = Path("/dev/shm")
    return str(shared) if shared.is_dir() else None


@cache
def _templates() -> Path:
    return Path(tempfile.mkdtemp(prefix="maskwork-templates-"))


@cache
def coordinator_template() -> Path:
    """An empty database at head, copied for each run: migrating takes longer than most runs."""
    Store.open(f"sqlite:///{_templates()}/coordinator.sqlite").close()
    return _templates() / "coordinator.sqlite"


@cache
def ledger_template() -> Path:
    """The same for a site."""
    Ledger.open(_templates() / "ledger").close()
    return _templates() / "ledger" / "ledger.sqlite"
