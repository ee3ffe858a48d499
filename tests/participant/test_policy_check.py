"""`maskwork participant check-policy` and `plans`: what they say, and that it is what the site would do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.secagg.cohort import NOW, make_plan, make_proposal, name_of

from maskwork.cli import installed_contributions, run
from maskwork.errors import StoreError
from maskwork.participant.ledger import Ledger, SignedPlan
from maskwork.participant.policy import Policy
from maskwork.participant.policy_check import Records, explain
from maskwork.plan_json import plan_of_json, readable_json
from maskwork.secagg.plan import RoundPlan, session_id

PLAN = make_plan(4, colluders=1, rounds_total=10)


def signed(plan: RoundPlan, *, refused_because: str | None = None, at: float = NOW) -> SignedPlan:
    proposal = make_proposal(plan)
    return SignedPlan(
        plan.federation,
        plan.job,
        plan.round_number,
        plan.attempt,
        session_id(proposal.plan_bytes),
        proposal.plan_bytes,
        proposal.signature,
        at,
        refused_because,
    )


def take_up(ledger: Ledger, plan: RoundPlan) -> SignedPlan:
    kept = signed(plan)
    ledger.record_attempt(
        kept.federation,
        kept.job,
        kept.round_number,
        attempt=kept.attempt,
        session_id=kept.session_id,
        plan_bytes=kept.plan_bytes,
        plan_signature=kept.plan_signature,
        at=kept.at,
    )
    return kept


class Shell:
    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: str | Path) -> tuple[int, str, str]:
        """Run `maskwork participant …`: exit code and both streams."""
        with pytest.raises(SystemExit) as caught:
            run(installed_contributions(), ["participant", *map(str, words)])
        streams = self._capsys.readouterr()
        return int(caught.value.code or 0), streams.out, streams.err


@pytest.fixture
def participant(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    """A state directory whose agent runs: it took one plan up, refused one, and released a sum."""
    with Ledger.open(tmp_path / "state") as ledger:
        taken = take_up(ledger, PLAN)
        ledger.record_refused_plan(signed(replace(PLAN, attempt=2), refused_because="cohort 4 < 5", at=NOW + 1))
        survivors = [name_of(i) for i in range(4)]
        ledger.record_release(
            "test", PLAN.job, PLAN.model_digest, session_id=taken.session_id, survivors=survivors, at=NOW
        )
        yield tmp_path / "state"


def policy_file(folder: Path, text: str) -> Path:
    path = folder / "policy.toml"
    path.write_text("min_weight_cap = 1\n" + text)
    return path


def plan_file(folder: Path, plan: RoundPlan = PLAN) -> Path:
    path = folder / "plan.json"
    path.write_text(readable_json(plan))
    return path


def line_of(out: str, rule: str) -> list[str]:
    (line,) = [line for line in out.splitlines() if f"  {rule}  " in line]
    return line.split()


# --- what would happen ----------------------------------------------------------------------------------------------


def test_a_plan_that_passes_is_said_to_with_every_rule_in_a_line(participant: Shell, tmp_path: Path) -> None:
    code, out, _ = participant("check-policy", plan_file(tmp_path), "--policy", policy_file(tmp_path, ""))
    assert code == 0
    assert line_of(out, "cohort") == ["pass", "cohort", "4", "min_cohort", "=", "3"]
    assert line_of(out, "job")[:3] == ["pass", "job", "job-1"]
    assert out.splitlines()[-1] == "would take part, as far as was checked"
    keys = set(Policy.model_fields) - {
        *("trusted_participants", "trusted_organisations", "organisations"),  # they name whom the minimum counts
        *("privacy_mechanism", "max_epsilon", "max_delta"),  # refused when the policy is read
        "min_corrupt_permille",  # of sparse plans
    }
    assert {key for key in keys if key not in out} == set()


def test_a_plan_that_would_be_declined_gives_exit_code_1_and_the_words_of_the_decline(
    participant: Shell, tmp_path: Path
) -> None:
    strict = policy_file(tmp_path, 'min_cohort = 5\njobs = ["xray"]\n')
    code, out, _ = participant("check-policy", plan_file(tmp_path), "--policy", strict)
    assert code == 1
    assert line_of(out, "cohort") == ["refuse", "cohort", "4", "min_cohort", "=", "5", "cohort", "4", "<", "5"]
    assert out.splitlines()[-1] == "would decline: job job-1 is not among those allowed; cohort 4 < 5"


def test_without_a_policy_file_the_strict_default_is_explained(participant: Shell, tmp_path: Path) -> None:
    code, out, _ = participant("check-policy", plan_file(tmp_path))
    assert (code, "against the default policy" in out) == (1, True)
    assert out.splitlines()[-1] == "would decline: weight cap 100 < 10000"


def test_what_needs_the_sites_records_is_open_and_never_passed_without_them(participant: Shell, tmp_path: Path) -> None:
    _, out, _ = participant("check-policy", plan_file(tmp_path), "--policy", policy_file(tmp_path, ""))
    for rule in ("participation", "same model"):
        assert line_of(out, rule)[0] == "open"
        assert "not checked offline: it needs the site's records (--state)" in out
    for rule in ("model file", "age of the revocation list"):
        assert line_of(out, rule)[0] == "open"


def test_with_the_sites_records_participation_and_the_same_model_rule_are_checked_while_the_agent_runs(
    participant: Shell, tmp_path: Path, state: Path
) -> None:
    halved = policy_file(tmp_path, "max_participation = 0.1\n")
    following = replace(PLAN, round_number=4, roster=make_plan(5).roster[1:])
    plan = plan_file(tmp_path, following)
    code, out, _ = participant("check-policy", plan, "--policy", halved, "--state", state)
    assert code == 1
    assert line_of(out, "participation")[:2] == ["refuse", "participation"]
    assert line_of(out, "same model")[0] == "refuse"
    assert "participation in 2 of 10 rounds > 0.1; on this model a sum over 4 sites was released" in out
    code, out, _ = participant("check-policy", plan_file(tmp_path), "--policy", halved, "--state", state)
    assert (code, line_of(out, "same model")[0], line_of(out, "participation")[0]) == (0, "pass", "pass")


@pytest.mark.parametrize(
    ("policy", "plan", "taken"),
    [
        (Policy(min_weight_cap=1), PLAN, ()),
        (Policy(), PLAN, ()),
        (Policy(min_weight_cap=1, min_cohort=5, max_rounds=9), PLAN, ()),
        (Policy(min_weight_cap=1, max_participation=0.2, participation_window=5), PLAN, (1, 2)),
        (Policy(min_weight_cap=1, trusted_participants=("site-9",), min_trusted_survivors=1), PLAN, ()),
        (Policy(min_weight_cap=1), make_plan(200), ()),
    ],
)
def test_what_is_explained_is_what_is_enforced(policy: Policy, plan: RoundPlan, taken: tuple[int, ...]) -> None:
    enforced = policy.decide(plan, now=NOW, rounds_taken=taken)
    explained = explain(policy, plan, now=NOW, records=Records(frozenset(taken), ()))
    assert tuple(finding.refusal for finding in explained if finding.refusal is not None) == enforced


def test_a_plan_that_cannot_be_read_is_told_by_its_field(participant: Shell, tmp_path: Path) -> None:
    broken = tmp_path / "plan.json"
    broken.write_text(readable_json(PLAN).replace('"attempt": 1', '"attempt": true'))
    code, _, err = participant("check-policy", broken)
    assert (code, "plan.json: cannot be read as a plan: attempt: not a whole number" in err) == (1, True)
    code, _, err = participant("check-policy", tmp_path / "nowhere.json")
    assert (code, "nowhere.json: cannot be read as a plan: No such file" in err) == (1, True)


# --- plans on record ------------------------------------------------------------------------------------------------


def test_plans_on_record_are_listed_with_what_became_of_them(participant: Shell, state: Path) -> None:
    code, out, _ = participant("plans", "--state", state)
    assert code == 0
    first, second = (line.split() for line in out.splitlines()[1:])
    assert first[0] == signed(PLAN).session_id.hex()[:12]
    assert first[-2:] == ["taken", "up"]
    assert " ".join(second[-5:]) == "declined: cohort 4 < 5"


def test_a_plan_on_record_is_printed_as_the_json_that_check_policy_reads(
    participant: Shell, tmp_path: Path, state: Path
) -> None:
    code, out, _ = participant("plans", "--state", state, "--json", signed(PLAN).session_id.hex()[:6])
    assert code == 0
    assert plan_of_json(out.encode()) == PLAN
    (tmp_path / "plan.json").write_text(out)
    code, _, _ = participant("check-policy", tmp_path / "plan.json", "--policy", policy_file(tmp_path, ""))
    assert code == 0
    assert json.loads(out)["job"] == PLAN.job


@pytest.mark.parametrize(("session", "says"), [("ffffffff", "no plan of session ffffffff"), ("", "no plan")])
def test_a_session_that_is_not_on_record(participant: Shell, state: Path, session: str, says: str) -> None:
    code, _, err = participant("plans", "--state", state, "--json", session)
    assert (code, says in err) == (1, True)


def test_a_beginning_that_fits_two_sessions_is_refused(participant: Shell, tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "state") as ledger:
        for attempt in range(1, 18):  # of sixteen digits, one comes twice
            take_up(ledger, replace(PLAN, attempt=attempt))
        digits = [plan.session_id.hex()[0] for plan in ledger.plans("test")]
    twice = next(digit for digit in digits if digits.count(digit) > 1)
    code, _, err = participant("plans", "--state", tmp_path / "state", "--json", twice)
    assert (code, f"{digits.count(twice)} sessions begin with {twice}: write more of it" in err) == (1, True)


def test_a_directory_without_a_ledger_is_told_and_stays_empty(participant: Shell, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    code, _, err = participant("plans", "--state", tmp_path / "empty")
    assert (code, "there is no ledger here" in err) == (1, True)
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_site_that_was_asked_for_nothing_has_no_plans(participant: Shell, tmp_path: Path) -> None:
    Ledger.open(tmp_path / "state").close()
    code, out, err = participant("plans", "--state", tmp_path / "state")
    assert (code, out, "no plans yet" in err) == (0, "", True)


def test_a_ledger_opened_for_reading_takes_no_record(tmp_path: Path, state: Path) -> None:
    with Ledger.read(state) as ledger:
        assert ledger.federations() == ("test",)
        assert ledger.rounds_taken("test", PLAN.job) == {3}
        with pytest.raises(RuntimeError, match="opened for reading"):
            take_up(ledger, replace(PLAN, attempt=9))
    with pytest.raises(StoreError, match="no ledger"):
        Ledger.read(tmp_path / "nowhere")
