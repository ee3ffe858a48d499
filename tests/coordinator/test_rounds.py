"""Between sessions: when an attempt is opened and with whom, which plan it gets, and what an abort changes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from maskwork.coordinator import rounds
from maskwork.coordinator.rounds import FIRST_RETRY_S, LONGEST_RETRY_S, GiveUp, JobRun, OpenAttempt, PresentSite, Wait
from maskwork.job import JobSpec
from maskwork.secagg.encoding import EncodingParameterError, Rotation
from maskwork.secagg.errors import AbortReason, PlanError
from maskwork.secagg.graph import GraphError, GraphKind
from maskwork.secagg.plan import RoundPlan, survivors_digest
from maskwork.wire import codec

NOW = 1000.0
RAND = bytes(16)


def site(name: str, *tasks: str) -> PresentSite:
    return PresentSite(name, name.encode().ljust(32, b"\0"), frozenset(tasks or ("digits",)))


def present(*names: str) -> list[PresentSite]:
    return [site(name) for name in names]


def run(cohort: dict[str, object] | None = None, **changes: object) -> JobRun:
    spec = JobSpec.model_validate(
        {"name": "job", "task": "digits", "rounds": 5, "cohort": {"wait_s": 10.0, **(cohort or {})}, **changes}
    )
    return JobRun("job-1", spec, 2, 3, bytes(32), 100, ("a", "b", "c"))


def opened(decision: rounds.Decision) -> tuple[str, ...]:
    assert isinstance(decision, OpenAttempt), decision
    return tuple(s.name for s in decision.cohort)


def decide(state: JobRun, *names: str, now: float = NOW, rand: bytes = RAND) -> tuple[JobRun, rounds.Decision]:
    return rounds.decide(state, present(*names), now=now, rand=rand)


# --- decide ---------------------------------------------------------------------------------------------------------


def test_too_few_sites_wait_for_whoever_connects() -> None:
    state, decision = decide(run(), "a", "b")
    assert decision == Wait("2 of the 3 sites needed are ready", None)
    assert state.ready_since is None


def test_what_is_missing_is_said_by_name() -> None:
    state = replace(run({"participants": ["a", "b", "c", "d"]}), excluded={"a": "declined"}, barred={"b": "convicted"})
    _, decision = rounds.decide(state, [site("a"), site("b"), site("c", "other")], now=NOW, rand=RAND)
    assert decision == Wait(
        "0 of the 3 sites needed are ready; not configured for task digits: c; a: declined; b: convicted; "
        "not connected: d",
        None,
    )


def test_with_the_minimum_there_others_are_waited_for_once() -> None:
    state, decision = decide(run(), "a", "b", "c")
    assert decision == Wait("3 sites are ready; waiting for more", NOW + 10)
    state, decision = decide(state, "a", "b", "c", now=NOW + 9.9)
    assert decision == Wait("3 sites are ready; waiting for more", NOW + 10)
    state, decision = decide(state, "a", "b", "c", "d", now=NOW + 10)
    assert opened(decision) == ("a", "b", "c", "d")


def test_the_wait_begins_anew_when_the_minimum_is_lost() -> None:
    state, _ = decide(run(), "a", "b", "c")
    state, _ = decide(state, "a", "b", now=NOW + 5)
    _, decision = decide(state, "a", "b", "c", now=NOW + 20)
    assert decision == Wait("3 sites are ready; waiting for more", NOW + 30)


def test_nobody_is_waited_for_when_all_that_are_wanted_are_there() -> None:
    _, decision = decide(run({"participants": ["c", "b", "a"]}), "b", "a", "c", "x")
    assert opened(decision) == ("a", "b", "c")
    _, decision = decide(run({"max_participants": 3}), "a", "b", "c")
    assert opened(decision) == ("a", "b", "c")


def test_the_next_round_does_not_wait_again_for_those_who_were_not_there() -> None:
    state, decision = decide(run({"wait_s": 0}), "a", "b", "c")
    state = replace(state, spec=run().spec)
    following = rounds.after_commit(state, model=bytes(32), survivors=("a", "b", "c"))
    assert following is not None
    _, decision = decide(following, "a", "b", "c")
    assert opened(decision) == ("a", "b", "c")
    _, decision = decide(following, "a", "b", "c", "d")  # and takes in who came meanwhile
    assert opened(decision) == ("a", "b", "c", "d")


def test_the_next_round_waits_for_one_that_was_there_and_is_gone_but_not_for_one_that_was_left_out() -> None:
    state, _ = decide(run({"wait_s": 0}), "a", "b", "c", "d")
    state = replace(state, spec=run().spec)
    _, decision = decide(state, "a", "b", "c")
    assert isinstance(decision, Wait)
    _, decision = decide(rounds.exclude(state, {"d": "declined"}), "a", "b", "c", "d")
    assert opened(decision) == ("a", "b", "c")
    _, decision = decide(replace(state, barred={"d": "convicted"}), "a", "b", "c", "d")
    assert opened(decision) == ("a", "b", "c")


def test_more_sites_than_wanted_are_drawn_by_fresh_randomness() -> None:
    names = [f"s{i:02}" for i in range(20)]
    draws = {opened(decide(run({"max_participants": 4}), *names, rand=bytes([i]) * 16)[1]) for i in range(30)}
    assert all(len(draw) == 4 and draw == tuple(sorted(draw)) for draw in draws)
    assert set().union(*draws) == set(names)
    assert len(draws) > 25


def test_a_retry_waits_until_its_pause_is_over() -> None:
    state = replace(run({"participants": ["a", "b", "c"]}), not_before=NOW + 1, last_abort="cancelled")
    _, decision = decide(state, "a", "b", "c")
    assert decision == Wait("retrying round 2 after cancelled", NOW + 1)
    _, decision = decide(state, "a", "b", "c", now=NOW + 1)
    assert opened(decision) == ("a", "b", "c")


def test_used_up_attempts_end_the_job_with_what_to_do() -> None:
    state = replace(run(max_attempts=2), failures=2, last_abort="too-few-participants")
    _, decision = decide(state, "a", "b", "c")
    assert isinstance(decision, GiveUp)
    assert "round 2 failed 2 times. The last time: too-few-participants." in decision.reason
    assert "maskwork model export" in decision.reason
    _, decision = decide(replace(state, last_abort="too-few-participants; a: withdrew (same-model)"), "a", "b", "c")
    assert isinstance(decision, GiveUp)
    assert "maskwork model init with another --seed" in decision.reason


def test_sites_that_say_the_same_again_and_again_are_not_asked_for_ever() -> None:
    state, drops = run(), {"a": "withdrew (training-failed)", "b": "withdrew (training-failed)"}
    tries = 0
    while not isinstance(decide(state, "a", "b", "c", now=NOW + 1000 * tries)[1], GiveUp):
        reason = AbortReason.TOO_FEW_PARTICIPANTS
        state = rounds.after_abort(state, reason=reason, excluded={}, barred={}, now=NOW, drops=drops)
        tries += 1
    assert tries == rounds.SAME_ANSWERS + 1
    assert "a: withdrew (training-failed); b: withdrew (training-failed)" in rounds_reason(state)


def test_sites_that_vanish_are_asked_as_often_as_the_job_says() -> None:
    state = run()
    for _ in range(rounds.SAME_ANSWERS + 2):
        drops = {"a": "disconnected (away)", "b": "withdrew (training-failed)"}
        reason = AbortReason.TOO_FEW_PARTICIPANTS
        state = rounds.after_abort(state, reason=reason, excluded={}, barred={}, now=NOW, drops=drops)
    assert not isinstance(decide(state, "a", "b", "c", now=NOW + 1000)[1], GiveUp)


def rounds_reason(state: JobRun) -> str:
    _, decision = decide(state, "a", "b", "c")
    assert isinstance(decision, GiveUp)
    return decision.reason


# --- moving on ------------------------------------------------------------------------------------------------------


def test_an_abort_counts_pauses_longer_each_time_and_leaves_out_the_blamed() -> None:
    state, pauses = run(), []
    for _ in range(12):
        state = rounds.after_abort(
            state, reason=AbortReason.CANCELLED, excluded={"a": "declined"}, barred={"b": "lied"}, now=NOW
        )
        pauses.append(state.not_before - NOW)
    assert (state.attempt, state.failures, state.last_abort) == (15, 12, "cancelled")
    assert (state.excluded, state.barred) == ({"a": "declined"}, {"b": "lied"})
    assert pauses[:3] == pytest.approx([FIRST_RETRY_S, 2 * FIRST_RETRY_S, 4 * FIRST_RETRY_S])
    assert max(pauses) == pauses[-1] == LONGEST_RETRY_S
    rounds.after_abort(replace(state, failures=10**6), reason=AbortReason.CANCELLED, excluded={}, barred={}, now=NOW)


def test_connecting_anew_lifts_an_exclusion_but_no_conviction() -> None:
    state = replace(run(), excluded={"a": "declined", "b": "declined"}, barred={"a": "lied"})
    state = rounds.readmit(state, "a")
    assert (state.excluded, state.barred) == ({"b": "declined"}, {"a": "lied"})
    assert rounds.readmit(state, "z") == state
    _, decision = decide(rounds.readmit(state, "b"), "a", "b")
    assert isinstance(decision, Wait)
    assert "1 of the 3" in decision.why


def test_a_commit_begins_the_next_round_afresh() -> None:
    state = replace(run(), failures=3, not_before=NOW + 9, excluded={"a": "x"}, barred={"b": "y"}, last_abort="z")
    following = rounds.after_commit(state, model=b"m" * 32, survivors=("c", "d", "e"))
    assert following is not None
    assert (following.round_number, following.attempt, following.failures, following.not_before) == (3, 1, 0, 0.0)
    assert (following.model, following.previous_survivors) == (b"m" * 32, ("c", "d", "e"))
    assert (following.excluded, following.barred, following.last_abort) == ({"a": "x"}, {"b": "y"}, "")


def test_the_last_commit_ends_the_job() -> None:
    assert rounds.after_commit(replace(run(), round_number=5), model=bytes(32), survivors=()) is None


# --- plans ----------------------------------------------------------------------------------------------------------


def build(state: JobRun, members: int) -> RoundPlan:
    cohort = tuple(site(f"s{i:05}") for i in range(members))
    return rounds.build_plan(state, cohort, federation="ward", nonce=bytes(16), training_digest=b"t" * 32)


@pytest.mark.parametrize(
    ("members", "dropouts", "colluders"), [(3, 0, 1), (4, 1, 1), (5, 1, 2), (7, 2, 2), (10, 3, 3), (100, 33, 33)]
)
def test_thresholds_of_the_complete_graph(members: int, dropouts: int, colluders: int) -> None:
    """DESIGN section 4: n: dropouts, c → 4: 1, 1; 5: 1, 2; 7: 2, 2; 10: 3, 3."""
    graph = build(run(), members).graph
    assert (graph.kind, graph.degree, graph.colluders) == (GraphKind.COMPLETE, members - 1, colluders)
    assert graph.threshold == 2 * members // 3 + 1
    assert members - graph.threshold == dropouts
    assert 2 * graph.threshold > members + graph.colluders


@pytest.mark.parametrize("members", range(3, 129))
def test_every_complete_cohort_has_a_plan_that_survives_its_dropouts(members: int) -> None:
    plan = build(run(), members)
    assert plan.survivor_floor <= plan.graph.threshold
    assert codec.decode_plan(codec.encode_plan(plan)) == plan


def test_a_plan_says_where_the_job_stands() -> None:
    state = run(metrics={"train.loss": 2.0, "eval.accuracy": 1.0}, encoding={"weight_cap": 50, "clip_norm": 3.0})
    plan = build(state, 5)
    assert (plan.federation, plan.job, plan.task) == ("ward", "job-1", "digits")
    assert (plan.round_number, plan.rounds_total, plan.attempt) == (2, 5, 3)
    assert plan.previous_survivors == survivors_digest(("a", "b", "c"))
    assert [(s.name, s.bound) for s in plan.statistics] == [
        ("examples", 50.0),
        ("eval.examples", 50.0),
        ("eval.accuracy", 50.0),
        ("train.loss", 100.0),
    ]
    assert (plan.encoding.clip_norm, plan.encoding.weight_cap) == (3.0, 50)
    assert plan.deadlines.masked_update_ms == 3_600_000


def test_a_deadline_is_never_rounded_to_nothing() -> None:
    plan = build(run(deadlines={"unmask_s": 0.0001}), 3)
    assert plan.deadlines.unmask_ms == 1


@pytest.mark.parametrize(
    ("encoding", "members", "bits"),
    [
        ({}, 10, (24, 28, Rotation.NONE)),
        ({}, 3, (24, 26, Rotation.NONE)),
        ({"preset": "compact"}, 10, (16, 20, Rotation.HADAMARD)),
        ({"value_bits": 12}, 10, (12, 16, Rotation.NONE)),
        ({"preset": "compact", "value_bits": 20}, 4, (20, 22, Rotation.HADAMARD)),
    ],
)
def test_encodings(encoding: dict[str, object], members: int, bits: tuple[int, int, Rotation]) -> None:
    chosen = build(run(encoding=encoding), members).encoding
    assert (chosen.value_bits, chosen.ring_bits, chosen.rotation) == bits


SPARSE = {"graph": "sparse", "max_participants": 1000}


def test_the_sparse_graph_is_used_only_above_the_limit_and_on_request() -> None:
    assert build(run(SPARSE), 128).graph.kind is GraphKind.COMPLETE
    graph = build(run(SPARSE), 200).graph
    assert graph.kind is GraphKind.SPARSE
    assert graph.degree % 2 == 0
    assert 2 * graph.threshold == graph.degree + graph.colluders + 1
    assert (graph.corrupt_permille, graph.dropout_permille) == (50, 100)


@pytest.mark.parametrize(
    ("changes", "members", "error"),
    [
        ({"metrics": {"train.loss": 1e300}}, 3, PlanError),
        ({"metrics": {f"train.m{i}": 1.0 for i in range(300)}}, 3, PlanError),
        ({"metrics": {"eval.examples": 1.0}}, 3, PlanError),
        ({"encoding": {"value_bits": 24}, "cohort": SPARSE}, 600, (PlanError, EncodingParameterError)),
        ({"cohort": {**SPARSE, "corrupt_permille": 499, "dropout_permille": 499}}, 200, (GraphError, PlanError)),
    ],
)
def test_a_job_that_cannot_be_planned_is_refused_with_an_error_that_the_driver_knows(
    changes: dict[str, object], members: int, error: type[Exception]
) -> None:
    cohort = changes.pop("cohort", None)
    assert cohort is None or isinstance(cohort, dict)
    with pytest.raises(error):
        build(run(cohort, **changes), members)


# --- after unmasking was asked for ------------------------------------------------------------------------------------


def test_on_a_model_that_was_answered_on_only_the_same_survivors_are_asked() -> None:
    state = rounds.repeat_only(run({"wait_s": 60}), ("a", "b", "c"))
    _, decision = decide(state, "a", "b", "d", "e")
    assert isinstance(decision, Wait)
    assert decision.until is None
    assert "answer only for the same survivors (a, b, c). Missing: c." in decision.why
    _, decision = decide(state, "a", "b", "c", "d")
    assert isinstance(decision, OpenAttempt)
    assert [site.name for site in decision.cohort] == ["a", "b", "c"]


def test_the_next_model_is_free_again() -> None:
    state = rounds.after_commit(rounds.repeat_only(run(), ("a", "b", "c")), model=bytes(32), survivors=("a", "b", "c"))
    assert state is not None
    assert state.only == frozenset()


def test_a_cohort_with_a_convicted_dealer_is_not_waited_for() -> None:
    state = rounds.after_abort(run(), reason=AbortReason.DEALER_EQUIVOCATED, excluded={}, barred={"c": "lied"}, now=0.0)
    assert rounds.repeat_only(state, ("a", "b", "c")).only == frozenset()
