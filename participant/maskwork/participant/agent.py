"""The agent's judgement, as pure functions: is this offer one for us, and what does the site bring to it?

What follows an accepted offer is `maskwork.secagg.client`'s; fetching, training, recording and sending are the
driver's. Everything that an offer claims is checked against what the site itself holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection

from maskwork.participant.policy import Policy
from maskwork.secagg.errors import DeclineCode, PlanRefused
from maskwork.secagg.plan import RoundPlan
from maskwork.task import TrainingConfig, TrainingConfigError
from maskwork.wire.codec import OpenSession

BYTES_PER_PARAMETER_MOST = 8
HEADER_BYTES_MOST = 64 << 20


def check_offer(
    offer: OpenSession,
    *,
    federation: str,
    tasks: Collection[str],
    policy: Policy,
    highest: tuple[int, int] | None,
    rounds_taken: Collection[int],
    now: float,
) -> TrainingConfig:
    """Decide about an offer before anything is fetched for it.

    Args:
        offer: as decoded.
        federation: the site's own.
        tasks: names that the site has configured.
        policy: the site's.
        highest: the highest (round, attempt) of this job on record.
        rounds_taken: the rounds of this job on record.
        now: seconds since the epoch.

    Returns:
        The training config that the plan's digest names.

    Raises:
        PlanRefused: the site does not take part; the detail goes to the coordinator's operator.
    """
    plan = offer.proposal.plan
    if plan.federation != federation:
        raise PlanRefused(DeclineCode.BAD_PLAN, f"the plan is for federation {plan.federation}")
    if plan.task not in tasks:
        raise PlanRefused(DeclineCode.TASK, f"task {plan.task} is not configured at this site")
    check_policy(plan, policy, rounds_taken=rounds_taken, now=now)
    if highest is not None and (plan.round_number, plan.attempt) <= highest:
        raise PlanRefused(
            DeclineCode.STALE_ATTEMPT,
            f"round {plan.round_number}, attempt {plan.attempt} is not above round {highest[0]}, attempt {highest[1]}",
        )
    most = min(policy.max_model_bytes, plan.parameters * BYTES_PER_PARAMETER_MOST + HEADER_BYTES_MOST)
    if not 0 < offer.model_size <= most:
        raise PlanRefused(DeclineCode.WRONG_MODEL, f"a model of {offer.model_size} bytes, at most {most} are accepted")
    return _training_config(offer)


def check_policy(plan: RoundPlan, policy: Policy, *, rounds_taken: Collection[int], now: float) -> None:
    """Ask the policy: of an offer, and again before step 0, since hours may have passed while the model was fetched.

    Raises:
        PlanRefused: with every rule that the plan breaks, and the code of the first.
    """
    refusals = policy.decide(plan, now=now, rounds_taken=rounds_taken)
    if refusals:
        raise PlanRefused(refusals[0].code, "; ".join(refusal.detail for refusal in refusals)[:500])


def _training_config(offer: OpenSession) -> TrainingConfig:
    if hashlib.sha256(offer.training_config).digest() != offer.proposal.plan.training_digest:
        raise PlanRefused(DeclineCode.TRAINING_CONFIG, "the training config is not the one that the plan names")
    try:
        return TrainingConfig.from_canonical_json(offer.training_config)
    except TrainingConfigError as error:
        raise PlanRefused(DeclineCode.TRAINING_CONFIG, str(error)) from error
