"""What releases add up to: an (ε, δ) from the immutable records of `maskwork.privacy.events`.

Rényi divergences add up under adaptive composition, and so do privacy loss distributions (PLD). Each kind of record has
a curve of the first; example-level steps and discrete Laplace noise have the second as well. What is returned is the
smaller ε: both are upper bounds. Conversions and the curves of sampled Gaussians are dp_accounting's; here are the
curves that it lacks:

- Skellam noise: Agarwal, Kairouz, Liu, "The Skellam Mechanism for Differentially Private Federated Learning",
  NeurIPS 2021, Theorem 3.5 and Corollary 3.6;
- sums of discrete Gaussians: Kairouz, Liu, Steinke, "The Distributed Discrete Gaussian Mechanism for Federated Learning
  with Secure Aggregation", ICML 2021, Proposition 14; for one party Canonne, Kamath, Steinke, NeurIPS 2020;
- discrete Laplace noise: summed in closed form.

What this deliberately is not: it draws no noise, derives no sensitivity, keeps no ledger and knows nobody's budget. And
it has **no sampling at participant level**: the coordinator chooses the cohort, so who was in it is no secret from the
party that the guarantee is against, and amplification by sampling would be a claim without a ground. Only a site's own
choice among its own examples (`PoissonSampledGaussianSteps`) counts.

Rules:
 1. Every number returned is an upper bound, at the cost of being larger than need be. No answer is infinity.
 2. Records of two levels are never added up; a record that is not known is refused.
 3. How far a sampler is from its distribution (`total_variation`) is paid out of δ.
 4. Importing this module costs about two seconds (dp_accounting brings scipy): it is imported where an ε is computed,
    never at the top of another module, so that a federation without noise does not pay for it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Final, Protocol, assert_never

import numpy as np
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from dp_accounting.privacy_accountant import UnsupportedEventError
from dp_accounting.rdp import RdpAccountant
from dp_accounting.rdp.rdp_privacy_accountant import DEFAULT_RDP_ORDERS
from numpy.typing import NDArray

from maskwork.privacy.events import (
    DiscreteGaussianRelease,
    DiscreteLaplaceRelease,
    Level,
    PoissonSampledGaussianSteps,
    PrivacyEvent,
    SkellamRelease,
    UnknownEventError,
    level_of,
)

Orders = NDArray[np.float64]

ORDERS: Final = tuple(
    sorted({*DEFAULT_RDP_ORDERS, 72, 80, 96, 112, 160, 192, 224, 320, 384, 448, 640, 768, 1536, 2048, 4096})
)
"""Orders of the Rényi divergence that are tried; the large ones are the best for ε far below 1."""

MIN_NOISE_MULTIPLIER: Final = 2.0**-10
MAX_NOISE_MULTIPLIER: Final = 2.0**20
"""Where `noise_multiplier_for` looks: below the first nothing is private, above the second nothing is left."""

_CLOSE: Final = 1e-3
_ROUNDING: Final = 1e-14  # of a logarithm near 0, many times over
_FAR: Final = 10.0  # the curves' ε is seldom four times what the distribution says
_STEPS: Final = 200
_OVERSHOOT: Final = 1e-6
_EXPONENT: Final = 700.0  # e^709 is the largest that a float holds

_PLD_INTERVAL: Final = 1e-4  # dp_accounting's own
_PLD_SEARCH: Final = 5e-4  # of the ε that is looked for: still an upper bound, a little larger and ten times as fast
_PLD_POINTS: Final = 100_000  # per ε: a distribution that reaches to ε = 100 is held at steps of 0.001
_PLD_KINDS: Final = 16
_PLD_SENSITIVITY: Final = 10_000  # a distribution of discrete Laplace noise has one step per unit of sensitivity


class AccountingError(ValueError):
    """A question without an answer: a δ that is no probability, or records that cannot be added up."""


class _Guarantee(Protocol):
    """What both accountants of dp_accounting offer."""

    def get_epsilon(self, target_delta: float) -> float: ...

    def get_delta(self, target_epsilon: float) -> float: ...


def skellam_rdp(orders: Orders, *, l1: float, l2: float, variance: float) -> Orders:
    """Rényi divergence of an integer vector plus Skellam noise from its neighbour plus the same.

    It is stated for integer orders (Corollary 3.6, at scale 1). Any other order takes the next integer's, which is an
    upper bound because the divergence does not decrease with the order.

    Args:
        orders: a > 1 each.
        l1: L1 sensitivity of the vector.
        l2: its L2 sensitivity.
        variance: μ of the noise, per coordinate.
    """
    a = np.ceil(orders)
    beyond = np.minimum(((2 * a - 1) * l2**2 + 6 * l1) / (4 * variance**2), 3 * l1 / (2 * variance))
    return np.asarray(a * l2**2 / (2 * variance) + beyond)


def discrete_gaussian_rdp(
    orders: Orders, *, l1: float, l2: float, dimension: int, variance: float, parties: int
) -> Orders:
    """Rényi divergence of an integer vector plus the sum of independent discrete Gaussians, one from each party.

    A sum of discrete Gaussians is none; τ bounds by how much, and is 0 for one party. The bounds of Proposition 14 hold
    for every order above 1. The one with s1 adds up the coordinates' own bounds a/2 (s_j + τ)², where Σ s_j = s1.

    Args:
        orders: a > 1 each.
        l1: L1 sensitivity of the vector.
        l2: its L2 sensitivity.
        dimension: d, coordinates of the vector.
        variance: σ² of each party's noise, as the parameter of the discrete Gaussian.
        parties: independent draws in the sum.
    """
    k = np.arange(1, parties, dtype=np.float64)
    tau = 10 * float(np.exp(-2 * np.pi**2 * variance * k / (k + 1)).sum())
    total = math.sqrt(parties * variance)
    s, s1 = l2 / total, l1 / total
    added = orders / 2 * s**2 + tau * dimension
    merged = orders / 2 * min((s + math.sqrt(dimension) * tau) ** 2, s**2 + 2 * s1 * tau + tau**2 * dimension)
    return np.asarray(np.minimum(added, merged))


def discrete_laplace_rdp(orders: Orders, *, l1: float, scale: float) -> Orders:
    """Rényi divergence of an integer vector plus discrete Laplace noise of that scale in each coordinate.

    It is the exact one of a single coordinate that carries the whole sensitivity, which is the worst there is:
    spreading the same L1 distance over several coordinates lowers it.

    Args:
        orders: a > 1 each.
        l1: L1 sensitivity of the vector; rounded up to an integer.
        scale: of the noise.
    """
    a, shift = 1 / scale, math.ceil(l1)
    edge = math.log1p(math.exp(-a))
    outer = np.logaddexp((orders - 1) * a * shift - edge, -orders * a * shift - edge)
    if shift > 1:  # the outcomes strictly between the two centres: a geometric series of ratio e^ratio
        ratio = a * (1 - 2 * orders)
        series = ratio + np.log(-np.expm1((shift - 1) * ratio)) - np.log(-np.expm1(ratio))
        outer = np.logaddexp(outer, math.log(math.tanh(a / 2)) + (orders - 1) * a * shift + series)
    return np.asarray(np.minimum((np.maximum(outer, 0) + _ROUNDING) / (orders - 1), a * shift))


@dataclasses.dataclass(frozen=True)
class _Release(dp_event.DpEvent):  # type: ignore[misc]  # dp_accounting has no types
    """One of our records in the clothes of a `DpEvent`."""

    record: SkellamRelease | DiscreteGaussianRelease | DiscreteLaplaceRelease


class _Renyi(RdpAccountant):  # type: ignore[misc]  # dp_accounting has no types
    """The RDP accountant that knows our records too, and none of them under sampling."""

    _orders: Orders
    _rdp: Orders

    def _maybe_compose(self, event: object, count: int, do_compose: bool) -> object:
        if not isinstance(event, _Release):
            return super()._maybe_compose(event, count, do_compose)
        if do_compose:
            self._rdp = self._rdp + count * _curve(event.record, self._orders)
        return None


def _curve(record: SkellamRelease | DiscreteGaussianRelease | DiscreteLaplaceRelease, orders: Orders) -> Orders:
    match record:
        case SkellamRelease(l1=l1, l2=l2, variance=variance):
            return skellam_rdp(orders, l1=l1, l2=l2, variance=variance)
        case DiscreteGaussianRelease(l1=l1, l2=l2, dimension=d, variance=variance, parties=parties):
            return discrete_gaussian_rdp(orders, l1=l1, l2=l2, dimension=d, variance=variance, parties=parties)
        case DiscreteLaplaceRelease(l1=l1, scale=scale):
            return discrete_laplace_rdp(orders, l1=l1, scale=scale)
        case _:
            assert_never(record)


class Composition:
    """Releases as they are added, equal ones counted together.

    Asking for an ε computes it anew from the counts: a thousand releases of a few kinds take milliseconds at
    participant level, and up to a second or two for the privacy loss distributions of example-level steps.
    """

    def __init__(self, events: Iterable[PrivacyEvent] = ()) -> None:
        self._counts: dict[PrivacyEvent, int] = {}
        self._total_variation = 0.0
        self._level: Level | None = None
        for event in events:
            self.add(event)

    @property
    def level(self) -> Level | None:
        """Whom the guarantee protects; None while there is no release."""
        return self._level

    def add(self, event: PrivacyEvent, count: int = 1) -> None:
        """Count a release `count` times.

        Raises:
            UnknownEventError: it is none of the kinds of `maskwork.privacy.events`.
            AccountingError: its level is not that of the releases before, or the count is not positive.
        """
        if type(event) not in _RECORDS:
            raise UnknownEventError(f"a {type(event).__name__} cannot be accounted for: it is no record of a release")
        if type(count) is not int or count < 1:
            raise AccountingError(f"a release is counted 1 time or more, not {count!r}")
        level = level_of(event)
        if self._level not in (None, level):
            raise AccountingError(
                f"a release at {level} level cannot be added to releases at {self._level} level: "
                "they protect different things, so ask for the two epsilons apart"
            )
        self._level = level
        if isinstance(event, PoissonSampledGaussianSteps):
            event, count = dataclasses.replace(event, steps=1), count * event.steps
        else:
            self._total_variation += count * event.total_variation
            event = dataclasses.replace(event, total_variation=0.0)
        if count:
            self._counts[event] = self._counts.get(event, 0) + count

    def epsilon(self, delta: float) -> float:
        """The ε of all releases together at that δ: 0 without any, infinity where no ε goes with it.

        Raises:
            AccountingError: delta is not between 0 and 1.
        """
        _check_delta(delta)
        if not self._counts:
            return 0.0
        guarantees = self._guarantees(delta)
        return _with_total_variation(lambda usable: _least(guarantees, usable), delta, self._total_variation)

    def delta(self, epsilon: float) -> float:
        """The δ of all releases together at that ε, at most 1.

        Raises:
            AccountingError: epsilon is negative or not finite.
        """
        if not (math.isfinite(epsilon) and epsilon >= 0):
            raise AccountingError(f"epsilon is {epsilon!r}: it must be a finite number, 0 or more")
        if not self._counts:
            return 0.0
        exact = min(float(each.get_delta(epsilon)) for each in self._guarantees(1e-6))
        return min(1.0, exact + _paid(epsilon, self._total_variation))

    def _within(self, target_epsilon: float, delta: float) -> bool:
        """Whether the ε is within a target; far from it, a privacy loss distribution is not waited for."""
        renyi = self._renyi()
        by_curves = _with_total_variation(renyi.get_epsilon, delta, self._total_variation)
        if by_curves <= target_epsilon or by_curves > _FAR * target_epsilon:
            return by_curves <= target_epsilon
        guarantees = self._guarantees(delta, _PLD_SEARCH * target_epsilon)
        by_all = _with_total_variation(lambda usable: _least(guarantees, usable), delta, self._total_variation)
        return by_all <= target_epsilon

    def _renyi(self) -> RdpAccountant:
        renyi = _Renyi(ORDERS)
        for event, count in self._counts.items():
            _compose(renyi, _as_dp_event(event, of_ours=True), count)
        return renyi

    def _guarantees(self, delta: float, interval: float = _PLD_INTERVAL) -> list[_Guarantee]:
        """The accountants that hold all releases; `delta` only says about how large an ε will be."""
        renyi = self._renyi()
        if len(self._counts) > _PLD_KINDS or not all(_has_distribution(event) for event in self._counts):
            return [renyi]
        about = float(renyi.get_epsilon(delta))
        coarse = about / _PLD_POINTS if math.isfinite(about) else 0.0
        interval = len(self._counts) * max(_PLD_INTERVAL, interval, coarse)
        distribution = PLDAccountant(value_discretization_interval=interval)
        for event, count in self._counts.items():
            _compose(distribution, _as_dp_event(event, of_ours=False), count)
        return [renyi, distribution]


_RECORDS: Final = (SkellamRelease, DiscreteGaussianRelease, DiscreteLaplaceRelease, PoissonSampledGaussianSteps)


def epsilon(events: Iterable[PrivacyEvent], delta: float) -> float:
    """The ε of all releases together at that δ: 0 without any, infinity where no ε goes with it.

    Raises:
        UnknownEventError: an event is none of the kinds of `maskwork.privacy.events`.
        AccountingError: delta is not between 0 and 1, or the events are of two levels.
    """
    return Composition(events).epsilon(delta)


def delta_for(events: Iterable[PrivacyEvent], epsilon: float) -> float:
    """The δ of all releases together at that ε, at most 1.

    Raises:
        UnknownEventError: an event is none of the kinds of `maskwork.privacy.events`.
        AccountingError: epsilon is negative or not finite, or the events are of two levels.
    """
    return Composition(events).delta(epsilon)


def noise_multiplier_for(
    target_epsilon: float,
    delta: float,
    releases: int,
    make_events: Callable[[float], tuple[PrivacyEvent, ...]],
) -> float:
    """The smallest noise multiplier with which so many releases stay within an ε, to a thousandth, never too small.

    Args:
        target_epsilon: not to be exceeded.
        delta: at this δ.
        releases: how often the events of `make_events` happen.
        make_events: the events of one release at a noise multiplier. It may raise `ValueError` for a multiplier that
            cannot be had; what is asked for is then looked for below it.

    Raises:
        AccountingError: a number is out of range, or no multiplier up to `MAX_NOISE_MULTIPLIER` does.
        ValueError: of `make_events`, where that is what stands in the way.
    """
    _check_delta(delta)
    if not (math.isfinite(target_epsilon) and target_epsilon > 0):
        raise AccountingError(f"the epsilon to stay within is {target_epsilon!r}: it must be a positive finite number")

    def fits(noise_multiplier: float) -> bool:
        composition = Composition()
        for event in make_events(noise_multiplier):
            composition.add(event, releases)
        return composition._within(target_epsilon, delta)

    too_small, enough, refusal = MIN_NOISE_MULTIPLIER, MAX_NOISE_MULTIPLIER, _nothing_does(target_epsilon, delta)
    while enough > too_small * (1 + _CLOSE):
        middle = math.sqrt(too_small * enough)
        try:
            if fits(middle):
                enough, refusal = middle, None
            else:
                too_small = middle
        except (AccountingError, UnknownEventError):
            raise
        except ValueError as error:
            enough, refusal = middle, error
    if refusal is not None:
        raise refusal
    return enough


def _nothing_does(target_epsilon: float, delta: float) -> ValueError | None:
    return AccountingError(
        f"no noise multiplier up to {MAX_NOISE_MULTIPLIER:,.0f} keeps epsilon within {target_epsilon:g} at delta "
        f"{delta:g}: allow a larger epsilon or delta, or fewer releases"
    )


def _least(guarantees: list[_Guarantee], delta: float) -> float:
    return min(float(each.get_epsilon(delta)) for each in guarantees)


def _with_total_variation(epsilon_of: Callable[[float], float], delta: float, total_variation: float) -> float:
    """The ε of releases whose noise is off by so much: δ(ε) of exact noise plus (1 + e^ε) times that within `delta`.

    The smallest such ε is approached from below, each step a little too far, until it has been passed; what is passed
    satisfies the condition, so nothing smaller than the bound is ever returned.

    Args:
        epsilon_of: the ε of exact noise at a δ; it does not increase with δ.
        delta: that is to hold.
        total_variation: of all releases together.
    """
    if total_variation == 0:
        return epsilon_of(delta)
    at = 0.0
    for _ in range(_STEPS):
        usable = delta - _paid(at, total_variation)
        if not usable > 0:
            return math.inf
        needed = epsilon_of(usable)
        if needed <= at:
            return at
        at = needed * (1 + _OVERSHOOT)
    return math.inf


def _paid(epsilon: float, total_variation: float) -> float:
    """What δ has to give for noise that is off: once for each of two neighbours, the other's times e^ε."""
    if total_variation == 0:
        return 0.0
    return (1 + math.exp(epsilon)) * total_variation if epsilon < _EXPONENT else math.inf


def _compose(accountant: RdpAccountant | PLDAccountant, event: dp_event.DpEvent, count: int) -> None:
    try:
        accountant.compose(event, count)
    except UnsupportedEventError as error:  # our records are all known to it, unless dp_accounting has changed
        raise UnknownEventError(f"a release cannot be accounted for: {error}") from error


def _as_dp_event(event: PrivacyEvent, *, of_ours: bool) -> dp_event.DpEvent:
    if isinstance(event, PoissonSampledGaussianSteps):
        gaussian = dp_event.GaussianDpEvent(event.noise_multiplier)
        return dp_event.PoissonSampledDpEvent(event.sampling_probability, gaussian)
    if of_ours:
        return _Release(event)
    assert isinstance(event, DiscreteLaplaceRelease)  # by `_has_distribution`
    return dp_event.DiscreteLaplaceDpEvent(1 / event.scale, math.ceil(event.l1))


def _has_distribution(event: PrivacyEvent) -> bool:
    """Whether its privacy loss distribution can be had, and in reasonable time."""
    if isinstance(event, DiscreteLaplaceRelease):
        return math.ceil(event.l1) <= _PLD_SENSITIVITY
    return isinstance(event, PoissonSampledGaussianSteps)


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:  # a NaN fails too
        raise AccountingError(f"delta is {delta!r}: it must be between 0 and 1, both excluded")
