"""Where job events are posted and read: live watchers get what happens now after what led up to it.

It keeps, for each running job, the events of the current attempt, so that somebody who starts watching in the middle of
a round sees it whole. Past rounds are in the store. A watcher that does not keep up is cut off, never waited for.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from maskwork.job_events import AttemptOpened, JobEvent, JobSummary, RoundCommitted, Waiting

WATCHER_LIMIT = 10_000


class Subscription:
    """One watcher's events, in order; iteration ends when the watcher has fallen too far behind."""

    def __init__(self, events: list[JobEvent]) -> None:
        self._queue: asyncio.Queue[JobEvent | None] = asyncio.Queue()
        for event in events:
            self._queue.put_nowait(event)

    def put(self, event: JobEvent) -> bool:
        """Queue an event; False when the watcher is cut off instead."""
        if self._queue.qsize() >= WATCHER_LIMIT:
            self.end()
            return False
        self._queue.put_nowait(event)
        return True

    def end(self) -> None:
        """No more events after those that are queued."""
        self._queue.put_nowait(None)

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> JobEvent:
        event = await self._queue.get()
        if event is None:
            raise StopAsyncIteration
        return event


class EventBoard:
    """Publishes job events to any number of watchers."""

    def __init__(self) -> None:
        self._current: dict[str, list[JobEvent]] = defaultdict(list)
        self._watchers: dict[str, set[Subscription]] = defaultdict(set)
        self.closed = False

    def publish(self, event: JobEvent) -> None:
        """Post an event to the job's watchers and remember it as part of the current attempt."""
        current = self._current[event.job_id]
        if isinstance(event, AttemptOpened | RoundCommitted):
            current.clear()
        if not isinstance(event, RoundCommitted | JobSummary):
            current.append(event)
        watchers = self._watchers[event.job_id]
        watchers -= {watcher for watcher in tuple(watchers) if not watcher.put(event)}

    def waiting(self, job_id: str) -> str:
        """Why a job waits, if that is the last that was said of it; else empty."""
        current = self._current.get(job_id)
        last = current[-1] if current else None
        return last.detail if isinstance(last, Waiting) else ""

    def forget(self, job_id: str) -> None:
        """A job has ended: its last events need not be replayed any more."""
        self._current.pop(job_id, None)
        self._watchers.pop(job_id, None)

    def close(self) -> None:
        """The process stops: end every subscription, also those to come."""
        self.closed = True
        for watchers in self._watchers.values():
            for watcher in watchers:
                watcher.end()

    @contextmanager
    def subscribe(self, job_id: str) -> Iterator[Subscription]:
        """The current attempt so far, then what happens."""
        subscription = Subscription(self._current.get(job_id, []))
        if self.closed:
            subscription.end()
        self._watchers[job_id].add(subscription)
        try:
            yield subscription
        finally:
            self._watchers[job_id].discard(subscription)
