"""What a run comes to: recovery times from what was written, and the page that shows them."""

from dataclasses import replace

from tests.chaos.campaign import Struck
from tests.chaos.federation import Life
from tests.chaos.figures import Spread, figures, markdown, restarts_to_plans
from tests.chaos.plan import Kind
from tests.chaos.test_chaos_invariants import GOOD, an_attempt
from tests.chaos.written import Attempt, Written


def opened(at: float) -> Attempt:
    return replace(an_attempt(1), opened_at=at)


def start(at: float, ended_at: float = 0.0) -> Life:
    return Life("coordinator", 0, at, ended_at, -9 if ended_at else None, killed=bool(ended_at))


def test_a_restart_is_timed_to_the_next_plan_of_the_same_process() -> None:
    lives = (start(0, 10), start(11, 12), start(13, 20), Life("site-a", 3, 14.0), start(21))
    written = Written(attempts=tuple(map(opened, (1.0, 9.0, 15.5, 22.0))), lives=lives)
    # The first start is none after a kill; the second was killed before it could plan.
    assert restarts_to_plans(written) == ([2.5, 1.0], 1)


def test_a_last_start_with_nothing_left_to_plan_is_not_counted() -> None:
    assert restarts_to_plans(Written(attempts=(opened(1.0),), lives=(start(0, 2), start(3)))) == ([], 0)


def test_a_spread_is_the_median_and_the_worst() -> None:
    assert Spread.of([3.0, 1.0, 2.0, 9.0]) == Spread(4, 2.5, 9.0)
    assert Spread.of([]) == Spread(0, 0.0, 0.0)


def test_the_page_counts_faults_by_kind_and_moment_and_names_what_is_wrong() -> None:
    struck = [
        Struck(Kind.KILL_COORDINATOR, "unmask", "unmask", "coordinator", 0.2, 0.1),
        Struck(Kind.KILL_COORDINATOR, "unmask", "commit", "coordinator", 1.5, 0.1),
        Struck(Kind.CUT, "unmask", "unmask", "site-a", 1.75, 0.1),
    ]
    found = figures(GOOD, struck, seed=5, seconds=90.0, violations=["a round is missing"])
    assert (found.kills, found.rounds, found.jobs, found.attempts) == (2, 2, 1, {"committed": 2})
    assert found.fault_to_commit == Spread(3, 0.5, 0.8)
    page = markdown(found, "python -m tests.chaos")
    assert "| fault | unmask | commit | all |" in page
    assert "| kill coordinator | 1 | 1 | 2 |" in page
    assert "| all | 2 | 1 | 3 |" in page
    assert "| faults (of these kills) | 3 (2) |" in page
    assert page.endswith("- a round is missing\n")
    assert found.as_json()["faults"]["cut connection"] == {"unmask": 1}
