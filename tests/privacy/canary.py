"""A lower bound on ε from real releases: a canary in a known direction, through encoding, noise, masks and unmasking.

    python -m tests.privacy.canary --releases 20000

Half of the releases hold the canary, an update of norm C, half hold nothing of that participant; the others send zeros,
so that all there is to see is the noise. The bound is the lower end of a 95 % interval of μ of Gaussian differential
privacy, turned into ε at the claimed δ. With --noise-drawn 0.5 the participants draw half of what they claim.

Sources: Dong, Roth, Su, "Gaussian differential privacy", JRSS B 2022, Corollary 1; Nasr et al., "Tight Auditing of
Differentially Private Machine Learning", USENIX Security 2023, for estimating μ rather than ε.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass, replace

import numpy as np
from scipy import optimize, stats

from maskwork.privacy.accountant import epsilon
from maskwork.privacy.mechanisms import Mechanism, NoisyRelease, Wanted, private_release
from maskwork.secagg.masking import MaskingKeys, accumulate, mask_update, remove_masks
from maskwork.secagg.prg import SignedKey
from maskwork.secagg.ring import centre, packed_size

PARTICIPANTS = 3
PARAMETERS = 16
NOISE_MULTIPLIER = 1.0
DELTA = 1e-5
RING_BITS = 20
ROTATION_SEED = bytes(32)


@dataclass(frozen=True)
class Audit:
    """What was claimed and what was seen. `noise_drawn` is the fraction of the claimed standard deviation drawn."""

    mechanism: Mechanism
    releases: int
    noise_drawn: float
    delta: float
    claimed_epsilon: float
    mu: float
    mu_at_least: float
    mu_at_most: float
    epsilon_at_least: float


def audit(mechanism: Mechanism, *, releases: int, noise_drawn: float = 1.0, seed: int = 7) -> Audit:
    """Attack one mechanism.

    Args:
        mechanism: A distributed one.
        releases: Of both kinds together.
        noise_drawn: 1 for what is claimed.
        seed: Of the keys, so that a run can be repeated.
    """
    wanted = Wanted(mechanism, PARTICIPANTS, PARTICIPANTS, PARAMETERS, 1.0, NOISE_MULTIPLIER)
    claimed = private_release(wanted, ring_bits=RING_BITS)
    drawn = replace(claimed, noise_multiplier=NOISE_MULTIPLIER * noise_drawn)
    generator = np.random.default_rng(seed)
    canary = np.zeros(PARAMETERS, np.float32)
    canary[0] = 1.0
    direction = np.mean([_release(drawn, canary, generator, noisy=False) for _ in range(50)], axis=0)
    direction /= np.linalg.norm(direction)
    nothing = np.zeros(PARAMETERS, np.float32)
    seen = [
        np.array([_release(drawn, update, generator) @ direction for _ in range(releases // 2)])
        for update in (nothing, canary)
    ]
    mu, error = _mu(seen[0], seen[1])
    least = mu - 1.96 * error
    claim = epsilon(claimed.events(PARTICIPANTS), DELTA)
    return Audit(
        mechanism, releases, noise_drawn, DELTA, claim, mu, least, mu + 1.96 * error, gaussian_epsilon(least, DELTA)
    )


def _release(
    release: NoisyRelease, first: np.ndarray, generator: np.random.Generator, *, noisy: bool = True
) -> np.ndarray:
    """One sum over all participants, unmasked: int64[PARAMETERS]. The others send zeros."""
    bits = release.encoding.ring_bits
    masks = [SignedKey(generator.bytes(16), False) for _ in range(PARTICIPANTS)]
    total = np.zeros(PARAMETERS, np.uint32)
    packed = np.zeros(packed_size(PARAMETERS, bits), np.uint8)
    for i, mask in enumerate(masks):
        contribution = release.contribution(generator.bytes(32))
        mask_update(
            first if i == 0 else np.zeros_like(first),
            1,
            encoding=release.encoding,
            keys=MaskingKeys((mask,), (), generator.bytes(16)),
            rotation_seed=ROTATION_SEED,
            out_u8=packed,
            contribution=contribution if noisy else replace(contribution, noise=None),
        )
        accumulate(total, packed, bits)
    remove_masks(total, masks)
    centred = np.zeros(PARAMETERS, np.int32)
    centre(total, bits, centred)
    return centred.astype(np.int64)


def _mu(without: np.ndarray, present: np.ndarray) -> tuple[float, float]:
    """μ and its standard error: the distance of two bells of the same width in widths, by the delta method."""
    count = len(without) + len(present)
    deviation = math.sqrt((without.var(ddof=1) + present.var(ddof=1)) / 2)
    mu = float(present.mean() - without.mean()) / deviation
    return mu, math.sqrt(1 / len(without) + 1 / len(present) + mu * mu / (2 * count))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The ε at which a μ-GDP mechanism has exactly that δ; 0 where it has less at every ε."""

    def excess(at: float) -> float:
        """Corollary 1: δ(ε) = Φ(-ε/μ + μ/2) - e^ε Φ(-ε/μ - μ/2)."""
        tail = math.exp(at + stats.norm.logcdf(-at / mu - mu / 2))
        return float(stats.norm.cdf(-at / mu + mu / 2)) - tail - delta

    if mu <= 0 or excess(0.0) <= 0:
        return 0.0
    most = 1.0
    while excess(most) > 0:
        most *= 2
    return float(optimize.brentq(excess, 0.0, most))


def main() -> None:
    """Print one line of JSON for each mechanism, with the claimed noise and with half of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--releases", type=int, default=20_000)
    arguments = parser.parse_args()
    for mechanism in (Mechanism.SKELLAM, Mechanism.DISCRETE_GAUSSIAN):
        for noise_drawn in (1.0, 0.5):
            found = audit(mechanism, releases=arguments.releases, noise_drawn=noise_drawn)
            print(json.dumps({**asdict(found), "mechanism": mechanism.value}))


if __name__ == "__main__":
    main()
