"""Every counterexample that a campaign found, shrunk, under the name of what went wrong; and scenarios worth a name.

A new one: `python -m tests.simulation --shrink SEED` prints the operations; they become a list here.
"""

from __future__ import annotations

import pytest
from tests.simulation.operations import COORDINATOR, Channel, Kind, Op
from tests.simulation.schedules import HEALED_MOST
from tests.simulation.world import REMOVING, Settings, World

from maskwork.coordinator.records import AttemptOutcome

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # see conftest.py
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


class AtStage:
    """Lets everything happen in order until a stage opens for the first time, then does some things, then goes on."""

    def __init__(self, stage: str, operations: list[Op], *, then: list[Op] | None = None) -> None:
        self._stage = stage
        self._operations = [*operations, *(then or [])]
        self._begun = False
        self._left = HEALED_MOST

    def next(self, world: World) -> Op | None:
        """The next operation."""
        if world.completed and world.coordinator is not None and not self._operations:
            return None
        self._left -= 1
        assert self._left, f"the job does not finish: {world.record}"
        self._begun = self._begun or world.stage_now == self._stage
        if self._begun and self._operations:
            return self._operations.pop(0)
        return next(world.progress(), None) or Op(Kind.ADVANCE)


def outcomes(world: World) -> list[AttemptOutcome]:
    """How the attempts at round 1 ended."""
    return [outcome for round_number, outcome in world.ended if round_number == 1]


@pytest.mark.parametrize("stage", ["advertise-keys", "share-keys", "masked-update", "consistency-check"])
def test_a_coordinator_killed_before_unmasking_makes_a_new_attempt(stage: str) -> None:
    world = World(Settings(sites=4, rounds=1), AtStage(stage, [Op(Kind.CRASH)])).run()
    assert outcomes(world) == [AttemptOutcome.ABANDONED, AttemptOutcome.COMMITTED]


@pytest.mark.parametrize("stage", ["unmask", REMOVING])
def test_a_coordinator_killed_after_asking_to_unmask_resumes_that_session(stage: str) -> None:
    world = World(Settings(sites=4, rounds=1), AtStage(stage, [Op(Kind.CRASH)])).run()
    assert outcomes(world) == [AttemptOutcome.COMMITTED]


def test_all_killed_at_once_after_asking_to_unmask_repeat_with_the_same_survivors() -> None:
    everyone = [Op(Kind.CRASH), *(Op(Kind.CRASH, f"site-{i}") for i in range(1, 5))]
    world = World(Settings(sites=4, rounds=1), AtStage("unmask", everyone)).run()
    assert outcomes(world)[-1] is AttemptOutcome.COMMITTED
    assert len(outcomes(world)) > 1
    assert len(world.watch.committed[1].survivors) == 4


def test_an_upload_that_breaks_twice_goes_on_from_where_it_was() -> None:
    piece, broken = Op(Kind.TRANSFER, "site-2", number=3), Op(Kind.BREAK_TRANSFER, "site-2")
    world = World(Settings(sites=4, rounds=1), AtStage("masked-update", [piece, broken, piece, broken])).run()
    assert outcomes(world) == [AttemptOutcome.COMMITTED]
    assert "site-2" in world.watch.committed[1].survivors


def test_a_connection_that_is_cut_and_healed_within_the_grace_costs_nothing() -> None:
    cut = [Op(Kind.CUT, "site-3"), *(Op(Kind.DELIVER, "site-3", channel) for channel in Channel)]
    world = World(Settings(sites=4, rounds=1), AtStage("share-keys", cut)).run()
    assert outcomes(world) == [AttemptOutcome.COMMITTED]
    assert len(world.watch.committed[1].survivors) == 4


def test_a_worker_that_dies_while_unmasking_is_tried_again() -> None:
    world = World(Settings(sites=4, rounds=1), AtStage(REMOVING, [Op(Kind.FAIL_WORK)])).run()
    assert outcomes(world) == [AttemptOutcome.COMMITTED]


def test_a_coordinator_asked_to_stop_while_unmasking_resumes_after_it() -> None:
    world = World(Settings(sites=4, rounds=1), AtStage("unmask", [Op(Kind.STOP, COORDINATOR)])).run()
    assert outcomes(world) == [AttemptOutcome.COMMITTED]
