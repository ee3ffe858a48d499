"""What somebody who watches a job knows so far: a pure function of the events received.

`WatchState.apply` takes one event and gives the next state; `maskwork.watch_view` draws it or prints its notices. It is
NOT a record (only the latest rounds and notices are kept) and reads no clock: times are those of the events.

Rules it upholds:

1. After a reconnection, past rounds and the current attempt come again: what is known already changes nothing.
2. Within a job, (round, attempt) only grows; events of an attempt that has been left are ignored.
3. A session that is resumed after a restart begins in the middle: a stage without its attempt is shown as far as known.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final, assert_never

from maskwork.drop_texts import because, named
from maskwork.job_events import (
    COMPLETED,
    Answered,
    AttemptAborted,
    AttemptOpened,
    ConnectionLost,
    Dropped,
    JobSummary,
    RoundCommitted,
    StageOpened,
    Waiting,
    WatchEvent,
)

KEPT_ROUNDS: Final = 100
KEPT_NOTICES: Final = 100


class NoticeKind(StrEnum):
    """What a notice is about."""

    JOB = "job"
    ROUND = "round"
    DROP = "drop"
    ABORT = "abort"
    WAIT = "wait"
    CONNECTION = "connection"


@dataclass(frozen=True, slots=True)
class Notice:
    """One line for people; `at` is in seconds since the epoch."""

    at: float
    kind: NoticeKind
    text: str


@dataclass(frozen=True, slots=True)
class StageProgress:
    """One stage of the current attempt: whom it waits for, who has answered, when it began and ended."""

    name: str
    opened_at: float
    expected: tuple[str, ...]
    answered: frozenset[str] = frozenset()
    closed_at: float | None = None


@dataclass(frozen=True, slots=True)
class Attempt:
    """The current attempt, or the last one until the next begins.

    Attributes:
        round_number: From 1.
        attempt: From 1.
        opened_at: When the plan was sent, or the first that was heard of it.
        roster: Names, in roster order; for a resumed session those who are still in.
        threshold: The plan's t; None for a resumed session.
        stages: Those opened so far, in order.
        drops: In order.
        outcome: "" while open, then "committed" or "aborted".
    """

    round_number: int
    attempt: int
    opened_at: float
    roster: tuple[str, ...] = ()
    threshold: int | None = None
    stages: tuple[StageProgress, ...] = ()
    drops: tuple[Dropped, ...] = ()
    outcome: str = ""

    @property
    def position(self) -> tuple[int, int]:
        """(round, attempt), which only grows."""
        return self.round_number, self.attempt

    def stage(self, name: str) -> StageProgress | None:
        """The stage of that name, if it was opened."""
        return next((stage for stage in self.stages if stage.name == name), None)

    @property
    def out(self) -> frozenset[str]:
        """Names of those who were dropped."""
        return frozenset(drop.participant for drop in self.drops)


@dataclass(frozen=True, slots=True)
class WatchState:
    """What is known of a job.

    Attributes:
        job: Its latest summary; None before the first.
        rounds: The latest committed rounds, in order, at most `KEPT_ROUNDS`.
        attempt: The current attempt; None before the first.
        waiting: Why nothing moves; None while something does.
        lost: The connection's failure; None while there is a connection.
        notices: The latest notices, in order, at most `KEPT_NOTICES`.
        notice_count: Notices so far, those no longer kept included.
    """

    job: JobSummary | None = None
    rounds: tuple[RoundCommitted, ...] = ()
    attempt: Attempt | None = None
    waiting: Waiting | None = None
    lost: ConnectionLost | None = None
    notices: tuple[Notice, ...] = field(default=(), repr=False)
    notice_count: int = 0

    @property
    def ended(self) -> bool:
        """Whether the job has come to its end."""
        return self.job is not None and self.job.ended

    @property
    def succeeded(self) -> bool:
        """Whether every round was committed."""
        return self.job is not None and self.job.state == COMPLETED

    @property
    def rounds_committed(self) -> int:
        """Rounds committed, from whichever source knows most."""
        told = self.job.rounds_committed if self.job is not None else 0
        taken_back = self.job.rolled_back if self.job is not None else 0
        return max(told, self.rounds[-1].round_number - taken_back if self.rounds else 0)

    @property
    def rounds_total(self) -> int | None:
        """Rounds to commit; None before the job's first summary."""
        return self.job.rounds_total if self.job is not None else None

    def apply(self, event: WatchEvent) -> WatchState:
        """The state after `event`; the same object if it said nothing new."""
        if isinstance(event, ConnectionLost):
            return _connection_lost(self, event)
        state = self if self.lost is None else _connection_restored(self, event.at)
        match event:
            case JobSummary():
                return _job(state, event)
            case AttemptOpened():
                return _attempt_opened(state, event)
            case StageOpened():
                return _stage_opened(state, event)
            case Answered():
                return _answered(state, event)
            case Dropped():
                return _dropped(state, event)
            case RoundCommitted():
                return _round_committed(state, event)
            case AttemptAborted():
                return _attempt_aborted(state, event)
            case Waiting():
                return _waiting(state, event)
            case _:
                assert_never(event)

    def new_notices(self, before: WatchState) -> tuple[Notice, ...]:
        """The notices that came since the earlier state `before`, as far as they are kept."""
        fresh = self.notice_count - before.notice_count
        return self.notices[-fresh:] if fresh else ()


def round_text(event: RoundCommitted, *, rounds_total: int | None) -> str:
    """A committed round in one line."""
    of = f"/{rounds_total}" if rounds_total and event.round_number <= rounds_total else ""
    roster_size = len(event.survivors) + len(event.dropouts)
    parts = [f"round {event.round_number}{of} committed: {len(event.survivors)} of {roster_size} sites"]
    if event.attempt > 1:
        parts[0] += f" at attempt {event.attempt}"
    if event.dropouts:
        parts[0] += f", without {some(event.dropouts)}"
    if metrics := [f"{name} {value:.4g}" for name, value in metrics_of(event).items()]:
        parts.append(", ".join(metrics))
    parts.append(f"{event.seconds:.2f} s, {bytes_text(event.uplink_bytes)}")
    return "; ".join(parts)


def metrics_of(event: RoundCommitted) -> dict[str, float]:
    """The means of a round without the counts: the usual ones first, then the others by name."""
    usual = [name for name in ("train.loss", "eval.loss", "eval.accuracy") if name in event.statistics]
    counts = ("examples", "eval.examples")
    others = sorted(name for name in event.statistics if name not in usual and name not in counts)
    return {name: event.statistics[name] for name in (*usual, *others)}


def dropped_text(event: Dropped) -> str:
    """Who is out and why; a site that declined by its own policy says so itself: "site-b declined: cohort 4 < 5"."""
    why = because(event.reason, event.detail)
    own_words = named(event.participant, why)
    if own_words != f"{event.participant}: {why}":
        return own_words
    return f"{event.participant} is out at {event.stage}: {why}"


def bytes_text(size: int) -> str:
    """A number of bytes for people: ``912 B``, ``1.4 MB``."""
    value, units = float(size), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{size} B" if units[0] == "B" else f"{value:.3g} {units[0]}"


def some(names: tuple[str, ...], limit: int = 6) -> str:
    """Names in a list that stays short."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


# --- one function for each kind of event ----------------------------------------------------------------------------


def _with_notice(state: WatchState, at: float, kind: NoticeKind, text: str) -> WatchState:
    notices = (*state.notices, Notice(at, kind, text))[-KEPT_NOTICES:]
    return replace(state, notices=notices, notice_count=state.notice_count + 1)


def _job(state: WatchState, event: JobSummary) -> WatchState:
    before = state.job
    if before is not None and before.ended:
        return state
    following = replace(state, job=event)
    told = before is not None and event.reason in ("", before.reason)
    if before is not None and before.state == event.state and told:
        return following
    text = (
        f"job {event.name} ({event.job_id}) is {event.state}, {event.rounds_committed} of {event.rounds_total} rounds"
    )
    if event.reason:
        text += f": {event.reason}"
    if event.ended:
        following = replace(following, waiting=None)
    return _with_notice(following, event.at, NoticeKind.JOB, text)


def _attempt_opened(state: WatchState, event: AttemptOpened) -> WatchState:
    if not _is_news(state, event.round_number, event.attempt):
        return state
    if state.attempt is not None and state.attempt.position == (event.round_number, event.attempt):
        return state
    attempt = Attempt(event.round_number, event.attempt, event.at, event.roster, event.threshold)
    return replace(state, attempt=attempt, waiting=None)


def _stage_opened(state: WatchState, event: StageOpened) -> WatchState:
    attempt = _current(state, event)
    if attempt is None or attempt.stage(event.stage) is not None:
        return state
    stages = tuple(
        stage if stage.closed_at is not None else replace(stage, closed_at=event.at) for stage in attempt.stages
    )
    opened = StageProgress(event.stage, event.at, event.expected)
    following = replace(attempt, stages=(*stages, opened), roster=attempt.roster or event.expected)
    return replace(state, attempt=following, waiting=None)


def _answered(state: WatchState, event: Answered) -> WatchState:
    attempt = _current(state, event)
    stage = None if attempt is None else attempt.stage(event.stage)
    if attempt is None or stage is None or event.participant in stage.answered:
        return state
    answered = replace(stage, answered=stage.answered | {event.participant})
    stages = tuple(answered if s is stage else s for s in attempt.stages)
    return replace(state, attempt=replace(attempt, stages=stages))


def _dropped(state: WatchState, event: Dropped) -> WatchState:
    attempt = _current(state, event)
    if attempt is None or event.participant in attempt.out:
        return state
    following = replace(state, attempt=replace(attempt, drops=(*attempt.drops, event)))
    text = f"round {event.round_number}: {dropped_text(event)}"
    return _with_notice(following, event.at, NoticeKind.DROP, text)


def _round_committed(state: WatchState, event: RoundCommitted) -> WatchState:
    if state.rounds and event.round_number <= state.rounds[-1].round_number:
        return state
    attempt = state.attempt
    if attempt is not None and attempt.position <= (event.round_number, event.attempt):
        seen = attempt.position == (event.round_number, event.attempt)
        attempt = _closed(attempt, event.at, "committed") if seen else None
    rounds = (*state.rounds, event)[-KEPT_ROUNDS:]
    following = replace(state, rounds=rounds, attempt=attempt, waiting=None)
    text = round_text(event, rounds_total=state.rounds_total)
    return _with_notice(following, event.committed_at or event.at, NoticeKind.ROUND, text)


def _attempt_aborted(state: WatchState, event: AttemptAborted) -> WatchState:
    attempt = _current(state, event)
    if attempt is None:
        return state
    following = replace(state, attempt=_closed(attempt, event.at, "aborted"))
    text = (
        f"round {event.round_number}, attempt {event.attempt} came to nothing: {because(event.reason, event.detail)}; "
        "nothing of it is used"
    )
    return _with_notice(following, event.at, NoticeKind.ABORT, text)


def _waiting(state: WatchState, event: Waiting) -> WatchState:
    if state.waiting is not None and state.waiting.detail == event.detail:
        return state
    return _with_notice(replace(state, waiting=event), event.at, NoticeKind.WAIT, f"waiting: {event.detail}")


def _connection_lost(state: WatchState, event: ConnectionLost) -> WatchState:
    following = replace(state, lost=event)
    if state.lost is not None:
        return following
    text = f"connection to the coordinator lost ({event.detail}); trying again"
    return _with_notice(following, event.at, NoticeKind.CONNECTION, text)


def _connection_restored(state: WatchState, at: float) -> WatchState:
    since = at if state.lost is None else max(at, state.lost.at)  # what comes first may be an old round
    return _with_notice(replace(state, lost=None), since, NoticeKind.CONNECTION, "connected to the coordinator again")


def _current(state: WatchState, event: StageOpened | Answered | Dropped | AttemptAborted) -> Attempt | None:
    """The attempt that `event` belongs to, if it is open: the current one, or one that was not announced."""
    if not _is_news(state, event.round_number, event.attempt):
        return None
    attempt = state.attempt
    if attempt is None or attempt.position < (event.round_number, event.attempt):
        return Attempt(event.round_number, event.attempt, event.at)
    return None if attempt.outcome else attempt


def _is_news(state: WatchState, round_number: int, attempt: int) -> bool:
    committed = bool(state.rounds) and round_number <= state.rounds[-1].round_number
    left = state.attempt is not None and (round_number, attempt) < state.attempt.position
    return not committed and not left


def _closed(attempt: Attempt, at: float, outcome: str) -> Attempt:
    stages = tuple(stage if stage.closed_at is not None else replace(stage, closed_at=at) for stage in attempt.stages)
    return replace(attempt, stages=stages, outcome=outcome)
