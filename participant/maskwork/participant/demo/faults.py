"""When the demo kills whom, and what came of it: a pure function of the job's events, without timers.

The first victim is the site whose dealing (step 1) the coordinator is the first to have: the others are still to come,
so the kill lands before step 2 is even asked for. It is then in U2 and must not be in U3. The second victim is the
first other site whose upload is complete: it is in U3 and must not have answered Unmask.

It is NOT what kills anybody: `Injector.take` says whom, the caller does it. And it believes no plan: whether a fault
happened as planned is read from the events that followed, and one that came too late does not count and is tried again
in a later round.

Rule it upholds: one fault at a time. The next one is armed when the victim of the last one was a survivor again, and
strikes only in an attempt in which every site takes part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, TypeAlias

from maskwork.job_events import Answered, AttemptAborted, AttemptOpened, RoundCommitted, StageOpened, WatchEvent


class Moment(StrEnum):
    """Where in the protocol a site is killed."""

    BEFORE_UPLOAD = "after it dealt its shares, before its upload"
    BEFORE_UNMASKING = "after its upload, before unmasking"


_TRIGGERS: Final = {Moment.BEFORE_UPLOAD: "share-keys", Moment.BEFORE_UNMASKING: "masked-update"}


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault that is planned: when in a round, and the first round in which it may strike."""

    moment: Moment
    from_round: int


@dataclass(frozen=True, slots=True)
class Strike:
    """A site that is to be killed now, or was killed, and in which attempt."""

    moment: Moment
    victim: str
    round_number: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Landed:
    """The round of a strike was committed, and the victim was where it was meant to be."""

    strike: Strike


@dataclass(frozen=True, slots=True)
class Missed:
    """The strike did not do what was planned; it does not count and will be tried again."""

    strike: Strike
    why: str


@dataclass(frozen=True, slots=True)
class Rejoined:
    """The victim is among a later round's survivors."""

    strike: Strike
    round_number: int


Turn: TypeAlias = Strike | Landed | Missed | Rejoined


def planned(rounds: int) -> tuple[Fault, ...]:
    """The demo's two faults: in the fifth and in the tenth of twenty rounds, and in proportion.

    Args:
        rounds: Of the job, 4 or more.
    """
    first = max(1, rounds // 4)
    return (
        Fault(Moment.BEFORE_UPLOAD, first),
        Fault(Moment.BEFORE_UNMASKING, max(first + 1, rounds // 2)),
    )


class Injector:
    """Follows a job's events and says whom to kill.

    Attributes:
        turns: Everything that happened, in order.
    """

    def __init__(self, faults: Sequence[Fault], *, participants: int) -> None:
        """Plan `faults`, one after the other, in a federation of so many sites."""
        self._faults = list(faults)
        self._participants = participants
        self._whole: tuple[int, int] | None = None  # the attempt that every site takes part in
        self._strike: Strike | None = None
        self._in_u2 = self._unmasked = False
        self._missing: Strike | None = None
        self.turns: list[Turn] = []

    @property
    def landed(self) -> tuple[Landed, ...]:
        """The faults that happened as planned."""
        return tuple(turn for turn in self.turns if isinstance(turn, Landed))

    @property
    def rejoined(self) -> tuple[Rejoined, ...]:
        """The victims that came back."""
        return tuple(turn for turn in self.turns if isinstance(turn, Rejoined))

    def take(self, event: WatchEvent) -> Turn | None:
        """What follows from an event: a site to kill now, or what came of an earlier kill; None: nothing."""
        turn: Turn | None
        if self._strike is not None:
            turn = self._judge(self._strike, event)
        elif self._missing is not None:
            turn = self._look_for(self._missing, event)
        else:
            turn = self._aim(event)
        if turn is not None:
            self.turns.append(turn)
        return turn

    def _aim(self, event: WatchEvent) -> Strike | None:
        if isinstance(event, AttemptOpened):
            whole = len(event.roster) == self._participants
            self._whole = (event.round_number, event.attempt) if whole else None
        if not self._faults or not isinstance(event, Answered):
            return None
        fault = self._faults[0]
        earlier = {landed.strike.victim for landed in self.landed}
        if (
            event.stage != _TRIGGERS[fault.moment]
            or event.round_number < fault.from_round
            or event.participant in earlier
            or self._whole != (event.round_number, event.attempt)
        ):
            return None
        self._in_u2 = self._unmasked = False
        self._strike = Strike(fault.moment, event.participant, event.round_number, event.attempt)
        return self._strike

    def _judge(self, strike: Strike, event: WatchEvent) -> Landed | Missed | None:
        match event:
            case StageOpened() if _same(strike, event) and event.stage == "masked-update":
                self._in_u2 = strike.victim in event.expected
            case Answered() if _same(strike, event) and event.participant == strike.victim:
                self._unmasked = self._unmasked or event.stage == "unmask"
            case AttemptAborted() if _same(strike, event):
                return self._missed(strike, f"the attempt came to nothing ({event.reason})")
            case RoundCommitted() if event.round_number >= strike.round_number:
                why = _shortfall(strike, event, in_u2=self._in_u2, unmasked=self._unmasked)
                if why:
                    return self._missed(strike, why)
                self._strike, self._missing = None, strike
                return Landed(strike)
            case _:
                pass
        return None

    def _missed(self, strike: Strike, why: str) -> Missed:
        self._strike = self._whole = None
        return Missed(strike, why)

    def _look_for(self, strike: Strike, event: WatchEvent) -> Rejoined | None:
        if not isinstance(event, RoundCommitted) or event.round_number <= strike.round_number:
            return None
        if strike.victim not in event.survivors:
            return None
        self._missing = self._whole = None
        del self._faults[0]
        return Rejoined(strike, event.round_number)


def _same(strike: Strike, event: StageOpened | Answered | AttemptAborted) -> bool:
    return (event.round_number, event.attempt) == (strike.round_number, strike.attempt)


def _shortfall(strike: Strike, committed: RoundCommitted, *, in_u2: bool, unmasked: bool) -> str:
    """In what a strike is not what was planned; empty: it is."""
    if (committed.round_number, committed.attempt) != (strike.round_number, strike.attempt):
        return "the round was committed by another attempt"
    survived = strike.victim in committed.survivors
    if strike.moment is Moment.BEFORE_UPLOAD:
        if survived:
            return "its upload was faster than the kill"
        return "" if in_u2 else "it was no longer in U2 when uploads began"
    if not survived:
        return "its upload was not counted"
    return "its answer to Unmask was faster than the kill" if unmasked else ""
