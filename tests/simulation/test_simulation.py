"""A few hundred simulated runs, and whether the simulation would notice.

`make sim SEEDS=10000` is the campaign. Here are enough runs for a change that breaks something common, and a test for
each invariant that shows it a violation.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.secagg.cohort import make_plan
from tests.simulation.campaign import run_seeds
from tests.simulation.invariants import Violation, Watch
from tests.simulation.operations import COORDINATOR, Channel, Kind, Op
from tests.simulation.schedules import ListedSchedule, RandomSchedule, settings_of
from tests.simulation.world import Settings, World

from maskwork.coordinator.audit import LOG_NAME
from maskwork.coordinator.records import AttemptRecord, CommittedRound, ResumeRecord
from maskwork.secagg.keys import PublicKey, ShareKind
from maskwork.secagg.messages import AdvertiseKeys, RevealedShare, Unmask
from maskwork.secagg.plan import session_id
from maskwork.wire.codec import encode_plan

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # see conftest.py
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

FIRST = 1_000_000
RUNS = 25


@pytest.mark.parametrize("part", range(10))
def test_random_runs_hold_every_invariant(part: int) -> None:
    outcome = run_seeds(range(FIRST + RUNS * part, FIRST + RUNS * (part + 1)))
    assert outcome.failures == []
    assert outcome.runs == RUNS


def test_a_world_without_faults_commits_every_round_at_the_first_attempt() -> None:
    world = World(Settings(sites=5, rounds=3), ListedSchedule([])).run()
    assert world.watch.attempts == len(world.watch.committed) == 3
    assert all(len(committed.survivors) == 5 for committed in world.watch.committed.values())


def test_the_same_seed_gives_the_same_run() -> None:
    settings = settings_of(FIRST)
    first, second = (World(settings, RandomSchedule(settings)).run() for _ in range(2))
    assert first.operations == second.operations
    assert first.watch.committed.keys() == second.watch.committed.keys()
    assert [c.survivors for c in first.watch.committed.values()] == [
        c.survivors for c in second.watch.committed.values()
    ]


def test_the_operations_of_a_run_are_enough_to_repeat_it() -> None:
    settings = settings_of(FIRST + 1)
    random_run = World(settings, RandomSchedule(settings)).run()
    listed_run = World(settings, ListedSchedule(random_run.operations)).run()
    assert listed_run.coverage == random_run.coverage
    assert [c.model for c in listed_run.watch.committed.values()] == [
        c.model for c in random_run.watch.committed.values()
    ]


@pytest.mark.parametrize("writes", range(0, 40, 4))
def test_a_coordinator_killed_after_any_number_of_effects_finishes_the_job(writes: int) -> None:
    operations = [Op(Kind.CRASH, COORDINATOR, number=writes), Op(Kind.CRASH, "site-1", number=writes)]
    world = World(Settings(sites=4, rounds=2), ListedSchedule(operations)).run()
    assert len(world.watch.committed) == 2


# --- would it notice? -------------------------------------------------------------------------------------------------

PLAN = replace(make_plan(4), federation="simulated", round_number=1)
PLAN_BYTES = encode_plan(PLAN)
SESSION = session_id(PLAN_BYTES)
OTHER = bytes(32)


def attempt(plan_bytes: bytes = PLAN_BYTES) -> AttemptRecord:
    return AttemptRecord("job-1", 1, 1, session_id(plan_bytes), plan_bytes, b"", 0.0)


def committed(round_number: int = 1) -> CommittedRound:
    return CommittedRound("job-1", round_number, 1, SESSION, OTHER, ("site-1",), (), {}, {}, 0, 0.0)


def test_a_session_or_a_nonce_twice_is_a_violation() -> None:
    watch = Watch()
    watch.coordinator_wrote("open_attempt", (attempt(),), {})
    with pytest.raises(Violation, match="session id occurs twice"):
        watch.coordinator_wrote("open_attempt", (attempt(),), {})
    with pytest.raises(Violation, match="nonce occurs twice"):
        watch.coordinator_wrote("open_attempt", (attempt(encode_plan(replace(PLAN, attempt=2))),), {})


def test_a_round_committed_twice_or_out_of_order_is_a_violation() -> None:
    watch = Watch()
    with pytest.raises(Violation, match="round 2 is committed after 0"):
        watch.coordinator_wrote("commit_round", (committed(2),), {})
    watch.coordinator_wrote("commit_round", (committed(),), {})
    with pytest.raises(Violation, match="round 1 is committed after 1"):
        watch.coordinator_wrote("commit_round", (committed(),), {})


def test_a_committed_round_that_is_gone_after_a_restart_is_a_violation() -> None:
    watch = Watch()
    watch.coordinator_wrote("commit_round", (committed(),), {})
    with pytest.raises(Violation, match="not what it was before"):
        watch.restarted((), lambda digest: pytest.fail("no model is looked at"))


def test_two_survivor_sets_in_one_session_are_a_violation() -> None:
    watch = Watch()
    watch.coordinator_wrote("save_resume", (ResumeRecord(SESSION, "job-1", b"", "", ("a", "b", "c"), 0.0),), {})
    with pytest.raises(Violation, match="two survivor sets"):
        watch.coordinator_wrote("save_resume", (ResumeRecord(SESSION, "job-1", b"", "", ("a", "b"), 0.0),), {})


def test_an_old_attempt_taken_up_is_a_violation() -> None:
    watch = Watch()
    watch.site_wrote("site-1", "record_attempt", ("f", "job-1", 2), {"attempt": 1})
    watch.site_wrote("site-2", "record_attempt", ("f", "job-1", 2), {"attempt": 1})
    with pytest.raises(Violation, match="takes up"):
        watch.site_wrote("site-1", "record_attempt", ("f", "job-1", 1), {"attempt": 9})


def test_two_survivor_sets_on_one_model_are_a_violation() -> None:
    watch = Watch()
    watch.site_wrote("site-1", "record_release", ("f", "job-1", OTHER), {"survivors": ("a", "b", "c")})
    watch.site_wrote("site-2", "record_release", ("f", "job-1", OTHER), {"survivors": ("a", "b", "d")})
    with pytest.raises(Violation, match="two survivor sets on one model"):
        watch.site_wrote("site-1", "record_release", ("f", "job-1", OTHER), {"survivors": ("a", "b", "d")})


def test_shares_of_both_secrets_of_one_member_are_a_violation() -> None:
    watch = Watch()
    self_seed = RevealedShare(1, ShareKind.SELF_SEED, bytes(16), bytes(33))
    watch.sent(SESSION, Unmask((self_seed,)))
    watch.sent(OTHER, Unmask((replace(self_seed, kind=ShareKind.MASK_SECRET),)))
    with pytest.raises(Violation, match="both secrets"):
        watch.sent(SESSION, Unmask((replace(self_seed, kind=ShareKind.MASK_SECRET),)))


def test_a_key_of_another_session_is_a_violation() -> None:
    watch = Watch()
    message = AdvertiseKeys(PublicKey(bytes([2]) + bytes(31)), PublicKey(bytes([3]) + bytes(31)), bytes(64))
    watch.sent(SESSION, message)
    watch.sent(SESSION, message)
    with pytest.raises(Violation, match="key occurs in two sessions"):
        watch.sent(OTHER, message)


def test_other_bytes_at_one_place_of_an_upload_are_a_violation() -> None:
    world = World(Settings(sites=4, rounds=1), ListedSchedule([])).run()
    (session,) = world.watch.plans
    with pytest.raises(Violation, match="other bytes"):
        world.watch.uploaded(session, "site-1", 3, b"not these bytes")


@pytest.mark.parametrize("segment", ["update", "statistics"])
def test_a_sum_that_is_not_the_survivors_is_a_violation(segment: str) -> None:
    """Every member's record of what it encoded is right, but for one coordinate or one count."""

    class Forgetful(Watch):
        def site_wrote(self, site: str, method: str, arguments: tuple[object, ...], named: dict[str, object]) -> None:
            super().site_wrote(site, method, arguments, named)
            if method == "record_release" and site == "site-1":
                (session,) = self.plans
                if segment == "update":
                    self._encoded[session, site][5] += 1
                else:
                    self._statistics[session, site][0] += 1

    world = World(Settings(sites=4, rounds=1), ListedSchedule([]))
    world.watch = Forgetful()
    with pytest.raises(Violation, match="sum"):
        world.run()


def test_a_process_that_ends_by_itself_is_a_violation() -> None:
    class Broken(Watch):
        def site_wrote(self, site: str, method: str, arguments: tuple[object, ...], named: dict[str, object]) -> None:
            raise ZeroDivisionError("a mistake in a process")

    world = World(Settings(sites=4, rounds=1), ListedSchedule([]))
    world.watch = Broken()
    with pytest.raises(Violation, match=r"SiteProcess ended by itself: ZeroDivisionError"):
        world.run()


@pytest.mark.parametrize("whose", ["", "site-2"], ids=["coordinator", "site"])
def test_an_audit_log_that_does_not_verify_is_a_violation(whose: str) -> None:
    class Forged(World):
        def _tear_down(self) -> None:
            log = self._home / whose / LOG_NAME
            log.write_bytes(log.read_bytes().replace(b'"started"', b'"stopped"', 1))
            super()._tear_down()

    with pytest.raises(Violation, match=r"audit log does not tell what happened: .*record 1 \(service\): altered"):
        Forged(Settings(sites=4, rounds=1), ListedSchedule([])).run()


def test_a_message_lost_and_one_doubled_cost_no_round() -> None:
    operations = [Op(Kind.DROP, "site-1", Channel.DOWN), Op(Kind.DUPLICATE, "site-2", Channel.UP)]
    world = World(Settings(sites=5, rounds=1), ListedSchedule(operations)).run()
    assert len(world.watch.committed) == 1
