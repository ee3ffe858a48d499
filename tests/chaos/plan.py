"""Which faults, where in the protocol, for how long: a pure function of the seed.

A fault is of a kind and meant for a moment: in one of the five stages, right after a commit, or while the coordinator,
just killed, is coming back. Kinds are dealt from a deck that is shuffled anew each time it is empty; the moment
is one at which that kind struck least. So a run of any length covers moments evenly, and a long one every pair.

It is NOT where anything is broken. Whom a fault hits, how long after the moment's event, and whether the run then waits
for a commit are drawn here too: the same seed, the same plan. What the processes make of it is up to the machine.
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from maskwork.job_events import STAGES


class Kind(StrEnum):
    KILL_PARTICIPANT = "kill participant"
    KILL_COORDINATOR = "kill coordinator"
    KILL_TRAINER = "kill training worker"
    KILL_AGGREGATOR = "kill aggregation worker"
    STOP_PARTICIPANT = "stop participant"
    STOP_COORDINATOR = "stop coordinator"
    CUT = "cut connection"
    HOLD = "hold connection"


KILLS: Final = frozenset({Kind.KILL_PARTICIPANT, Kind.KILL_COORDINATOR, Kind.KILL_TRAINER, Kind.KILL_AGGREGATOR})
DECK: Final = (*Kind, *(Kind.KILL_PARTICIPANT, Kind.KILL_COORDINATOR) * 3)
COMMIT, WAITING, RECOVERY = "commit", "waiting", "recovery"
AIMED: Final = (*STAGES, COMMIT)
MOMENTS: Final = (*AIMED, WAITING, RECOVERY)
"""Where a fault can strike, in the order of a round; a fault is aimed at one and may land in the next."""

LONGEST_AIM_S: Final = {"masked-update": 0.15, RECOVERY: 1.5}
SHORT_AIM_S: Final = 0.02
"""Only uploads take long; of any other stage nothing would be left."""
LONGEST_STOP_S: Final = 2.5
LONGEST_DOWN_S: Final = 0.5
MOST_WITHOUT_A_COMMIT: Final = 3


@dataclass(frozen=True, slots=True)
class Planned:
    """One fault.

    Attributes:
        kind: What is done.
        moment: One of `AIMED`, or `RECOVERY`: after the coordinator was started again.
        victim: Counts the sites that could be hit; without meaning for the coordinator.
        delay_s: From the event that begins the moment to the fault.
        lasts_s: How long something is stopped, cut or held, or a killed service is down.
        waits: Whether a round must be committed before the next fault.
    """

    kind: Kind
    moment: str
    victim: int
    delay_s: float
    lasts_s: float
    waits: bool


def planned(seed: int) -> Iterator[Planned]:
    """Faults without end: how many come of them only the run can tell, since a kill may find nobody to hit."""
    rng = random.Random(seed)
    deck: list[Kind] = []
    struck: Counter[tuple[Kind, str]] = Counter()
    faults: list[Planned] = []
    since_commit = 0
    while True:
        if not deck:
            deck = sorted(DECK)
            rng.shuffle(deck)
        kind = deck.pop()
        down = bool(faults) and faults[-1].kind is Kind.KILL_COORDINATOR and faults[-1].moment != RECOVERY
        moment = RECOVERY if down and not faults[-1].waits else _least_struck(kind, struck, faults, rng)
        struck[kind, moment] += 1
        since_commit += 1
        waits = since_commit >= MOST_WITHOUT_A_COMMIT or rng.random() < 0.5
        if waits:
            since_commit = 0
        faults.append(
            Planned(
                kind=kind,
                moment=moment,
                victim=rng.randrange(1 << 30),
                delay_s=rng.uniform(0, LONGEST_AIM_S.get(moment, SHORT_AIM_S)),
                lasts_s=_lasts(kind, rng),
                waits=waits,
            )
        )
        yield faults[-1]


def _least_struck(kind: Kind, struck: Counter[tuple[Kind, str]], faults: Sequence[Planned], rng: random.Random) -> str:
    overall = Counter(f.moment for f in faults)
    return min(AIMED, key=lambda m: (struck[kind, m], overall[m], rng.random()))


def _lasts(kind: Kind, rng: random.Random) -> float:
    if kind in KILLS:
        return rng.uniform(0, LONGEST_DOWN_S)
    # Short ones are most: within a connection's grace the same session has to go on.
    return LONGEST_STOP_S * rng.random() ** 2
