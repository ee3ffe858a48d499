"""Who chooses what happens next: a seed, or a list.

A `RandomSchedule` lets things happen in a random order, with faults between them, then ends the faults, heals
everything and lets the job finish; one that does not finish then is a failure.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from tests.simulation.invariants import Violation
from tests.simulation.operations import COORDINATOR, FAULTS, LIE_VARIANTS, Channel, Kind, Op
from tests.simulation.world import Settings, World

FAULT_SHARE = 0.12
MOST_FAULTS = 30
MOST_LIES_DOWN = 2
HEALED_MOST = 6_000
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
        self._lies_down_left = self._random.randint(0, MOST_LIES_DOWN)
        self._to_heal: list[Op] | None = None
        self._since_healed = 0

    def next(self, world: World) -> Op | None:
        """The next operation."""
        if world.completed and world.coordinator is not None and not self._still_faulty(world):
            return None
        if not self._still_faulty(world):
            return self._healing(world)
        if self._random.random() < FAULT_SHARE and (fault := self._fault(world)) is not None:
            self._faults_left -= 1
            return fault
        return self._progress(world)

    def _still_faulty(self, world: World) -> bool:
        return self._faults_left > 0 and not world.completed

    def _progress(self, world: World) -> Op:
        possible = list(world.progress())
        if not possible or self._random.random() < 0.02:
            return Op(Kind.ADVANCE, number=self._random.choice((0, 0, 0, 1, 2, 3)))
        chosen = self._random.choice(possible)
        if chosen.kind is Kind.TRANSFER:
            return Op(Kind.TRANSFER, chosen.target, number=self._random.randint(1, 3))
        return chosen

    def _healing(self, world: World) -> Op:
        if self._to_heal is None:
            self._to_heal = [Op(Kind.CUT, name) for name in world.places]
            # A site that was left out is asked again when it connects anew, which its operator sees to.
        if self._to_heal:
            return self._to_heal.pop()
        self._since_healed += 1
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
