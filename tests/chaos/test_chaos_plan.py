"""The plan of faults: the same for the same seed, as many kills as asked for, every moment and every pair covered."""

import itertools
from collections import Counter

import pytest
from tests.chaos.plan import AIMED, KILLS, MOST_WITHOUT_A_COMMIT, RECOVERY, Kind, Planned, planned

from maskwork.job_events import STAGES


def first(count: int, *, seed: int) -> list[Planned]:
    return list(itertools.islice(planned(seed), count))


def test_the_same_seed_plans_the_same_faults_and_another_seed_others() -> None:
    assert first(50, seed=7) == first(50, seed=7)
    assert first(50, seed=7) != first(50, seed=8)


@pytest.mark.parametrize("seed", range(20))
def test_a_run_of_280_faults_aims_every_kind_at_every_moment_and_at_all_moments_evenly(seed: int) -> None:
    plan = first(280, seed=seed)
    pairs = Counter((f.kind, f.moment) for f in plan if f.moment != RECOVERY)
    assert {kind for kind, _ in pairs} == set(Kind)
    assert set(pairs) == {(kind, moment) for kind in Kind for moment in AIMED}
    assert sum(f.kind in KILLS for f in plan) == 200
    moments = Counter(f.moment for f in plan)
    assert max(moments[m] for m in AIMED) - min(moments[m] for m in AIMED) <= len(Kind)
    assert moments[RECOVERY] > 10


def test_even_a_short_run_aims_at_every_stage() -> None:
    assert set(STAGES) <= {f.moment for f in first(10, seed=1)}


@pytest.mark.parametrize("seed", range(20))
def test_recoveries_follow_kills_of_the_coordinator_and_commits_are_waited_for(seed: int) -> None:
    plan = first(280, seed=seed)
    for before, fault in itertools.pairwise(plan):
        if fault.moment == RECOVERY:
            assert (before.kind, before.waits) == (Kind.KILL_COORDINATOR, False)
            assert before.moment != RECOVERY
    without = 0
    for fault in plan:
        without = 0 if fault.waits else without + 1
        assert without < MOST_WITHOUT_A_COMMIT
