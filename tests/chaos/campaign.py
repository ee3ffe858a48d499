"""A run: jobs one after the other, and faults at the moments of the plan until all are done and the last job too.

It watches the running job as a researcher would, and what it sees tells it when to strike. Whatever it kills it starts
again, what it stops it lets go on, what it cuts it heals; beyond that it helps nobody. It judges nothing: what each
process wrote is read and judged afterwards (`written`, `invariants`). One thing alone it has to see itself: that once
everything runs again, a round is committed within `PROGRESS_S`.
"""

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tests.chaos.federation import COORDINATOR, Federation
from tests.chaos.known_update import SITES
from tests.chaos.plan import COMMIT, KILLS, RECOVERY, Kind, Planned
from tests.chaos.watcher import Mending, Wanted, Watcher

from maskwork import job_events as events
from maskwork.errors import UserError

START_S = 300.0
"""For five interpreters to load torch at once, on a machine that does other things as well."""
PROGRESS_S = 120.0
MOMENT_WITHIN_S = 10.0
"""A moment that does not come, because the faults before are still felt, is not waited for: the fault strikes then."""


@dataclass(frozen=True, slots=True)
class Struck:
    """A fault that was done.

    Attributes:
        kind: What.
        aimed: The moment of the plan.
        landed: Where the protocol was, as far as that had been seen.
        victim: Whom it hit.
        at: Unix time.
        lasts_s: As planned.
    """

    kind: Kind
    aimed: str
    landed: str
    victim: str
    at: float
    lasts_s: float


class Campaign:
    """One run in one folder.

    Attributes:
        struck: The faults that were done, in order.
        stuck: What did not go on though nothing hindered it any more; empty is good.
    """

    def __init__(
        self, federation: Federation, plan: Iterator[Planned], *, kills: int, rounds: int, say: Callable[[str], None]
    ) -> None:
        self.struck: list[Struck] = []
        self.stuck: list[str] = []
        self._federation = federation
        self._plan = plan
        self._kills = kills
        self._rounds = rounds
        self._say = say
        self._watcher = Watcher(federation)
        self._mending = Mending()
        self._jobs = 0

    def stop(self) -> None:
        """Strike no more: finish the job, and let what was done be judged."""
        self._kills = 0

    async def run(self) -> None:
        """Start everybody, do it all, drain everybody."""
        await self._federation.open()
        await asyncio.gather(*(self._federation.begin(name) for name in (*SITES, COORDINATOR)))
        self._watcher.start()
        try:
            await self._coordinator_ready()
            submitting = asyncio.create_task(self._keep_submitting())
            try:
                await self._progress(within_s=START_S)
                if not self.stuck:
                    await self._strike_all()
            finally:
                submitting.cancel()
            await self._mending.done()
            await self._finish()
        finally:
            await self._watcher.close()
        for name in (*SITES, COORDINATOR):
            await self._federation.drain(name)

    # --- jobs -----------------------------------------------------------------------------------------------------

    async def _keep_submitting(self) -> None:
        while True:
            await self._submit()
            await self._job_over(self._watcher.job)

    async def _submit(self) -> None:
        federation, watcher = self._federation, self._watcher
        self._jobs += 1
        spec = federation.job_spec(f"chaos-{self._jobs}", rounds=self._rounds)
        while True:
            await watcher.ready.wait()
            try:
                async with federation.client() as client:
                    watcher.job = await client.submit(spec, federation.model())
                return
            except UserError as error:  # killed meanwhile; whether it took the job, we do not know
                self._say(f"submitting again: {error}")

    async def _job_over(self, job: str) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await self._next(lambda e: isinstance(e, events.JobSummary) and e.ended and e.job_id == job, since=0)
                return

    async def _finish(self) -> None:
        """Every job that was submitted ends, now that nothing hinders it."""
        while not self.stuck:
            async with self._federation.client() as client:
                left = [job for job in await client.list_jobs() if not job.ended]
            if not left:
                return
            self._watcher.job = left[0].job_id
            await self._progress()

    async def _next(self, wanted: Wanted, *, since: int, patience_s: float = PROGRESS_S) -> None:
        await self._watcher.until(wanted, since=since, patience_s=patience_s)

    async def _progress(self, within_s: float = PROGRESS_S) -> None:
        """A round is committed now that everything runs again, or it is noted that none is."""
        await self._mending.done()
        now = time.time()

        def goes_on(event: events.WatchEvent) -> bool:
            committed = isinstance(event, events.RoundCommitted) and event.committed_at > now
            return committed or (isinstance(event, events.JobSummary) and event.ended)

        try:
            await self._next(goes_on, since=len(self._watcher.seen), patience_s=within_s)
        except TimeoutError:
            self.stuck.append(f"no round was committed within {within_s:g} s although everything ran again")

    # --- faults ---------------------------------------------------------------------------------------------------

    async def _strike_all(self) -> None:
        while (kills := sum(s.kind in KILLS for s in self.struck)) < self._kills:
            fault = next(self._plan)
            if fault.moment != RECOVERY:
                await self._moment(fault)
            await asyncio.sleep(fault.delay_s)
            if (struck := await self._strike(fault)) is None:
                continue
            self.struck.append(struck)
            self._say(f"{kills} of {self._kills} kills; {struck.kind}, {struck.victim}, at {struck.landed}")
            if fault.waits:
                await self._progress()
            if self.stuck:
                return

    async def _moment(self, fault: Planned) -> None:
        now, by_an_answer = time.time(), fault.victim % 2 == 1

        def begins(event: events.WatchEvent) -> bool:
            match event:
                case events.RoundCommitted():
                    return fault.moment == COMMIT and event.committed_at > now
                case events.StageOpened():
                    return event.stage == fault.moment and not by_an_answer
                case events.Answered():
                    return event.stage == fault.moment and by_an_answer
                case _:
                    return False

        with contextlib.suppress(TimeoutError):
            await self._next(begins, since=len(self._watcher.seen), patience_s=MOMENT_WITHIN_S)

    async def _strike(self, fault: Planned) -> Struck | None:
        """Do it; None: there was nothing to do it to, such as a worker that is only started when it is needed."""
        federation, mend = self._federation, self._mending.do
        victim = await self._victim(fault)
        landed, at = self._watcher.moment(), time.time()
        if fault.kind in (Kind.KILL_TRAINER, Kind.KILL_AGGREGATOR):
            killed = federation.kill_workers(victim)
            return Struck(fault.kind, fault.moment, landed, victim, at, fault.lasts_s) if killed else None
        match fault.kind:
            case Kind.KILL_COORDINATOR:
                self._watcher.down()
                await federation.end(COORDINATOR)
                await asyncio.sleep(fault.lasts_s)
                await federation.begin(COORDINATOR)
                mend(self._coordinator_ready())
            case Kind.KILL_PARTICIPANT:
                mend(self._kill_and_restart(victim, fault.lasts_s))
            case Kind.STOP_PARTICIPANT | Kind.STOP_COORDINATOR:
                federation.send(victim, signal.SIGSTOP)
                mend(self._later(fault.lasts_s, lambda: federation.send(victim, signal.SIGCONT)))
            case Kind.CUT:
                federation.proxies[victim].cut()
                mend(self._later(fault.lasts_s, federation.proxies[victim].heal))
            case Kind.HOLD:
                federation.proxies[victim].hold()
                mend(self._later(fault.lasts_s, federation.proxies[victim].let_go))
        return Struck(fault.kind, fault.moment, landed, victim, at, fault.lasts_s)

    async def _victim(self, fault: Planned) -> str:
        federation = self._federation
        match fault.kind:
            case Kind.KILL_COORDINATOR | Kind.STOP_COORDINATOR:
                return COORDINATOR
            case Kind.KILL_AGGREGATOR:
                return COORDINATOR
            case _:
                running = [site for site in SITES if federation.runs(site)]
        if fault.kind is Kind.KILL_TRAINER:
            running = [site for site in running if federation.workers(site)]
        if not running:
            await self._mending.done()
            running = list(SITES)
        return running[fault.victim % len(running)]

    async def _later(self, seconds: float, action: Callable[[], None]) -> None:
        await asyncio.sleep(seconds)
        action()

    async def _kill_and_restart(self, site: str, down_s: float) -> None:
        await self._federation.end(site)
        await asyncio.sleep(down_s)
        await self._federation.begin(site)

    async def _coordinator_ready(self) -> None:
        if await self._federation.is_ready(COORDINATOR):
            self._watcher.ready.set()
