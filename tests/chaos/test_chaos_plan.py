"""The plan of faults: the same for the same seed, as many kills as asked for, every moment and every pair covered."""

import itertools
from collections import Counter

import pytest
from tests.chaos.plan import AIMED, KILLS, MOST_WITHOUT_A_COMMIT, RECOVERY, Kind, planned

from maskwork.job_events import STAGES


def test_the_same_seed_plans_the_same_faults_and_another_seed_others() -> None:
    assert planned(7, 50) == planned(7, 50)
    assert planned(7, 50) != planned(8, 50)


@pytest.mark.parametrize("kills", [1, 6, 60, 200])
def test_as_many_kills_as_asked_for_and_the_last_fault_is_one(kills: int) -> None:
    plan = planned(3, kills)
    assert sum(f.kind in KILLS for f in plan) == kills
    assert plan[-1].kind in KILLS


def test_no_kills_is_no_plan() -> None:
    with pytest.raises(ValueError, match="1 kill or more"):
        planned(1, 0)


@pytest.mark.parametrize("seed", range(20))
def test_a_run_of_200_kills_aims_every_kind_at_every_moment_and_at_all_moments_evenly(seed: int) -> None:
    plan = planned(seed, 200)
    pairs = Counter((f.kind, f.moment) for f in plan if f.moment != RECOVERY)
    assert {kind for kind, _ in pairs} == set(Kind)
    assert set(pairs) == {(kind, moment) for kind in Kind for moment in AIMED}
    moments = Counter(f.moment for f in plan)
    assert max(moments[m] for m in AIMED) - min(moments[m] for m in AIMED) <= len(Kind)
    assert moments[RECOVERY] > 10


def test_even_a_short_run_aims_at_every_stage() -> None:
    assert set(STAGES) <= {f.moment for f in planned(1, 8)}


@pytest.mark.parametrize("seed", range(20))
def test_recoveries_follow_kills_of_the_coordinator_and_commits_are_waited_for(seed: int) -> None:
    plan = planned(seed, 200)
    for before, fault in itertools.pairwise(plan):
        if fault.moment == RECOVERY:
            assert (before.kind, before.waits) == (Kind.KILL_COORDINATOR, False)
            assert before.moment != RECOVERY
    without = 0
    for fault in plan:
        without = 0 if fault.waits else without + 1
        assert without < MOST_WITHOUT_A_COMMIT
