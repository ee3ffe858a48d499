"""The guarantee, attacked: a canary in a known direction, seen through encoding, masks and unmasking, many times.

An adversary who knows everything but the noise wants to tell whether one participant's update was the canary (norm C)
or nothing. Projected on the canary's rounded direction the released sums are two bells whose distance in standard
deviations is the mechanism's μ of Gaussian differential privacy (Dong, Roth, Su, JRSS B 2022); its 95 % interval gives
a lower bound on ε at the claimed δ (their Corollary 1). That must lie under the claimed ε, and above it when the
participants draw half the noise that they claim. `python -m tests.privacy.canary` does the same with more releases.
"""

from __future__ import annotations

import pytest
from tests.privacy.canary import Audit, audit

from maskwork.privacy.mechanisms import Mechanism

RELEASES = 1000


@pytest.fixture(scope="module", params=[Mechanism.SKELLAM, Mechanism.DISCRETE_GAUSSIAN])
def claimed(request: pytest.FixtureRequest) -> Audit:
    return audit(request.param, releases=RELEASES)


def test_the_lower_bound_lies_under_the_claimed_epsilon(claimed: Audit) -> None:
    assert 0.5 * claimed.claimed_epsilon < claimed.epsilon_at_least < claimed.claimed_epsilon


def test_half_the_noise_is_found_out(claimed: Audit) -> None:
    halved = audit(claimed.mechanism, releases=RELEASES, noise_drawn=0.5)
    assert halved.claimed_epsilon == claimed.claimed_epsilon
    assert halved.epsilon_at_least > claimed.claimed_epsilon
