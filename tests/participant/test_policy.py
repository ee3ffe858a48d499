"""What a site agrees to: each rule of the policy, the checks of an offer, and the files that say it."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from tests.secagg.cohort import NOW, make_plan, make_proposal

from maskwork.errors import UserError
from maskwork.participant.agent import check_offer
from maskwork.participant.config import read_config
from maskwork.participant.hours import Hours
from maskwork.participant.policy import Policy, Refusal, read_policy
from maskwork.secagg.encoding import Encoding, Rotation
from maskwork.secagg.errors import DeclineCode, PlanRefused
from maskwork.secagg.plan import RoundPlan, StatisticSpec
from maskwork.task import TrainingConfig
from maskwork.wire.codec import OpenSession

CONFIG = TrainingConfig().canonical_json()
DIGEST = hashlib.sha256(CONFIG).digest()


def plan(n: int = 4, **changes: object) -> RoundPlan:
    colluders = {"colluders": 1} if n <= 128 else {}
    return make_plan(n, **{**colluders, "training_digest": DIGEST, **changes})


def decide(policy: Policy, proposed: RoundPlan, *rounds_taken: int, now: float = NOW) -> tuple[Refusal, ...]:
    return policy.decide(proposed, now=now, rounds_taken=rounds_taken)


# --- the policy -----------------------------------------------------------------------------------------------------


def test_the_strict_default_takes_an_ordinary_plan() -> None:
    assert decide(Policy(min_weight_cap=1), plan()) == ()


@pytest.mark.parametrize(
    ("policy", "proposed", "code", "detail"),
    [
        (Policy(min_weight_cap=1, min_cohort=5), plan(4), DeclineCode.COHORT_TOO_SMALL, "cohort 4 < 5"),
        (Policy(min_weight_cap=1, min_survivors=5), plan(4), DeclineCode.TOO_FEW_SURVIVORS, "cohort 4 < survivors 5"),
        (Policy(min_weight_cap=1), plan(4, colluders=0), DeclineCode.COLLUDERS, "tolerated colluders 0 < 1"),
        (Policy(min_weight_cap=1, tasks=("xray",)), plan(), DeclineCode.TASK, "task digits is not among those allowed"),
        (
            Policy(min_weight_cap=1, min_colluders=0, min_corrupt_permille=20),
            plan(200),
            DeclineCode.GRAPH,
            "the sparse graph is not allowed here",
        ),
        (
            Policy(min_weight_cap=1, min_colluders=0, sparse_graph=True),
            plan(200),
            DeclineCode.GRAPH,
            "corrupt members assumed 20 < 50 per mille",
        ),
        (
            Policy(min_weight_cap=1, min_colluders=0, sparse_graph=True, min_corrupt_permille=20, min_survivors=16),
            plan(200),
            DeclineCode.TOO_FEW_SURVIVORS,
            "15 members seen here < survivors 16",
        ),
        (Policy(min_weight_cap=101), plan(), DeclineCode.ENCODING, "weight cap 100 < 101"),
        (Policy(min_weight_cap=1, max_rounds=19), plan(), DeclineCode.POLICY, "rounds 20 > 19"),
        (Policy(min_weight_cap=1, min_value_bits=13), plan(), DeclineCode.ENCODING, "value bits 12 not within 13..24"),
        (Policy(min_weight_cap=1, max_value_bits=11), plan(), DeclineCode.ENCODING, "value bits 12 not within 8..11"),
        (Policy(min_weight_cap=1, max_clip_norm=0.5), plan(), DeclineCode.ENCODING, "clip norm 1 > 0.5"),
        (Policy(min_weight_cap=1, max_weight=99), plan(), DeclineCode.ENCODING, "weight cap 100 > 99"),
        (
            Policy(min_weight_cap=1, min_clip_norm=1.5),
            plan(),
            DeclineCode.ENCODING,
            "clip norm 1 < 1.5",
        ),
        (
            Policy(min_weight_cap=1, jobs=("job", "xray-*")),
            plan(),
            DeclineCode.POLICY,
            "job job-1 is not among those allowed",
        ),
        (
            Policy(min_weight_cap=1, trusted_participants=("site-001", "elsewhere"), min_trusted_survivors=2),
            plan(),
            DeclineCode.TOO_FEW_SURVIVORS,
            "trusted members 1 < 2",
        ),
        (
            Policy(min_weight_cap=1, revocation_list="required"),
            plan(),
            DeclineCode.REVOCATION,
            "no revocation list is published, and this site requires one",
        ),
    ],
)
def test_each_rule_refuses_with_its_code_and_says_by_how_much(
    policy: Policy, proposed: RoundPlan, code: DeclineCode, detail: str
) -> None:
    (refusal,) = decide(policy, proposed)
    assert refusal.code is code
    assert refusal.detail.endswith(detail)


@pytest.mark.parametrize(
    ("policy", "proposed"),
    [
        (Policy(min_weight_cap=1, min_cohort=4), plan(4)),
        (Policy(min_weight_cap=1, min_survivors=4), plan(4)),
        (Policy(min_weight_cap=1, min_colluders=0), plan(4, colluders=0)),
        (Policy(min_weight_cap=1, tasks=("xray", "digits")), plan()),
        (Policy(min_weight_cap=100, min_colluders=0, sparse_graph=True, min_corrupt_permille=20), plan(200)),
        (
            Policy(
                min_weight_cap=1, max_rounds=20, min_value_bits=12, max_value_bits=12, max_clip_norm=1.0, max_weight=100
            ),
            plan(),
        ),
        (Policy(min_weight_cap=1, min_clip_norm=1.0), plan()),
        (Policy(min_weight_cap=1, tasks=("dig*",)), plan()),
        (
            Policy(min_weight_cap=1, trusted_participants=("site-001", "site-003"), min_trusted_survivors=2),
            plan(),
        ),
        (Policy(min_weight_cap=1, revocation_list="required"), plan(revocation_number=1)),
    ],
)
def test_each_rule_admits_what_is_just_within_it(policy: Policy, proposed: RoundPlan) -> None:
    assert decide(policy, proposed) == ()


@pytest.mark.parametrize(
    "pattern", ["digits-0badcafe", "digits", "dig*", "digits-*", "*", "digit?", "d[ij]gits", "[!x]*"]
)
def test_a_job_is_allowed_by_its_id_its_name_or_a_pattern(pattern: str) -> None:
    assert decide(Policy(min_weight_cap=1, jobs=("x", pattern)), plan(job="digits-0badcafe")) == ()


@pytest.mark.parametrize(
    "pattern", ["digit", "igits", "Digits", "digits-0badcaf", "x*", "0badcafe", "digits?", "[!d]*"]
)
def test_a_job_of_another_name_is_not(pattern: str) -> None:
    (refusal,) = decide(Policy(min_weight_cap=1, jobs=(pattern,)), plan(job="digits-0badcafe"))
    assert refusal.detail == "job digits-0badcafe is not among those allowed"


def test_the_name_of_a_job_is_its_id_without_what_a_coordinator_appends_and_no_shorter() -> None:
    assert decide(Policy(min_weight_cap=1, jobs=("digits",)), plan(job="digits-second"))
    assert decide(Policy(min_weight_cap=1, jobs=("digits",)), plan(job="digits-0badcafex"))


def test_members_are_trusted_by_organisation_too_and_nobody_twice() -> None:
    organisations = {"university": ("site-000", "site-001"), "other": ("site-002",)}
    trusting = Policy(
        min_weight_cap=1,
        organisations=organisations,
        trusted_organisations=("university",),
        trusted_participants=("site-001", "site-003"),
        min_trusted_survivors=3,
    )
    assert trusting.trusted == {"site-000", "site-001", "site-003"}
    assert decide(trusting, plan(4)) == ()
    (refusal,) = decide(trusting, plan(3))
    assert refusal.detail == "trusted members 2 < 3"


def test_on_the_sparse_graph_trusted_members_are_needed_among_those_that_are_seen() -> None:
    names = tuple(f"site-{i:03}" for i in range(16))
    sparse = Policy(
        min_weight_cap=1,
        min_colluders=0,
        sparse_graph=True,
        min_corrupt_permille=20,
        trusted_participants=names,
        min_trusted_survivors=16,
    )
    (refusal,) = decide(sparse, plan(200))
    assert refusal == Refusal(DeclineCode.TOO_FEW_SURVIVORS, "15 members seen here < trusted survivors 16")


# --- participation --------------------------------------------------------------------------------------------------

HALF = Policy(min_weight_cap=1, max_participation=0.5, participation_window=10)


def test_a_site_takes_part_in_no_more_than_its_share_of_any_window_of_rounds() -> None:
    """Asked in every round of a long job, it never passes the share in any ten rounds in a row, and reaches it."""
    taken: list[int] = []
    for number in range(1, 101):
        if not decide(HALF, plan(round_number=number, rounds_total=100), *taken):
            taken.append(number)
    for first in range(1, 92):
        assert sum(first <= number < first + 10 for number in taken) <= 5
    assert len(taken) == 50


def test_the_refusal_says_the_share_and_can_be_told_from_a_lasting_one() -> None:
    proposed = plan(round_number=6, rounds_total=100)
    assert decide(HALF, proposed, 1, 2, 3, 4) == ()
    (refusal,) = decide(HALF, proposed, 1, 2, 3, 4, 5)
    assert refusal == Refusal(DeclineCode.PARTICIPATION, "participation in 6 of 10 rounds > 0.5")
    assert decide(HALF, plan(round_number=11, rounds_total=100), 1, 2, 3, 4, 5) == ()


def test_a_round_counts_once_however_many_attempts_it_takes() -> None:
    assert decide(HALF, plan(round_number=5, attempt=3, rounds_total=100), 1, 2, 3, 4, 5) == ()


def test_a_job_shorter_than_the_window_is_a_window() -> None:
    assert decide(HALF, plan(round_number=3, rounds_total=4), 1) == ()
    (refusal,) = decide(HALF, plan(round_number=3, rounds_total=4), 1, 2)
    assert refusal.detail == "participation in 3 of 4 rounds > 0.5"


def test_a_share_is_the_number_that_is_written_and_not_its_nearest_float() -> None:
    exact = Policy(min_weight_cap=1, max_participation=0.29, participation_window=100)
    taken = tuple(range(1, 29))
    assert decide(exact, plan(round_number=29, rounds_total=100), *taken) == ()  # 0.29 * 100 is below 29 in floats
    assert decide(exact, plan(round_number=30, rounds_total=100), *taken, 29)


def test_a_lasting_refusal_comes_before_one_for_this_round() -> None:
    always = HALF.model_copy(update={"min_cohort": 5})
    refusals = decide(always, plan(round_number=6, rounds_total=100), 1, 2, 3, 4, 5)
    assert [r.code for r in refusals] == [DeclineCode.COHORT_TOO_SMALL, DeclineCode.PARTICIPATION]


# --- hours and revocation lists -------------------------------------------------------------------------------------


def test_a_session_begins_within_the_hours_and_not_outside() -> None:
    noon = datetime(2026, 3, 4, 12, 0, tzinfo=UTC).timestamp()  # a Wednesday
    hours = Hours(time_zone="UTC", windows=("mon-fri 20:00-06:00",))
    nights = Policy(min_weight_cap=1, hours=hours)
    (refusal,) = decide(nights, plan(), now=noon)
    assert refusal.code is DeclineCode.PAUSED
    assert refusal.detail == "wed 12:00 is outside the hours agreed to: mon-fri 20:00-06:00 UTC"
    assert decide(nights, plan(), now=noon + 8 * 3600) == ()
    assert (nights.open_at(noon), nights.open_at(noon + 8 * 3600), Policy().open_at(noon)) == (False, True, True)


def test_a_revocation_list_is_refused_once_it_is_older_than_a_week() -> None:
    policy, day = Policy(), 86_400.0
    assert policy.revocation_refusal(3, NOW - 7 * day, NOW) is None
    assert policy.revocation_refusal(3, NOW - 7.1 * day, NOW) == Refusal(
        DeclineCode.REVOCATION, "revocation list 3 is 7.1 days old > 7"
    )
    assert Policy(max_revocation_age_days=30).revocation_refusal(3, NOW - 29 * day, NOW) is None


def test_no_revocation_list_at_all_is_refused_only_where_one_is_required() -> None:
    assert Policy().revocation_refusal(0, None, NOW) is None
    required = Policy(revocation_list="required")
    assert required.revocation_refusal(0, None, NOW) == Refusal(
        DeclineCode.REVOCATION, "no revocation list is published, and this site requires one"
    )
    assert required.revocation_refusal(1, NOW, NOW) is None


def test_every_broken_rule_is_told_at_once() -> None:
    refusals = decide(Policy(min_weight_cap=1, min_cohort=5, max_rounds=1, tasks=("x",)), plan(4))
    assert [r.code for r in refusals] == [DeclineCode.TASK, DeclineCode.COHORT_TOO_SMALL, DeclineCode.POLICY]


# --- offers ---------------------------------------------------------------------------------------------------------


def offer(proposed: RoundPlan | None = None, **changes: object) -> OpenSession:
    made = OpenSession(make_proposal(proposed or plan()), CONFIG, 1000, bytes(32), 100)
    return replace(made, **changes)  # type: ignore[arg-type]


def check(
    made: OpenSession,
    policy: Policy | None = None,
    highest: tuple[int, int] | None = None,
    tasks: tuple[str, ...] = ("digits",),
    rounds_taken: tuple[int, ...] = (),
) -> TrainingConfig:
    chosen = policy or Policy(min_weight_cap=1)
    return check_offer(
        made, federation="test", tasks=tasks, policy=chosen, highest=highest, rounds_taken=rounds_taken, now=NOW
    )


def refusal(made: OpenSession, **changes: object) -> tuple[DeclineCode, str]:
    with pytest.raises(PlanRefused) as caught:
        check(made, **changes)  # type: ignore[arg-type]
    return caught.value.code, caught.value.detail


def test_a_good_offer_gives_its_training_config() -> None:
    assert check(offer()) == TrainingConfig()
    assert check(offer(), highest=(2, 99)) == check(offer(), highest=(3, 0)) == TrainingConfig()


def test_offers_that_are_not_for_this_site() -> None:
    assert refusal(offer(plan(federation="other"))) == (DeclineCode.BAD_PLAN, "the plan is for federation other")
    assert refusal(offer(), tasks=("xray",)) == (DeclineCode.TASK, "task digits is not configured at this site")


def test_the_policys_words_go_into_the_decline() -> None:
    assert refusal(offer(), policy=Policy(min_weight_cap=1, min_cohort=5, max_rounds=1)) == (
        DeclineCode.COHORT_TOO_SMALL,
        "cohort 4 < 5; rounds 20 > 1",
    )


@pytest.mark.parametrize("highest", [(3, 1), (3, 2), (4, 0), (2**40, 1)])
def test_an_attempt_that_is_not_above_the_highest_seen(highest: tuple[int, int]) -> None:
    code, detail = refusal(offer(), highest=highest)
    assert code is DeclineCode.STALE_ATTEMPT
    assert detail == f"round 3, attempt 1 is not above round {highest[0]}, attempt {highest[1]}"


@pytest.mark.parametrize("size", [0, 40 * 8 + (64 << 20) + 1])
def test_a_model_of_an_impossible_size(size: int) -> None:
    assert refusal(offer(model_size=size))[0] is DeclineCode.WRONG_MODEL


def test_a_model_larger_than_the_site_allows() -> None:
    check(offer(model_size=999), Policy(min_weight_cap=1, max_model_bytes=999))
    assert refusal(offer(model_size=1000), policy=Policy(min_weight_cap=1, max_model_bytes=999)) == (
        DeclineCode.WRONG_MODEL,
        "a model of 1000 bytes, at most 999 are accepted",
    )


@pytest.mark.parametrize("config", [CONFIG + b" ", b"{}", b'{"epochs":0}', b"\xff", b"[" * 5000])
def test_a_training_config_that_is_not_the_plans_or_not_canonical(config: bytes) -> None:
    assert refusal(offer(training_config=config))[0] is DeclineCode.TRAINING_CONFIG
    named = plan(training_digest=hashlib.sha256(config).digest())
    assert refusal(offer(named, training_config=config))[0] is DeclineCode.TRAINING_CONFIG


def test_a_good_training_config_that_is_not_the_plans() -> None:
    """Nothing but its digest is wrong with it."""
    other = TrainingConfig(epochs=7).canonical_json()
    check(offer(plan(training_digest=hashlib.sha256(other).digest()), training_config=other))
    assert refusal(offer(training_config=other))[0] is DeclineCode.TRAINING_CONFIG


def test_no_check_depends_on_another_having_failed() -> None:
    wrong = plan(encoding=Encoding(1e6, 10**6, 12, 20, Rotation.NONE), statistics=(StatisticSpec("examples", 1e6),))
    assert refusal(offer(wrong), policy=Policy(min_weight_cap=1, max_clip_norm=1.0)) == (
        DeclineCode.ENCODING,
        "clip norm 1e+06 > 1",
    )


# --- files ----------------------------------------------------------------------------------------------------------


def test_a_policy_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text('tasks = ["digits"]\nmin_cohort = 5\nmin_survivor_difference = 4\n')
    assert read_policy(path) == Policy(tasks=("digits",), min_cohort=5, min_survivor_difference=4)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("min_cohrt = 5\n", "min_cohrt: no such key; did you mean min_cohort"),
        ("min_cohort = 2\n", "min_cohort: .*greater than or equal to 3"),
        ("min_survivors = 2\n", "min_survivors: "),
        ("min_survivor_difference = 1\n", "min_survivor_difference: "),
        ("max_clip_norm = inf\n", "max_clip_norm: "),
        ("min_cohort =\n", "cannot be read as a policy"),
        ('secure_aggregation = "off"\n', "secure_aggregation: .*no path on which an update is not masked"),
        ("secure_aggregation = false\n", 'secure_aggregation: .*only "required" is accepted'),
        ('privacy_mechanism = "gaussian"\n', "privacy_mechanism: .*not yet enforceable.*remove the key"),
        ("max_epsilon = 3.0\n", "max_epsilon: .*not yet enforceable"),
        ("max_delta = 1e-6\n", "max_delta: .*not yet enforceable"),
        ('trusted_participants = ["a"]\n', "trusted_participants protects from nothing without min_trusted_survivors"),
        ('trusted_participants = ["*"]\nmin_trusted_survivors = 1\n', "is not a participant's name"),
        ('trusted_organisations = ["x"]\nmin_trusted_survivors = 1\n', "'x' is not in the table .organisations."),
        ('trusted_participants = ["a"]\nmin_trusted_survivors = 2\n', "2 are more than the 1 members"),
        ("min_trusted_survivors = 1\n", "1 are more than the 0 members"),
        ("min_clip_norm = 2000.0\n", "min_clip_norm is above max_clip_norm"),
        ("min_value_bits = 25\n", "min_value_bits is above max_value_bits"),
        ("max_weight = 100\n", "min_weight_cap is above max_weight"),
        ('jobs = ["digits", ""]\n', "jobs.1: an empty text is the name of nothing"),
        ('tasks = [""]\n', "tasks.0: an empty text is the name of nothing"),
        ("max_participation = 0\n", "max_participation: "),
        ("max_participation = 1.1\n", "max_participation: "),
        ("max_participation = 0.009\n", "below one round in a participation_window"),
        ("max_participation = 0.1\nparticipation_window = 9\n", "below one round in a participation_window"),
        ('trusted_organisations = ["x"]\n[organisations]\nx = []\n', "'x' has no members"),
        ('revocation_list = "never"\n', "revocation_list: "),
        ("[hours]\ntime_zone = 'UTC'\nwindows = []\n", "hours.windows: "),
        ("[hours]\ntime_zone = 'Mars'\nwindows = ['mon 00:00-24:00']\n", "hours.time_zone: .*no time zone 'Mars'"),
        ("[hours]\ntime_zone = 'UTC'\nwindows = ['monday']\n", "'monday' is no window"),
        ("[hours]\ntime_zon = 'UTC'\nwindows = ['mon 00:00-24:00']\n", "time_zon: no such key; did you mean time_zone"),
    ],
)
def test_a_mistake_in_a_policy_is_told_by_key(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=says) as caught:
        read_policy(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "Value error" not in str(caught.value)


SITE = 'coordinator = "localhost:1"\nidentity = "id"\nstate = "s"\n[tasks.digits]\nuse = "m:T"\n'


def test_a_sites_paths_are_relative_to_its_file(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text('policy = "p.toml"\n' + SITE + "[tasks.digits.options]\nalpha = 0.5\n")
    config = read_config(path)
    assert (config.identity, config.state, config.policy) == (tmp_path / "id", tmp_path / "s", tmp_path / "p.toml")
    assert config.tasks["digits"].options == {"alpha": 0.5}
    path.write_text(SITE)
    assert read_config(path).policy is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('polcy = "p"\n' + SITE, "polcy: no such key; did you mean policy"),
        (SITE + "thread = 2\n", "tasks.digits.thread: no such key; did you mean threads"),
        (SITE + "threads = 0\n", "tasks.digits.threads: "),
        (SITE.replace('use = "m:T"', ""), "tasks.digits.use: Field required"),
        (SITE.replace("localhost:1", "localhost"), "coordinator: "),
    ],
)
def test_a_mistake_in_a_sites_file_is_told_by_key(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "site.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=says):
        read_config(path)
