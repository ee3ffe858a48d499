"""Each rule of a site's policy, applied to one plan: what the plan says, what the policy allows, and whether it passes.

Pure: the hour and what the site has done before are arguments. `Policy.decide` takes the refusals from here and
`maskwork participant check-policy` prints every finding, so that what is explained is what is enforced.

Rules that hold for a while only, participation and hours, come last: the code of a refusal is that of its first rule,
and a site that declines for one of these alone is asked again (docs/policy.md).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import TYPE_CHECKING, Final

from maskwork.secagg.errors import DeclineCode
from maskwork.secagg.graph import GraphKind
from maskwork.secagg.plan import RoundPlan

if TYPE_CHECKING:
    from maskwork.participant.policy import Policy

JOB_SUFFIX: Final = re.compile(r"-[0-9a-f]{8}")
"""What a coordinator appends to a job's name to make its id."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """One rule that a plan breaks; the detail is shown to the coordinator's operator."""

    code: DeclineCode
    detail: str


@dataclass(frozen=True, slots=True)
class Finding:
    """What one rule says of one plan.

    Attributes:
        rule: what is looked at, for people.
        proposed: what the plan says.
        key: the policy's key.
        allowed: its value, as it would be written in the file.
        refusal: None if the plan passes.
        unchecked: why it could not be looked at here; empty if it was.
    """

    rule: str
    proposed: str
    key: str
    allowed: str
    refusal: Refusal | None = None
    unchecked: str = ""


def findings(
    policy: Policy, plan: RoundPlan, *, now: float | None, rounds_taken: Collection[int] | None
) -> Iterator[Finding]:
    """Every rule in turn.

    Args:
        policy: the site's.
        plan: what is proposed.
        now: seconds since the epoch; None: the hours are not looked at.
        rounds_taken: rounds of this job that the site has taken up before; None: participation is not looked at.
    """
    yield from _what_for(policy, plan)
    yield from _with_whom(policy, plan)
    yield from _graph(policy, plan)
    yield _rounds(policy, plan)
    yield from _encoding(policy, plan)
    yield _revocation(policy, plan)
    yield _participation(policy, plan, rounds_taken)
    yield _hours(policy, now)


def _finding(
    policy: Policy, key: str, rule: str, proposed: object, *, passes: bool, code: DeclineCode, detail: str
) -> Finding:
    refusal = None if passes else Refusal(code, detail)
    return Finding(rule, str(proposed), key, shown(getattr(policy, key)), refusal)


def shown(value: object) -> str:
    """A key's value as it would be written in the policy file; "none" for an absent one."""
    match value:
        case None:
            return "none"
        case tuple():
            return "[" + ", ".join(map(shown, value)) + "]"
        case float():
            return f"{value:g}"
        case str() | bool() | int():
            return json.dumps(value, ensure_ascii=False)
        case _:
            return str(value)


# --- what for -------------------------------------------------------------------------------------------------------


def _what_for(policy: Policy, plan: RoundPlan) -> Iterator[Finding]:
    job = JOB_SUFFIX.sub("", plan.job) if JOB_SUFFIX.fullmatch(plan.job[-9:]) else plan.job
    yield _finding(
        policy,
        "jobs",
        "job",
        plan.job,
        passes=not policy.jobs or any(fnmatchcase(name, p) for p in policy.jobs for name in (plan.job, job)),
        code=DeclineCode.POLICY,
        detail=f"job {plan.job} is not among those allowed",
    )
    yield _finding(
        policy,
        "tasks",
        "task",
        plan.task,
        passes=not policy.tasks or any(fnmatchcase(plan.task, pattern) for pattern in policy.tasks),
        code=DeclineCode.TASK,
        detail=f"task {plan.task} is not among those allowed",
    )
    masked = f"masked, suite {plan.suite}"  # there is no other plan: this line is for whoever reads the explanation
    yield Finding("secure aggregation", masked, "secure_aggregation", shown(policy.secure_aggregation))


# --- with whom ------------------------------------------------------------------------------------------------------


def _with_whom(policy: Policy, plan: RoundPlan) -> Iterator[Finding]:
    yield _finding(
        policy,
        "min_cohort",
        "cohort",
        plan.cohort,
        passes=plan.cohort >= policy.min_cohort,
        code=DeclineCode.COHORT_TOO_SMALL,
        detail=f"cohort {plan.cohort} < {policy.min_cohort}",
    )
    yield _finding(
        policy,
        "min_survivors",
        "possible survivors",
        plan.cohort,
        passes=plan.cohort >= policy.min_survivors,
        code=DeclineCode.TOO_FEW_SURVIVORS,
        detail=f"cohort {plan.cohort} < survivors {policy.min_survivors}",
    )
    trusted = len(policy.trusted.intersection(entry.participant for entry in plan.roster))
    yield _finding(
        policy,
        "min_trusted_survivors",
        "trusted members",
        trusted,
        passes=trusted >= policy.min_trusted_survivors,
        code=DeclineCode.TOO_FEW_SURVIVORS,
        detail=f"trusted members {trusted} < {policy.min_trusted_survivors}",
    )
    yield _finding(
        policy,
        "min_colluders",
        "tolerated colluders",
        plan.graph.colluders,
        passes=plan.graph.colluders >= policy.min_colluders,
        code=DeclineCode.COLLUDERS,
        detail=f"tolerated colluders {plan.graph.colluders} < {policy.min_colluders}",
    )


def _graph(policy: Policy, plan: RoundPlan) -> Iterator[Finding]:
    graph = plan.graph
    sparse = graph.kind is GraphKind.SPARSE
    yield _finding(
        policy,
        "sparse_graph",
        "graph",
        "sparse" if sparse else "complete",
        passes=policy.sparse_graph or not sparse,
        code=DeclineCode.GRAPH,
        detail="the sparse graph is not allowed here",
    )
    if not sparse:
        return
    yield _finding(
        policy,
        "min_corrupt_permille",
        "corrupt members assumed",
        f"{graph.corrupt_permille} per mille",
        passes=graph.corrupt_permille >= policy.min_corrupt_permille,
        code=DeclineCode.GRAPH,
        detail=f"corrupt members assumed {graph.corrupt_permille} < {policy.min_corrupt_permille} per mille",
    )
    seen = graph.degree + 1  # a site verifies its neighbours and itself, nobody else
    for key, what in (("min_survivors", "survivors"), ("min_trusted_survivors", "trusted survivors")):
        least: int = getattr(policy, key)
        yield _finding(
            policy,
            key,
            "members seen here",
            seen,
            passes=seen >= least,
            code=DeclineCode.TOO_FEW_SURVIVORS,
            detail=f"{seen} members seen here < {what} {least}",
        )


# --- how much --------------------------------------------------------------------------------------------------------


def _rounds(policy: Policy, plan: RoundPlan) -> Finding:
    return _finding(
        policy,
        "max_rounds",
        "rounds",
        plan.rounds_total,
        passes=plan.rounds_total <= policy.max_rounds,
        code=DeclineCode.POLICY,
        detail=f"rounds {plan.rounds_total} > {policy.max_rounds}",
    )


def _encoding(policy: Policy, plan: RoundPlan) -> Iterator[Finding]:
    bits, norm, cap = plan.encoding.value_bits, plan.encoding.clip_norm, plan.encoding.weight_cap
    lowest, highest = policy.min_value_bits, policy.max_value_bits
    yield Finding(
        "value bits",
        str(bits),
        "min_value_bits, max_value_bits",
        f"{lowest}, {highest}",
        None
        if lowest <= bits <= highest
        else Refusal(DeclineCode.ENCODING, f"value bits {bits} not within {lowest}..{highest}"),
    )
    for key, value, passes in (
        ("min_clip_norm", norm, norm >= policy.min_clip_norm),
        ("max_clip_norm", norm, norm <= policy.max_clip_norm),
        ("min_weight_cap", cap, cap >= policy.min_weight_cap),
        ("max_weight", cap, cap <= policy.max_weight),
    ):
        rule, sign = "clip norm" if "clip" in key else "weight cap", "<" if key.startswith("min") else ">"
        number = shown(value)
        detail = f"{rule} {number} {sign} {shown(getattr(policy, key))}"
        yield _finding(policy, key, rule, number, passes=passes, code=DeclineCode.ENCODING, detail=detail)


def _revocation(policy: Policy, plan: RoundPlan) -> Finding:
    named = f"number {plan.revocation_number}" if plan.revocation_number else "none"
    return _finding(
        policy,
        "revocation_list",
        "revocation list",
        named,
        passes=plan.revocation_number > 0 or policy.revocation_list != "required",
        code=DeclineCode.REVOCATION,
        detail="no revocation list is published, and this site requires one",
    )


# --- for a while only -----------------------------------------------------------------------------------------------


def _participation(policy: Policy, plan: RoundPlan, rounds_taken: Collection[int] | None) -> Finding:
    window = min(policy.participation_window, plan.rounds_total)
    keys, allowed = "max_participation, participation_window", shown(policy.max_participation)
    if rounds_taken is None:
        unchecked = "not checked offline: it needs the site's records (--state)"
        return Finding("participation", "", keys, f"{allowed}, {policy.participation_window}", unchecked=unchecked)
    since = plan.round_number - window
    # A round counts once, however many attempts it takes, and the one proposed counts as taken.
    taken = len({number for number in rounds_taken if since < number < plan.round_number}) + 1
    share = f"{taken} of {window} rounds"
    passes = taken <= Fraction(str(policy.max_participation)) * window
    refusal = Refusal(DeclineCode.PARTICIPATION, f"participation in {share} > {allowed}")
    return Finding(
        "participation", share, keys, f"{allowed}, {policy.participation_window}", None if passes else refusal
    )


def _hours(policy: Policy, now: float | None) -> Finding:
    hours = policy.hours
    if hours is None:
        return Finding("hours", "any", "hours", "none")
    if now is None:
        return Finding("hours", "", "hours", str(hours), unchecked="not checked: no time was given")
    moment = f"{hours.local(now):%a %H:%M}".lower()
    refusal = Refusal(DeclineCode.PAUSED, f"{moment} is outside the hours agreed to: {hours}")
    return Finding("hours", moment, "hours", str(hours), None if hours.open_at(now) else refusal)
