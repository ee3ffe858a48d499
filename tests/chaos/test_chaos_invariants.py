"""Each invariant of a chaos run is fed what it must notice; a run without a flaw gives nothing."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
from tests.chaos import invariants
from tests.chaos.federation import Life
from tests.chaos.known_update import examples, known_loss, known_update, weighted_mean
from tests.chaos.written import Attempt, Job, Released, Round, SiteLedger, TakenUp, Written

from maskwork.task import training_seed
from maskwork.tensors import Float32Array

SITES = ("site-a", "site-b", "site-c")
BASE = np.linspace(-1e-3, 1e-3, 64, dtype=np.float32)


def seed(site: str, number: int) -> int:
    return training_seed(0, job="job", round_number=number, participant=site)


def following(base: Float32Array, number: int, survivors: tuple[str, ...] = SITES) -> Float32Array:
    mean = weighted_mean([(examples(s), known_update(base, seed(s, number))) for s in survivors])
    return np.asarray(base + mean, np.float32)


MODELS = {"m0": BASE, "m1": following(BASE, 1), "m2": following(following(BASE, 1), 2)}


def a_round(number: int) -> Round:
    total = sum(map(examples, SITES))
    loss = sum(examples(s) * known_loss(seed(s, number)) for s in SITES) / total
    return Round(
        job="job",
        round_number=number,
        attempt=1,
        session=f"s{number}",
        model=f"m{number}",
        survivors=SITES,
        statistics={"examples": float(total), "train.loss": loss},
        committed_at=float(number),
    )


def an_attempt(number: int) -> Attempt:
    return Attempt(
        job="job",
        round_number=number,
        attempt=1,
        session=f"s{number}",
        opened_at=number - 0.5,
        outcome="committed",
        nonce=f"n{number}",
        base_model=f"m{number - 1}",
        roster=SITES,
    )


def line(event: str, **fields: object) -> str:
    return json.dumps({"event": event, **fields})


RELEASED = tuple(Released("job", f"s{n}", f"m{n - 1}", frozenset(SITES)) for n in (1, 2))
LEDGER = SiteLedger(tuple(TakenUp("job", n, 1, f"s{n}") for n in (1, 2)), RELEASED)
SITE_LOG = [line(e, round=n) for n in (1, 2) for e in ("plan accepted", "trained")]
GOOD = Written(
    jobs=(Job("job", "completed", 2, "m0", "m2"),),
    attempts=(an_attempt(1), an_attempt(2)),
    rounds=(a_round(1), a_round(2)),
    asked=RELEASED,
    ledgers=dict.fromkeys(SITES, LEDGER),
    models={name: name for name in MODELS},
    logs={"coordinator": [line("round committed", job="job", round=n) for n in (1, 2)], "site-a": SITE_LOG},
    lives=(Life("coordinator", 0, 0.0, 1.0, -9, killed=True), Life("site-a", 1, 0.0, 1.0, 0)),
    secrets=("MIGHAgEAMBMGByqGSM49",),
)


def with_attempt(**changes: object) -> Written:
    return replace(GOOD, attempts=(an_attempt(1), replace(an_attempt(2), **changes)))  # type: ignore[arg-type]


def with_round(**changes: object) -> Written:
    return replace(GOOD, rounds=(a_round(1), replace(a_round(2), **changes)))  # type: ignore[arg-type]


def with_job(**changes: object) -> Written:
    return replace(GOOD, jobs=(replace(GOOD.jobs[0], **changes),))  # type: ignore[arg-type]


def with_ledger(ledger: SiteLedger) -> Written:
    return replace(GOOD, ledgers={**GOOD.ledgers, "site-b": ledger})


def with_log(*lines: str) -> Written:
    return replace(GOOD, logs={**GOOD.logs, "another": lines})


def with_life(**changes: object) -> Written:
    return replace(GOOD, lives=(*GOOD.lives, replace(Life("site-b", 2, 0.0, 1.0, 0), **changes)))  # type: ignore[arg-type]


def released(session: str, model: str, *survivors: str) -> Released:
    return Released("job", session, model, frozenset(survivors))


def test_a_run_without_a_flaw_gives_nothing() -> None:
    assert invariants.violations(GOOD) == []
    assert list(invariants.wrong_sums(GOOD, MODELS.__getitem__)) == []


Check = Callable[[Written], Iterator[str]]


@pytest.mark.parametrize(
    ("check", "written", "said"),
    [
        (invariants.rounds_out_of_order, with_job(state="failed", reason="no disk"), "is failed"),
        (invariants.rounds_out_of_order, with_job(rounds_total=3), "not 1 to 3"),
        (invariants.rounds_out_of_order, with_round(round_number=1), "not 1 to 2"),
        (invariants.rounds_out_of_order, with_round(committed_at=0.5), "before the one before it"),
        (invariants.rounds_out_of_order, with_job(current_model="m1"), "not that of its last round"),
        (invariants.commits_of_attempts, with_attempt(outcome=""), "never ended"),
        (invariants.commits_of_attempts, with_attempt(base_model="m0"), "from another model"),
        (invariants.commits_of_attempts, with_attempt(outcome="aborted"), "has 0 committed attempts"),
        (invariants.commits_of_attempts, with_attempt(session="s9"), "by another session"),
        (
            invariants.commits_of_attempts,
            replace(GOOD, attempts=(*GOOD.attempts, replace(an_attempt(2), attempt=2, session="s3"))),
            "has 2 committed attempts",
        ),
        (invariants.audit_logs_that_do_not_tell, replace(GOOD, audit=("record 7: altered",)), "record 7"),
        (invariants.commits_said_twice, with_log(line("round committed", job="job", round=2)), "committed 2 times"),
        (invariants.damaged_models, replace(GOOD, models={**GOOD.models, "m1": "other"}), "has the digest other"),
        (invariants.damaged_models, replace(GOOD, models={"m0": "m0", "m1": "m1"}), "m2 is missing"),
        (
            invariants.attempts_that_do_not_grow,
            with_ledger(replace(LEDGER, taken_up=(*LEDGER.taken_up, LEDGER.taken_up[0]))),
            "took up job (1, 1) after (2, 1)",
        ),
        (
            invariants.attempts_that_do_not_grow,
            with_ledger(replace(LEDGER, taken_up=(TakenUp("job", 1, 1, "s7"),))),
            "does not know",
        ),
        (
            invariants.second_survivor_sets,
            with_ledger(replace(LEDGER, released=(*RELEASED, released("s3", "m1", "site-a", "site-b")))),
            "2 survivor sets on the model m1",
        ),
        (
            invariants.second_survivor_sets,
            with_ledger(replace(LEDGER, released=(released("s1", "m0", "site-a", "site-b"),))),
            "was not asked for",
        ),
        (
            invariants.second_survivor_sets,
            with_ledger(replace(LEDGER, released=(released("s1", "m0", "site-a", "site-c"),))),
            "without itself",
        ),
        (invariants.survivors_not_asked_for, with_round(survivors=SITES[:2]), "not those of its session"),
        (
            invariants.survivors_not_asked_for,
            replace(GOOD, asked=(*RELEASED, released("s3", "m1", "site-a", "site-b"))),
            "2 survivor sets were asked for on the model m1",
        ),
        (invariants.repeated_sessions, with_attempt(session="s1"), "session id s1 was used 2 times"),
        (invariants.repeated_sessions, with_attempt(nonce="n1"), "nonce n1 was used 2 times"),
        (invariants.work_done_twice, with_log(*SITE_LOG, line("trained", round=2)), "trained 2 times"),
        (invariants.complaints, with_log("Traceback (most recent call last):"), "a traceback"),
        (invariants.complaints, with_log(line("failed", exception="Traceback (most recent …)")), "a traceback"),
        (invariants.complaints, with_log("E0000 grpc says something"), "no log line"),
        (invariants.told_secrets, with_log(line("key", pem="MIGHAgEAMBMGByqGSM49")), "line 1 tells a secret"),
        (invariants.told_secrets, with_log(line("state", detail="Keys(mask_sk=7)")), "line 1 tells a secret"),
        (invariants.bad_ends, with_life(code=1), "ended by itself with 1"),
        (invariants.bad_ends, with_life(code=None), "ended by itself with None"),
        (invariants.bad_ends, with_life(code=-9), "ended by itself with -9"),
        (invariants.bad_ends, with_life(code=-9, killed=True, orphans=(7,)), "left processes behind: (7,)"),
    ],
)
def test_what_must_not_be_is_noticed(check: Check, written: Written, said: str) -> None:
    assert any(said in wrong for wrong in check(written)), list(check(written))
    assert any(said in wrong for wrong in invariants.violations(written))


def test_a_model_that_is_not_its_survivors_mean_is_noticed() -> None:
    def told(models: dict[str, Float32Array], written: Written = GOOD) -> list[str]:
        return list(invariants.wrong_sums(written, models.__getitem__))

    one_off = MODELS["m2"].copy()
    one_off[5] += np.float32(2e-6)  # far less than the lightest site's update, more than rounding explains
    assert "round 2: the model is off by" in told({**MODELS, "m2": one_off})[0]
    assert told({**MODELS, "m2": MODELS["m1"]})  # nothing was added
    assert told({**MODELS, "m2": following(MODELS["m1"], 2, SITES[1:])})  # the lightest site is missing
    assert told({**MODELS, "m2": following(MODELS["m1"], 1)})  # the round before was added again


def test_statistics_that_are_not_the_survivors_are_noticed() -> None:
    wrong = list(invariants.wrong_sums(with_round(statistics={"examples": 6.0, "train.loss": 0.0}), MODELS.__getitem__))
    assert any("6.0 examples, the survivors have 7" in w for w in wrong)
    assert any("the mean loss is 0.0" in w for w in wrong)
