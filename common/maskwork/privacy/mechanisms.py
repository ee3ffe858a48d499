"""From a round's parameters to each participant's noise, the ring that holds it, and the events to account for.

Distributed noise (Skellam, discrete Gaussian): each participant clips its update to C, rotates it, scales it so that C
becomes the integer norm c, rounds it stochastically until the rounded vector is within the sensitivity D stated below,
and adds integer noise of variance (z D)^2 / h, where h is the number of honest survivors that the plan counts on. So
any h honest participants' noise has standard deviation z D or more, and whoever drops out or colludes beyond that was
counted already. Central noise is drawn once by the coordinator, with z D: that guarantee trusts it. Neighbours differ
in one participant, who sent its update or sent zeros: who takes part is no secret from the coordinator.

What this deliberately is not: it draws nothing, computes no ε, and decides nothing about what a site accepts.

Rules it upholds:

1. Sensitivities are of the *integer* vector, after rounding: an upper bound that every participant enforces on itself.
2. The ring is wide enough when any wrap in a whole round has probability below 2^-40; noise itself is never clamped.

Sources: Kairouz, Liu, Steinke, "The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure
Aggregation", ICML 2021, Proposition 26 (norm after conditional rounding); Agarwal, Kairouz, Liu, "The Skellam Mechanism
for Differentially Private Federated Learning", NeurIPS 2021, section 4; Hoeffding 1963 for the L1 norm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Final

from maskwork.privacy.events import (
    DiscreteGaussianRelease,
    DiscreteLaplaceRelease,
    PrivacyEvent,
    SkellamRelease,
)
from maskwork.privacy.noise import IntegerNoise
from maskwork.privacy.tables import (
    MAX_LAPLACE_SCALE,
    MAX_STANDARD_DEVIATION,
    AliasTable,
    discrete_gaussian_table,
    discrete_laplace_table,
    skellam_log_tail,
    skellam_table,
)
from maskwork.secagg.encoding import MAX_CLIP_NORM, MIN_CLIP_NORM, MIN_VALUE_BITS, Encoding, Rotation
from maskwork.secagg.masking import Contribution
from maskwork.secagg.ring import MAX_BITS, MIN_BITS

REJECTION_BITS: Final = 40
"""A rounded vector is beyond its sensitivity, and rounded again, with probability below 2^-40."""
WRAP_BITS: Final = 40
MIN_HONEST: Final = 2
"""Honest survivors that a sum needs: with one, it is that participant's own update."""
MAX_INFLATION: Final = 1.25
"""How much rounding may add to the sensitivity before a ring is called too narrow: it adds as much to the noise."""
DRAW_ERROR: Final = 2.0**-108
"""Above the total-variation distance of one draw, for every table that `tables` makes."""

_SLACK: Final = 1 + 2.0**-17  # float32 arithmetic of scaling and rotation
_MOST_VALUE_BITS: Final = 24


class Mechanism(StrEnum):
    """Who draws which noise, under its name in a job file. All of these protect a whole participant."""

    SKELLAM = "skellam"
    DISCRETE_GAUSSIAN = "discrete-gaussian"
    CENTRAL_GAUSSIAN = "central-gaussian"
    CENTRAL_LAPLACE = "central-laplace"

    @property
    def distributed(self) -> bool:
        """Whether the participants draw it, so that the guarantee holds against the coordinator too."""
        return self in (Mechanism.SKELLAM, Mechanism.DISCRETE_GAUSSIAN)

    @property
    def rotation(self) -> Rotation:
        """Laplace noise goes by the L1 norm, which a rotation does not keep."""
        return Rotation.NONE if self is Mechanism.CENTRAL_LAPLACE else Rotation.HADAMARD


class MechanismError(ValueError):
    """Parameters under which a mechanism cannot run; the text says what would be accepted."""


@dataclass(frozen=True, slots=True)
class NoisyRelease:
    """One release of a noisy sum, as its parameters fix it before anybody draws.

    Attributes:
        mechanism: Who draws which noise.
        encoding: Of the updates; every participant's weight is 1.
        parameters: d, coordinates of an update.
        noise_multiplier: z, the noise's standard deviation (its scale, for Laplace) in units of the sensitivity.
        min_honest_survivors: h, the number that distributed noise is divided for.

    Raises:
        MechanismError: on construction, when there would be no noise, or nobody to share it with.
    """

    mechanism: Mechanism
    encoding: Encoding
    parameters: int
    noise_multiplier: float
    min_honest_survivors: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0):
            raise MechanismError(
                f"a noise multiplier of {self.noise_multiplier} is not private: it is a positive number, such as 1.0"
            )
        if self.min_honest_survivors < MIN_HONEST:
            raise MechanismError(
                f"{self.min_honest_survivors} honest survivors: at least {MIN_HONEST} must share a sum, or it is one "
                "site's own; raise cohort.min_survivors, which counts the tolerated colluders too"
            )
        if self.parameters < 1:
            raise MechanismError(f"an update of {self.parameters} coordinates releases nothing")
        if self.encoding.rotation is not self.mechanism.rotation:
            raise MechanismError(f"the {self.mechanism.value} mechanism needs rotation {self.mechanism.rotation.value}")

    @property
    def scaled_norm(self) -> float:
        """c: the norm of a clipped update after scaling, before rounding."""
        return self.encoding.clip_norm / self.encoding.value_range(self.parameters) * self.encoding.scale

    @property
    def sensitivity(self) -> float:
        """D: the L2 norm (the L1 norm for Laplace noise) that no rounded update exceeds, in integer units.

        With b = 2^-40 the probability of rounding again, D² = min(c² + d/4 + sqrt(2 ln 1/b) (c + sqrt(d)/2),
        (c + sqrt(d))²); for L1, D = c + min(d, sqrt(d ln(1/b) / 2)).
        """
        c, d = self.scaled_norm * _SLACK, self.parameters
        log_rejection = REJECTION_BITS * math.log(2)
        if self.mechanism is Mechanism.CENTRAL_LAPLACE:
            return float(math.ceil(c + min(d, math.sqrt(d * log_rejection / 2))))
        root = math.sqrt(d)
        rounded = c * c + d / 4 + math.sqrt(2 * log_rejection) * (c + root / 2)
        return math.sqrt(math.ceil(min(rounded, (c + root) ** 2)))

    @property
    def inflation(self) -> float:
        """Sensitivity after rounding in units of the one before: 1 where rounding costs nothing."""
        return self.sensitivity / self.scaled_norm

    @property
    def noise_parameter(self) -> float:
        """What each draw is made with, in integer units: a variance, or the scale of Laplace noise.

        Distributed noise: of each participant, (z D)² / h. Central noise: of the one draw, (z D)² or z D.
        """
        deviation = self.noise_multiplier * self.sensitivity
        if self.mechanism is Mechanism.CENTRAL_LAPLACE:
            return deviation
        return deviation * deviation / (self.min_honest_survivors if self.mechanism.distributed else 1)

    def table(self) -> AliasTable:
        """What each draw is made from."""
        if self.mechanism is Mechanism.SKELLAM:
            return skellam_table(self.noise_parameter)
        if self.mechanism is Mechanism.CENTRAL_LAPLACE:
            return discrete_laplace_table(self.noise_parameter)
        return discrete_gaussian_table(self.noise_parameter)

    def contribution(self, key: bytes) -> Contribution:
        """What one participant does to its rounded update: it bounds it, and adds its share of distributed noise.

        Args:
            key: 32 secret bytes, fresh for this session and segment; not looked at where the coordinator draws.
        """
        table = self.table() if self.mechanism.distributed else None
        order = 1 if self.mechanism is Mechanism.CENTRAL_LAPLACE else 2
        return Contribution(self.sensitivity, order, None if table is None else partial(IntegerNoise, table, key))

    def events(self, honest: int) -> tuple[PrivacyEvent, ...]:
        """What the release is for an accountant.

        Args:
            honest: How many honest survivors there were; before they are known, h is charged.

        Raises:
            MechanismError: they are fewer than h: no guarantee was given for so few.
        """
        if honest < self.min_honest_survivors:
            raise MechanismError(f"{honest} honest survivors; the noise was divided for {self.min_honest_survivors}")
        bound, each, d = self.sensitivity, self.noise_parameter, self.parameters
        if self.mechanism is Mechanism.CENTRAL_LAPLACE:
            return (DiscreteLaplaceRelease(bound, each, d * DRAW_ERROR),)
        # Of integers, |q| <= q²: the L1 norm is below the square of the L2 norm, as well as below sqrt(d) times it.
        l1 = min(math.sqrt(d) * bound, bound * bound)
        parties = honest if self.mechanism.distributed else 1
        error = parties * d * DRAW_ERROR
        if self.mechanism is Mechanism.SKELLAM:
            return (SkellamRelease(l1, bound, parties * each * (1 - 2.0**-50), error),)
        return (DiscreteGaussianRelease(l1, bound, d, each, parties, error),)

    def noise_reach(self, draws: int) -> float:
        """T: in a sum of `draws` draws, any of the d coordinates is beyond ±T with probability below 2^-40.

        Chernoff's bound for Skellam noise, the subgaussian one for discrete Gaussians, and a union over 2 d tails.
        """
        log_tail = WRAP_BITS * math.log(2) + math.log(2 * self.parameters)
        total = draws * self.noise_parameter
        if self.mechanism is not Mechanism.SKELLAM:
            return math.sqrt(2 * total * log_tail)
        low, high = 0.0, 1.0
        while skellam_log_tail(high, total) > -log_tail:
            low, high = high, 2 * high
        while high - low > 2.0**-20 * high:
            middle = (low + high) / 2
            low, high = (middle, high) if skellam_log_tail(middle, total) > -log_tail else (low, middle)
        return high

    def check_ring(self, cohort: int) -> None:
        """Refuse a sum over `cohort` participants that could leave the ring, or noise beyond what can be drawn.

        Raises:
            MechanismError: saying how wide the ring would have to be, or what else would do.
        """
        laplace = self.mechanism is Mechanism.CENTRAL_LAPLACE
        deviation = self.noise_parameter if laplace else math.sqrt(self.noise_parameter)
        most = MAX_LAPLACE_SCALE if laplace else MAX_STANDARD_DEVIATION
        if deviation > most:
            raise MechanismError(f"noise of {deviation:.0f} steps; {most:.0f} can be drawn: use fewer value bits")
        reach = float(cohort * self.encoding.scale)
        if self.mechanism.distributed:
            reach += self.noise_reach(cohort)
        if reach >= 1 << (self.encoding.ring_bits - 1):
            needed = math.ceil(reach).bit_length() + 1
            raise MechanismError(
                f"the sum of {cohort} participants with their noise needs a ring of {needed} bits, not "
                f"{self.encoding.ring_bits}: widen it, or use fewer value bits"
            )


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a job asks for before there is an encoding; fields as in `NoisyRelease`, the cohort and the clip norm."""

    mechanism: Mechanism
    cohort: int
    min_honest_survivors: int
    parameters: int
    clip_norm: float
    noise_multiplier: float


def private_release(wanted: Wanted, *, ring_bits: int) -> NoisyRelease:
    """The finest encoding that a ring of this width holds together with its noise.

    Raises:
        MechanismError: a parameter is not usable, or the ring is too narrow: the text says what would be accepted.
    """
    if not (math.isfinite(wanted.clip_norm) and MIN_CLIP_NORM <= wanted.clip_norm <= MAX_CLIP_NORM):
        raise MechanismError(f"a clip norm of {wanted.clip_norm} bounds nothing: it is a positive number, such as 1.0")
    if not MIN_BITS <= ring_bits <= MAX_BITS:
        raise MechanismError(f"a ring has {MIN_BITS} to {MAX_BITS} bits, not {ring_bits}")
    if wanted.min_honest_survivors > wanted.cohort:
        raise MechanismError(f"{wanted.min_honest_survivors} honest survivors of {wanted.cohort}: at most all survive")
    found = _finest(wanted, ring_bits)
    if found is not None:
        return found
    for wider in range(ring_bits + 1, MAX_BITS + 1):
        if _finest(wanted, wider) is not None:
            raise MechanismError(f"a ring of {ring_bits} bits is too narrow here: {wider} bits would do")
    raise MechanismError(
        f"no ring of up to {MAX_BITS} bits holds a noise multiplier of {wanted.noise_multiplier:g} here: a smaller one "
        "would do, or more honest survivors to share the noise"
    )


def _finest(wanted: Wanted, ring_bits: int) -> NoisyRelease | None:
    for value_bits in range(min(_MOST_VALUE_BITS, ring_bits), MIN_VALUE_BITS - 1, -1):
        encoding = Encoding(float(wanted.clip_norm), 1, value_bits, ring_bits, wanted.mechanism.rotation)
        release = NoisyRelease(
            wanted.mechanism, encoding, wanted.parameters, wanted.noise_multiplier, wanted.min_honest_survivors
        )
        try:
            release.check_ring(wanted.cohort)
        except MechanismError:
            continue
        return release if release.inflation <= MAX_INFLATION else None
    return None
