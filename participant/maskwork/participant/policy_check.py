"""What would happen to a plan at a site, line by line, without a coordinator: the policy's findings and the records'.

Pure. The policy's own rules are `policy_rules`, the same that an offer meets; here are added those that need more than
a plan and a policy, which say so where it is not at hand. It is NOT the whole of what an offer meets: signatures, the
roster's certificate of the site, the model's digest and the training config are the agent's and the core's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from maskwork.participant.policy import Policy
from maskwork.participant.policy_rules import Finding, Refusal, findings, shown
from maskwork.secagg.client import check_same_model_roster
from maskwork.secagg.client_states import SiteRules
from maskwork.secagg.errors import PlanRefused
from maskwork.secagg.plan import RoundPlan

_RECORDS = "not checked offline: it needs the site's records (--state)"


@dataclass(frozen=True, slots=True)
class Records:
    """What a site has on record about a plan's job and model.

    Attributes:
        rounds_taken: rounds of the job that it took up.
        released: survivor sets that it answered for on the model.
    """

    rounds_taken: frozenset[int]
    released: tuple[frozenset[str], ...]


def explain(policy: Policy, plan: RoundPlan, *, now: float, records: Records | None) -> Iterator[Finding]:
    """Every rule in turn; a rule that needs what is not here is reported as unchecked, never as passed."""
    taken = None if records is None else records.rounds_taken
    yield from findings(policy, plan, now=now, rounds_taken=taken)
    yield _same_model(policy, plan, records)
    size = "not checked: a plan does not say it, the offer does"
    yield Finding("model file", "", "max_model_bytes", shown(policy.max_model_bytes), unchecked=size)
    age = "not checked: a plan names the list, its date is in the list itself"
    days = shown(policy.max_revocation_age_days)
    yield Finding("age of the revocation list", "", "max_revocation_age_days", days, unchecked=age)


def _same_model(policy: Policy, plan: RoundPlan, records: Records | None) -> Finding:
    key = "min_survivor_difference"
    allowed = shown(policy.min_survivor_difference)
    if records is None:
        return Finding("same model", "", key, allowed, unchecked=_RECORDS)
    rules = SiteRules(min_survivor_difference=policy.min_survivor_difference, released=records.released)
    refusal = None
    try:
        check_same_model_roster(frozenset(entry.participant for entry in plan.roster), rules)
    except PlanRefused as refused:
        refusal = Refusal(refused.code, refused.detail)
    return Finding("same model", f"{len(records.released)} sums released on it", key, allowed, refusal)
