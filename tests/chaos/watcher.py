"""The events of the job that runs, over as many connections as it takes: the coordinator is killed again and again.

Unlike a person's watch it does not wait a growing while before it connects anew; the run knows when the coordinator is
back and says so. Not a test itself.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from tests.chaos.plan import COMMIT, RECOVERY, WAITING
from tests.e2e.services import World

from maskwork import job_events as events
from maskwork.errors import UserError

PAUSE_S = 0.05

Wanted = Callable[[events.WatchEvent], bool]


class Watcher:
    """Whatever was seen, in the order in which it was seen; past rounds are seen again after each restart.

    Attributes:
        ready: Set while the coordinator is thought to answer.
        job: What is watched; empty for nothing.
    """

    def __init__(self, world: World) -> None:
        self.ready = asyncio.Event()
        self.job = ""
        self.seen: list[events.WatchEvent] = []
        self._world = world
        self._grew = asyncio.Condition()
        self._down_at = 0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._watch_for_ever())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def down(self) -> None:
        """The coordinator was killed."""
        self.ready.clear()
        self._down_at = len(self.seen)

    async def until(self, wanted: Wanted, *, since: int, patience_s: float) -> events.WatchEvent:
        """The first event from `since` on that is wanted.

        Raises:
            TimeoutError: None came in time.
        """
        looked = since
        async with asyncio.timeout(patience_s), self._grew:
            while True:
                for event in self.seen[looked:]:
                    if wanted(event):
                        return event
                looked = len(self.seen)
                await self._grew.wait()

    def moment(self) -> str:
        """Where the protocol is, as far as that was seen."""
        fresh = self.seen[self._down_at :]
        if self._down_at and not any(isinstance(e, events.AttemptOpened | events.StageOpened) for e in fresh):
            return RECOVERY
        for event in reversed(fresh):
            match event:
                case events.AttemptOpened():
                    return events.STAGES[0]
                case events.StageOpened() | events.Answered():
                    return event.stage
                case events.Waiting():
                    return WAITING
                case events.RoundCommitted() | events.AttemptAborted() | events.JobSummary():
                    return COMMIT
                case _:
                    pass
        return WAITING

    async def _watch_for_ever(self) -> None:
        while True:
            await self.ready.wait()
            if self.job:
                await self._watch(self.job)
            await asyncio.sleep(PAUSE_S)  # between two tries, not for anything to happen

    async def _watch(self, job: str) -> None:
        try:
            async with self._world.client() as client:
                async for event in client.watch(job):
                    if isinstance(event, events.ConnectionLost):
                        return
                    async with self._grew:
                        self.seen.append(event)
                        self._grew.notify_all()
        except UserError:
            return  # it was killed while we dialled


class Mending:
    """What goes on beside the run: restarts, heals, continuations."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def do(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.add(asyncio.create_task(work))

    async def done(self) -> None:
        """Everything is mended; what went wrong with it is raised."""
        while self._tasks:
            tasks, self._tasks = self._tasks, set()
            await asyncio.gather(*tasks)
