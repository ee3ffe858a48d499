"""Where job events are posted and read: live watchers get what happens now after what led up to it.

It keeps, for each running job, the events of the current attempt, so that somebody who starts watching in the middle of
a round sees it whole. Past rounds are in the store. A watcher that does not keep up is cut off, never waited for.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator

from maskwork.job_events import AttemptOpened, JobEvent, JobSummary, RoundCommitted

WATCHER_LIMIT = 10_000


class EventBoard:
    """Publishes job events to any number of watchers."""

    def __init__(self) -> None:
        self._current: dict[str, list[JobEvent]] = defaultdict(list)
        self._watchers: dict[str, set[asyncio.Queue[JobEvent | None]]] = defaultdict(set)

    def publish(self, event: JobEvent) -> None:
        """Post an event to the job's watchers and remember it as part of the current attempt."""
        current = self._current[event.job_id]
        if isinstance(event, AttemptOpened | RoundCommitted):
            current.clear()
        if not isinstance(event, RoundCommitted | JobSummary):
            current.append(event)
        for queue in tuple(self._watchers[event.job_id]):
            if queue.qsize() >= WATCHER_LIMIT:
                self._watchers[event.job_id].discard(queue)
                queue.put_nowait(None)
            else:
                queue.put_nowait(event)

    def forget(self, job_id: str) -> None:
        """A job has ended: its last events need not be replayed any more."""
        self._current.pop(job_id, None)

    async def watch(self, job_id: str) -> AsyncIterator[JobEvent]:
        """The current attempt so far, then what happens, until the caller stops or falls too far behind."""
        queue: asyncio.Queue[JobEvent | None] = asyncio.Queue()
        for event in self._current.get(job_id, ()):
            queue.put_nowait(event)
        self._watchers[job_id].add(queue)
        try:
            while (event := await queue.get()) is not None:
                yield event
        finally:
            self._watchers[job_id].discard(queue)
