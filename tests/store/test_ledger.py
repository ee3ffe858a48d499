"""Each rule of a site's ledger, before and after a restart."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maskwork.errors import StoreError
from maskwork.participant.ledger import Ledger, SignedPlan, StaleAttempt

FED = "hospitals"
MODEL = b"m" * 32


def digest(*parts: object) -> bytes:
    return repr(parts).encode().ljust(32, b"\0")[-32:]


def plan(round_number: int = 1, attempt: int = 1, job: str = "j1", text: bytes = b"plan") -> SignedPlan:
    return SignedPlan(FED, job, round_number, attempt, digest(job, round_number, attempt, text), text, b"signed", 1.0)


def take_up(ledger: Ledger, plan: SignedPlan) -> None:
    ledger.record_attempt(
        plan.federation,
        plan.job,
        plan.round_number,
        attempt=plan.attempt,
        session_id=plan.session_id,
        plan_bytes=plan.plan_bytes,
        plan_signature=plan.plan_signature,
        at=plan.at,
    )


def refused(plan: SignedPlan) -> SignedPlan:
    return dataclasses.replace(plan, refused_because="stale attempt")


def release(ledger: Ledger, session: object, survivors: tuple[str, ...], job: str = "j1", model: bytes = MODEL) -> None:
    ledger.record_release(FED, job, model, session_id=digest(session), survivors=survivors, at=1.0)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(tmp_path / "state") as opened:
        yield opened


def test_nothing_is_on_record_at_first(ledger: Ledger) -> None:
    assert ledger.highest_attempt(FED, "j1") is None
    assert ledger.plans(FED) == ()
    assert ledger.releases(FED, MODEL) == ()
    assert ledger.highest_revocation_number(FED) is None
    assert ledger.last_audit_head(FED) is None


@given(
    attempts=st.lists(
        st.tuples(st.sampled_from(["f1", "f2"]), st.sampled_from(["j1", "j2"]), st.integers(1, 3), st.integers(1, 3)),
        max_size=12,
    ),
    restart_before=st.integers(0, 12),
)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_attempts_only_grow_in_each_job_of_each_federation(
    tmp_path_factory: pytest.TempPathFactory, attempts: list[tuple[str, str, int, int]], restart_before: int
) -> None:
    directory = tmp_path_factory.mktemp("site")
    ledger = Ledger.open(directory)
    highest: dict[tuple[str, str], tuple[int, int]] = {}
    for step, (federation, job, round_number, attempt) in enumerate(attempts):
        if step == restart_before:
            ledger.close()
            ledger = Ledger.open(directory)
        offered = dataclasses.replace(plan(round_number, attempt, job), federation=federation)
        so_far = highest.get((federation, job))
        if so_far is None or (round_number, attempt) > so_far:
            take_up(ledger, offered)
            highest[federation, job] = (round_number, attempt)
        else:
            with pytest.raises(StaleAttempt) as caught:
                take_up(ledger, offered)
            assert caught.value.highest == so_far
        assert ledger.highest_attempt(federation, job) == highest[federation, job]
    ledger.close()


def test_a_stale_attempt_says_what_is_on_record(ledger: Ledger) -> None:
    take_up(ledger, plan(3, 2))
    with pytest.raises(
        StaleAttempt, match=r"hospitals, job j1: round 3, attempt 2 is not higher than round 3, attempt 2"
    ):
        take_up(ledger, plan(3, 2))
    assert ledger.plans(FED) == (plan(3, 2),)


def test_a_later_round_is_higher_than_any_attempt_at_an_earlier_one(ledger: Ledger) -> None:
    take_up(ledger, plan(1, 3))
    take_up(ledger, plan(2, 1))
    assert ledger.highest_attempt(FED, "j1") == (2, 1)
    with pytest.raises(StaleAttempt):
        take_up(ledger, plan(1, 4))


def test_two_plans_for_one_attempt_prove_equivocation(ledger: Ledger) -> None:
    accepted, other, third = plan(), plan(text=b"other"), plan(text=b"third")
    take_up(ledger, accepted)
    assert ledger.equivocations(FED) == ()
    assert ledger.record_refused_plan(refused(other))
    assert ledger.record_refused_plan(refused(plan(2, 1)))
    assert ledger.record_refused_plan(refused(plan(1, 1, job="j2")))
    assert ledger.equivocations(FED) == ((accepted, refused(other)),)
    assert ledger.record_refused_plan(refused(third))
    assert len(ledger.equivocations(FED)) == 3
    assert ledger.equivocations("elsewhere") == ()


def test_a_replayed_plan_proves_nothing_and_is_not_kept_again(ledger: Ledger) -> None:
    take_up(ledger, plan())
    assert not ledger.record_refused_plan(refused(plan()))
    assert ledger.record_refused_plan(refused(plan(text=b"other")))
    assert ledger.record_refused_plan(refused(plan(text=b"other")))
    assert len(ledger.plans(FED)) == 2


def test_a_refused_plan_says_why(ledger: Ledger) -> None:
    with pytest.raises(RuntimeError, match="says why"):
        ledger.record_refused_plan(plan())


def test_refused_plans_cannot_fill_the_disk(tmp_path: Path) -> None:
    with Ledger.open(tmp_path, refused_plans_kept=3) as ledger:
        kept = [ledger.record_refused_plan(refused(plan(attempt=attempt))) for attempt in range(1, 6)]
        assert kept == [True, True, True, False, False]
        elsewhere = dataclasses.replace(refused(plan()), federation="elsewhere")
        assert ledger.record_refused_plan(elsewhere), "the bound is each federation's own"


def test_refused_plans_do_not_count_as_taken_up(ledger: Ledger) -> None:
    ledger.record_refused_plan(refused(plan(9, 9)))
    assert ledger.highest_attempt(FED, "j1") is None


def test_releases_are_found_by_model_under_any_job(ledger: Ledger) -> None:
    release(ledger, 1, ("a", "b", "c"), job="j1")
    release(ledger, 2, ("b", "c", "d"), job="renamed")
    release(ledger, 3, ("c", "b", "a"), job="renamed")
    release(ledger, 4, ("x", "y", "z"), model=b"o" * 32)
    assert ledger.releases(FED, MODEL) == (frozenset("abc"), frozenset("bcd"))
    assert ledger.releases("elsewhere", MODEL) == ()


def test_one_u3_per_session(ledger: Ledger) -> None:
    release(ledger, 1, ("a", "b", "c"))
    release(ledger, 1, ("c", "b", "a"))
    for wrong in (("a", "b"), ("a", "b", "c", "d")):
        with pytest.raises(RuntimeError, match="one U3 per session"):
            release(ledger, 1, wrong)
    with pytest.raises(RuntimeError, match="one U3 per session"):
        release(ledger, 1, ("a", "b", "c"), model=b"o" * 32)
    with pytest.raises(RuntimeError, match="one U3 per session"):
        release(ledger, 1, ("a", "b", "c"), job="renamed")
    assert ledger.releases(FED, MODEL) == (frozenset("abc"),)


@pytest.mark.parametrize("survivors", [(), ("a", "a")])
def test_a_survivor_set_names_somebody_and_nobody_twice(ledger: Ledger, survivors: tuple[str, ...]) -> None:
    with pytest.raises(RuntimeError, match="nobody twice"):
        release(ledger, 1, survivors)
    assert ledger.releases(FED, MODEL) == ()


def test_digests_have_32_bytes(ledger: Ledger) -> None:
    with pytest.raises(RuntimeError, match="model digest"):
        release(ledger, 1, ("a",), model=b"short")
    with pytest.raises(RuntimeError, match="session id"):
        take_up(ledger, dataclasses.replace(plan(), session_id=b"short"))
    with pytest.raises(RuntimeError, match="audit head"):
        ledger.record_audit_head(FED, b"short")


def test_revocation_numbers_never_go_back(ledger: Ledger) -> None:
    ledger.record_revocation_number(FED, 7)
    ledger.record_revocation_number(FED, 7)
    with pytest.raises(RuntimeError, match="6 is older than 7"):
        ledger.record_revocation_number(FED, 6)
    assert ledger.highest_revocation_number(FED) == 7
    assert ledger.highest_revocation_number("elsewhere") is None


def test_the_audit_head_is_the_last_one_recorded(ledger: Ledger) -> None:
    ledger.record_revocation_number(FED, 7)
    ledger.record_audit_head(FED, b"1" * 32)
    ledger.record_audit_head(FED, b"2" * 32)
    assert ledger.last_audit_head(FED) == b"2" * 32
    assert ledger.highest_revocation_number(FED) == 7


def test_everything_survives_a_restart(tmp_path: Path) -> None:
    with Ledger.open(tmp_path) as ledger:
        take_up(ledger, plan(2, 3))
        ledger.record_refused_plan(refused(plan(2, 3, text=b"other")))
        release(ledger, 1, ("å", "b", "c"))
        ledger.record_revocation_number(FED, 7)
        ledger.record_audit_head(FED, b"h" * 32)
    with Ledger.open(tmp_path) as ledger:
        assert ledger.highest_attempt(FED, "j1") == (2, 3)
        assert len(ledger.equivocations(FED)) == 1
        assert ledger.releases(FED, MODEL) == (frozenset("åbc"),)
        assert ledger.highest_revocation_number(FED) == 7
        assert ledger.last_audit_head(FED) == b"h" * 32


def test_two_agents_cannot_share_a_state_directory(tmp_path: Path) -> None:
    directory = tmp_path / "state"
    with Ledger.open(directory):
        with pytest.raises(StoreError, match=r"in use by another agent.*Stop the other agent") as caught:
            Ledger.open(directory)
        assert caught.value.file == str(directory)
    Ledger.open(directory).close()


def test_the_state_directory_is_its_users_own(tmp_path: Path) -> None:
    Ledger.open(tmp_path / "state").close()
    assert (tmp_path / "state").stat().st_mode & 0o077 == 0
