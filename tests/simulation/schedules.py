"""Who chooses what happens next: a seed, or a list.

A `RandomSchedule` lets things happen in a random order, with faults between them, then ends the faults, heals
everything and lets the job finish; one that does not finish then is a failure.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from tests.simulation.invariants import Violation
from tests.simulation.operations import COORDINATOR, FAULTS, LIE_VARIANTS, Channel, Kind, Op
from tests.simulation.world import DOWN, REMOVING, Settings, World

FAULT_SHARE = 0.12
LATE = {"consistency-check": 0.25, "unmask": 0.35, REMOVING: 0.5, DOWN: 0.3}
"""The share where little happens: a stage of a few messages would hardly ever meet a fault, and what is decided there
cannot be taken back."""
MOST_FAULTS = 30
MOST_FAULTS_OF_A_LATE_STAGE = 4
SLOW = ("masked-update", "consistency-check", "unmask")
"""Where a straggler stands still, or in the first of them: its upload moves on when nobody waits for it any more."""
LATE_PATIENCE = 400
"""So many operations a run goes on for the sake of late faults alone, before everything is healed."""
MOST_LIES_DOWN = 2
HEALED_MOST = 6_000
OPERATORS_LOOK = 1_500
"""So many operations after everything was healed, the sites' operators do what the job asks of them: start the sites
again that it misses. It may miss one that was told a lie before, and was left out when that came to light after."""
_ON_CHANNELS = frozenset({Kind.DROP, Kind.DUPLICATE, Kind.REORDER, Kind.DELAY})
_KINDS = sorted(FAULTS)


def settings_of(seed: int) -> Settings:
    """What a seed makes of a run."""
    drawn = random.Random(f"settings {seed}")
    sites = drawn.choice((4, 4, 5, 5, 6))
    return Settings(seed=seed, sites=sites, rounds=drawn.choice((1, 1, 2)), liars=drawn.choice((0, 1)))


class RandomSchedule:
    """Chooses by a seed."""

    def __init__(self, settings: Settings) -> None:
        self._random = random.Random(f"schedule {settings.seed}")
        self._faults_left = self._random.randint(3, MOST_FAULTS)
        self._late_left = {stage: self._random.randint(0, MOST_FAULTS_OF_A_LATE_STAGE) for stage in LATE}
        self._lies_down_left = self._random.randint(0, MOST_LIES_DOWN)
        self._patience = LATE_PATIENCE
        self._straggler: int | None = self._random.choice((*range(settings.sites), *(None,) * 3 * settings.sites))
        self._slow_in = SLOW[: self._random.randint(1, len(SLOW))]
        self._to_heal: list[Op] | None = None
        self._since_healed = 0

    def next(self, world: World) -> Op | None:
        """The next operation."""
        if world.completed and world.coordinator is not None and not self._still_faulty(world):
            return None
        if not self._still_faulty(world):
            return self._healing(world)
        stage = world.stage_now
        late = self._late_left.get(stage, 0) > 0
        share = LATE[stage] if late else FAULT_SHARE if self._faults_left else 0.0
        if self._random.random() < share and (fault := self._fault(world)) is not None:
            if late:
                self._late_left[stage] -= 1
            else:
                self._faults_left -= 1
            return fault
        if not self._faults_left:
            self._patience -= 1
        return self._progress(world)

    def _still_faulty(self, world: World) -> bool:
        later = any(self._late_left.values()) and self._patience > 0
        return (self._faults_left > 0 or later) and not world.completed

    def _progress(self, world: World) -> Op:
        possible = [op for op in world.progress() if not self._straggles(world, op)]
        if not possible or self._random.random() < 0.02:
            return Op(Kind.ADVANCE, number=self._random.choice((0, 0, 0, 1, 2, 3)))
        chosen = self._random.choice(possible)
        if chosen.kind is Kind.TRANSFER:
            return Op(Kind.TRANSFER, chosen.target, number=self._random.randint(1, 3))
        return chosen

    def _straggles(self, world: World, op: Op) -> bool:
        """Whether this is a site that is too slow for its deadline, in its upload or in hearing that it is over."""
        if self._straggler is None or world.stage_now not in self._slow_in:
            return False
        if op.kind is not Kind.TRANSFER and (op.channel is not Channel.DOWN or world.stage_now == SLOW[0]):
            return False
        return op.target == tuple(world.places)[self._straggler]

    def _healing(self, world: World) -> Op:
        if self._to_heal is None:
            self._to_heal = [Op(Kind.CUT, name) for name in world.places]
        if self._to_heal:
            return self._to_heal.pop()
        self._since_healed += 1
        if self._since_healed % OPERATORS_LOOK == 0:
            self._to_heal = [Op(Kind.CUT, name) for name in world.places]
        if self._since_healed >= HEALED_MOST:
            raise Violation(f"the job does not finish though nothing fails any more: {world.record}")
        return self._progress(world)

    def _fault(self, world: World) -> Op | None:
        kind = self._random.choice(_KINDS)
        site = self._random.choice(tuple(world.places))
        channel = self._random.choice(tuple(Channel))
        target = COORDINATOR if self._random.random() < 0.4 else site
        match kind:
            case _ if kind in _ON_CHANNELS:
                return self._on_channel(world, kind)
            case Kind.CRASH:
                return Op(kind, target, number=self._random.choice((0, 1, 2, 3, 5, 8, 13, 21, 34)))
            case Kind.STOP | Kind.FAIL_WORK:
                return Op(kind, target)
            case Kind.LIE_UP if world.settings.liars:
                return Op(kind, tuple(world.places)[-1], Channel.UP, self._random.randrange(LIE_VARIANTS))
            case Kind.LIE_DOWN if self._lies_down_left:
                self._lies_down_left -= 1
                return Op(kind, site, Channel.DOWN, self._random.randrange(LIE_VARIANTS))
            case Kind.LIE_UP | Kind.LIE_DOWN:
                return None
            case _:
                return Op(kind, site, channel)

    def _on_channel(self, world: World, kind: Kind) -> Op | None:
        """Something that a message is needed for: where one is."""
        full = [op for op in world.progress() if op.kind is Kind.DELIVER and op.number == 0]
        if not full:
            return None
        chosen = self._random.choice(full)
        return Op(kind, chosen.target, chosen.channel, self._random.randrange(4))


class ListedSchedule:
    """Performs a list, then lets the rest happen in order and without faults."""

    def __init__(self, operations: Sequence[Op]) -> None:
        self._left = list(reversed(operations))
        self._since = 0

    def next(self, world: World) -> Op | None:
        """The next operation."""
        if self._left:
            return self._left.pop()
        if world.completed and world.coordinator is not None:
            return None
        self._since += 1
        if self._since >= HEALED_MOST:
            raise Violation(f"the job does not finish: {world.record}")
        return next(world.progress(), None) or Op(Kind.ADVANCE)
