"""The accountant against exact sums, exact convolutions and dp_accounting's own answers.

An exact Rényi divergence here is a sum over integers of log probabilities that are computed in another way than the
curve: Bessel functions for Skellam noise, a convolution for sums of discrete Gaussians.
"""

import dataclasses
import math
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from dp_accounting.privacy_accountant import UnsupportedEventError
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import ive

from maskwork.privacy import accountant as acc
from maskwork.privacy.events import (
    DiscreteGaussianRelease,
    DiscreteLaplaceRelease,
    Level,
    PoissonSampledGaussianSteps,
    PrivacyEvent,
    SkellamRelease,
    UnknownEventError,
)

DELTA = 1e-5
SKELLAM = SkellamRelease(l1=3000.0, l2=1000.0, variance=6e7)
GAUSSIAN = DiscreteGaussianRelease(l1=3000.0, l2=1000.0, dimension=10, variance=1e7, parties=6)
LAPLACE = DiscreteLaplaceRelease(l1=1.0, scale=20.0)
STEPS = PoissonSampledGaussianSteps(noise_multiplier=1.0, sampling_probability=0.01, steps=1000)


def orders(*values: float) -> NDArray[np.float64]:
    return np.array(values, np.float64)


def divergence(log_p: NDArray[np.float64], shift: int, order: float) -> float:
    """Of a distribution on consecutive integers from itself, shifted; what was cut off at the ends must not matter."""
    p, q = log_p[shift:], log_p[: len(log_p) - shift]
    both = np.isfinite(p) & np.isfinite(q)
    terms = order * p[both] + (1 - order) * q[both]
    top = float(terms.max())
    assert max(terms[0], terms[-1]) < top - 30
    return (top + math.log(np.exp(terms - top).sum())) / (order - 1)


def log_skellam(variance: float, reach: int) -> NDArray[np.float64]:
    """p(k) = e^-μ I_k(μ); the Bessel functions by their backward recurrence, for they underflow far out."""
    log_ratios = np.empty(reach)
    ratio = 0.0
    for k in range(2 * reach, 0, -1):  # I_k / I_{k-1}
        ratio = 1 / (2 * k / variance + ratio)
        if k <= reach:
            log_ratios[k - 1] = math.log(ratio)
    side = math.log(ive(0, variance)) + np.cumsum(log_ratios)
    return np.concatenate([side[::-1], [math.log(ive(0, variance))], side])


def test_the_twin_of_the_skellam_curve_is_a_distribution() -> None:
    for variance in (0.5, 5, 100):
        k = np.arange(-300, 301)
        p = np.exp(log_skellam(variance, 300))
        assert p.sum() == pytest.approx(1)
        assert (p * k**2).sum() == pytest.approx(variance)


def log_sum_of_gaussians(variance: float, parties: int, reach: int) -> NDArray[np.float64]:
    one = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * variance))
    one /= one.sum()
    summed = one
    for _ in range(parties - 1):
        summed = np.convolve(summed, one)
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(summed))


@pytest.mark.parametrize(
    ("variance", "shift", "factor"),
    [(0.5, 1, 4), (1, 2, 3), (2, 1, 2.5), (5, 1, 1.5), (5, 5, 1.5), (20, 5, 1.1), (100, 10, 1.01), (1000, 10, 1.001)],
)
@pytest.mark.parametrize("order", [2, 3, 5, 10, 20])
def test_skellam_is_above_the_exact_divergence_and_near_it(
    variance: float, shift: int, factor: float, order: int
) -> None:
    exact = divergence(log_skellam(variance, 2000), shift, order)
    [bound] = acc.skellam_rdp(orders(order), l1=shift, l2=shift, variance=variance)
    # The proof gives way where the order moves the mean by much of the variance: nobody's best order is there.
    assert exact <= bound <= factor * (1 + order * shift / variance / 4) * exact


def test_skellam_is_corollary_3_6_to_the_letter() -> None:
    """The exact divergence leaves room below the second term, so a slip in it would not show there."""
    at = {"l1": 30.0, "l2": 10.0}
    [wide, narrow] = (float(acc.skellam_rdp(orders(3), **at, variance=v)[0]) for v in (1000.0, 2.0))
    assert wide == pytest.approx(3 * 100 / 2000 + (5 * 100 + 6 * 30) / 4e6)  # the first of the two is the smaller
    assert narrow == pytest.approx(3 * 100 / 4 + 3 * 30 / 4)  # the second is


def test_skellam_in_several_coordinates_is_above_their_sum() -> None:
    shifts, variance = (3, 1, 1, 4), 30.0
    exact = sum(divergence(log_skellam(variance, 300), shift, 4) for shift in shifts)
    [bound] = acc.skellam_rdp(orders(4), l1=sum(shifts), l2=math.hypot(*shifts), variance=variance)
    assert exact <= bound <= 1.1 * exact


def test_skellam_at_a_fraction_is_the_next_order() -> None:
    at = acc.skellam_rdp(orders(1.5, 2, 2.01, 3), l1=5, l2=5, variance=40)
    assert at[0] == at[1] < at[2] == at[3]
    assert divergence(log_skellam(40, 300), 5, 1.5) <= at[0]
    # A curve that put the fraction in where only integers are proven would be lower than this one.
    assert at[0] > 1.5 * 25 / 80 + min((2 * 25 + 30) / (4 * 40**2), 15 / 80)


def test_skellam_tends_to_gaussian() -> None:
    for scale, close in ((10, 0.1), (100, 1e-3), (1000, 1e-5)):
        [bound] = acc.skellam_rdp(orders(8), l1=scale, l2=scale, variance=(2 * scale) ** 2)
        assert 8 / 8 < bound < 8 / 8 * (1 + close)


@pytest.mark.parametrize("variance", [0.05, 0.2, 0.5, 2, 30])
@pytest.mark.parametrize(("parties", "shift"), [(1, 1), (1, 4), (2, 1), (3, 2), (4, 1), (4, 4)])
@pytest.mark.parametrize("order", [1.1, 2, 7.5])
def test_sums_of_discrete_gaussians_are_below_the_curve(
    variance: float, parties: int, shift: int, order: float
) -> None:
    reach = max(4 + shift, math.ceil(35 * math.sqrt(variance)) + shift)
    log_p = log_sum_of_gaussians(variance, parties, reach)
    at = {"l1": float(shift), "l2": float(shift), "dimension": 1, "variance": variance, "parties": parties}
    [bound] = acc.discrete_gaussian_rdp(orders(order), **at)  # type: ignore[arg-type]
    p, q = log_p[shift:], log_p[: len(log_p) - shift]
    both = np.isfinite(p) & np.isfinite(q)
    terms = order * p[both] + (1 - order) * q[both]
    exact = math.log(np.exp(terms - terms.max()).sum()) + terms.max()
    assert exact / (order - 1) <= bound * (1 + 1e-9)
    if variance == 30:  # τ is below 1e-100 there: the sum is as good as a discrete Gaussian
        assert bound <= exact / (order - 1) * (1 + 1e-6)


def test_a_sum_of_small_discrete_gaussians_is_worse_than_one_large_one() -> None:
    """Where τ matters, the curve of a single discrete Gaussian of the same variance would be too low."""
    variance, parties, order = 0.12, 2, 3.0
    exact = divergence(log_sum_of_gaussians(variance, parties, 25), 1, order)
    [single] = acc.discrete_gaussian_rdp(orders(order), l1=1, l2=1, dimension=1, variance=variance * parties, parties=1)
    [bound] = acc.discrete_gaussian_rdp(orders(order), l1=1, l2=1, dimension=1, variance=variance, parties=parties)
    assert single < exact <= bound


def test_tau_is_counted_for_every_coordinate_and_every_party() -> None:
    at = {"l1": 1.0, "l2": 1.0, "variance": 0.4}
    [[one], [many]] = (acc.discrete_gaussian_rdp(orders(2), **at, dimension=d, parties=3) for d in (1, 1000))
    tau = 10 * sum(math.exp(-2 * math.pi**2 * 0.4 * k / (k + 1)) for k in (1, 2))
    s = 1 / math.sqrt(3 * 0.4)
    assert many == pytest.approx(min(s**2 + 1000 * tau, s**2 + 2 * s * tau + tau**2 * 1000))
    assert one == pytest.approx(min(s**2 + tau, (s + tau) ** 2))


@pytest.mark.parametrize(("shift", "scale"), [(1, 0.3), (1, 20.0), (2, 1.0), (7, 3.0), (40, 100.0), (1000, 30.0)])
@pytest.mark.parametrize("order", [1.1, 2, 6.5, 30])
def test_discrete_laplace_is_exact(shift: int, scale: float, order: float) -> None:
    reach = shift + math.ceil(60 * scale)
    log_p = -np.abs(np.arange(-reach, reach + 1)) / scale + math.log(math.tanh(1 / (2 * scale)))
    [curve] = acc.discrete_laplace_rdp(orders(order), l1=shift, scale=scale)
    assert curve == pytest.approx(divergence(log_p, shift, order), rel=1e-7, abs=1e-11)
    assert curve <= shift / scale


def test_discrete_laplace_is_worst_in_one_coordinate() -> None:
    at = orders(*acc.ORDERS)
    for scale in (0.2, 1.0, 10.0, 1000.0):
        for first, second in ((1, 1), (1, 5), (3, 4), (50, 2)):
            split = acc.discrete_laplace_rdp(at, l1=first, scale=scale) + acc.discrete_laplace_rdp(
                at, l1=second, scale=scale
            )
            assert np.all(acc.discrete_laplace_rdp(at, l1=first + second, scale=scale) >= split - 1e-12)


def test_discrete_laplace_of_a_fractional_sensitivity_is_rounded_up() -> None:
    assert acc.epsilon([DiscreteLaplaceRelease(1.2, 5.0)], DELTA) == acc.epsilon(
        [DiscreteLaplaceRelease(2.0, 5.0)], DELTA
    )


@pytest.mark.parametrize("event", [SKELLAM, GAUSSIAN])
def test_composition_adds_curves(event: PrivacyEvent) -> None:
    """The ε of k releases is that of one whose curve is k times as high, whether counted or listed."""
    counted = acc.Composition()
    counted.add(event, 50)
    listed = acc.epsilon([event] * 50, DELTA)
    assert counted.epsilon(DELTA) == listed
    by_hand = RdpAccountant(acc.ORDERS)
    if isinstance(event, SkellamRelease):
        curve = acc.skellam_rdp(orders(*acc.ORDERS), l1=event.l1, l2=event.l2, variance=event.variance)
    else:
        assert isinstance(event, DiscreteGaussianRelease)
        curve = acc.discrete_gaussian_rdp(
            orders(*acc.ORDERS), l1=3000.0, l2=1000.0, dimension=10, variance=1e7, parties=6
        )
    by_hand._rdp = 50 * curve
    assert listed == pytest.approx(by_hand.get_epsilon(DELTA))


def test_different_kinds_of_one_level_add_up() -> None:
    kinds = (SKELLAM, GAUSSIAN, LAPLACE)
    alone = [acc.epsilon([kind] * 5, DELTA) for kind in kinds]
    together = acc.epsilon([*kinds] * 5, DELTA)
    assert max(alone) < together < sum(alone)


def test_gaussian_limit_is_the_gaussian_mechanisms() -> None:
    """At a large scale both kinds cost what continuous Gaussian noise of that multiplier costs by RDP."""
    expected = RdpAccountant(acc.ORDERS).compose(dp_event.GaussianDpEvent(8.0), 100).get_epsilon(DELTA)
    l2 = 1e5
    skellam = SkellamRelease(l1=2 * l2, l2=l2, variance=(8 * l2) ** 2)
    gaussian = DiscreteGaussianRelease(l1=2 * l2, l2=l2, dimension=9, variance=(8 * l2) ** 2 / 5, parties=5)
    assert acc.epsilon([gaussian] * 100, DELTA) == pytest.approx(expected, rel=1e-9)
    # Skellam's fractional orders go up to the next integer.
    assert expected <= acc.epsilon([skellam] * 100, DELTA) <= 1.05 * expected


@pytest.mark.parametrize(("probability", "multiplier", "steps"), [(0.01, 1.0, 1000), (0.1, 2.0, 300), (1.0, 5.0, 20)])
def test_dp_sgd_is_dp_accountings_own_answer(probability: float, multiplier: float, steps: int) -> None:
    event = dp_event.PoissonSampledDpEvent(probability, dp_event.GaussianDpEvent(multiplier))
    expected = PLDAccountant().compose(event, steps).get_epsilon(DELTA)
    assert acc.epsilon([PoissonSampledGaussianSteps(multiplier, probability, steps)], DELTA) == expected
    halves = [PoissonSampledGaussianSteps(multiplier, probability, steps // 2)] * 2
    assert acc.epsilon(halves, DELTA) == expected
    assert expected < RdpAccountant().compose(event, steps).get_epsilon(DELTA)


def test_two_kinds_of_steps_are_dp_accountings_own_answer_too() -> None:
    other = PoissonSampledGaussianSteps(2.0, 0.05, 200)
    expected = PLDAccountant()
    for event in (STEPS, other):
        sampled = dp_event.PoissonSampledDpEvent(
            event.sampling_probability, dp_event.GaussianDpEvent(event.noise_multiplier)
        )
        expected.compose(sampled, event.steps)
    exact = expected.get_epsilon(DELTA)
    assert exact <= acc.epsilon([STEPS, other], DELTA) <= 1.001 * exact


def test_the_curve_counts_where_the_distribution_is_too_coarse() -> None:
    """A loss far below the step of a privacy loss distribution is rounded up to it, a thousand times over."""
    tiny = DiscreteLaplaceRelease(1.0, 1e6)
    rounded = PLDAccountant().compose(dp_event.DiscreteLaplaceDpEvent(1e-6, 1), 1000).get_epsilon(DELTA)
    assert acc.epsilon([tiny] * 1000, DELTA) < rounded / 10


def test_discrete_laplace_alone_is_dp_accountings_own_answer() -> None:
    expected = PLDAccountant().compose(dp_event.DiscreteLaplaceDpEvent(1 / 20, 1), 100).get_epsilon(DELTA)
    assert acc.epsilon([LAPLACE] * 100, DELTA) == expected


def test_discrete_laplace_of_a_large_sensitivity_has_its_curve_alone() -> None:
    large = acc.epsilon([DiscreteLaplaceRelease(1e7, 1e9)] * 100, DELTA)
    small = acc.epsilon([DiscreteLaplaceRelease(10.0, 1000.0)] * 100, DELTA)
    assert small < large < 1.2 * small


def test_nothing_costs_nothing() -> None:
    assert acc.epsilon([], DELTA) == 0.0
    assert acc.delta_for([], 1.0) == 0.0
    assert acc.epsilon([dataclasses.replace(STEPS, steps=0)], DELTA) == 0.0
    assert acc.Composition().level is None


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, 1.5, math.nan, math.inf])
def test_a_delta_that_is_no_probability_is_refused(delta: float) -> None:
    with pytest.raises(acc.AccountingError, match="delta is"):
        acc.epsilon([SKELLAM], delta)
    with pytest.raises(acc.AccountingError, match="delta is"):
        acc.epsilon([], delta)


@pytest.mark.parametrize("epsilon", [-0.1, math.nan, math.inf])
def test_an_epsilon_that_is_none_is_refused(epsilon: float) -> None:
    with pytest.raises(acc.AccountingError, match="epsilon is"):
        acc.delta_for([SKELLAM], epsilon)


@pytest.mark.parametrize("other", [SKELLAM, GAUSSIAN, LAPLACE])
def test_levels_are_never_added_up(other: PrivacyEvent) -> None:
    for events in ([STEPS, other], [other, STEPS]):
        with pytest.raises(acc.AccountingError, match="protect different things"):
            acc.epsilon(events, DELTA)
    nothing = dataclasses.replace(STEPS, steps=0)
    with pytest.raises(acc.AccountingError, match="protect different things"):
        acc.epsilon([nothing, other], DELTA)


def test_the_level_is_told_and_a_refused_release_changes_nothing() -> None:
    composition = acc.Composition([SKELLAM])
    before = composition.epsilon(DELTA)
    with pytest.raises(acc.AccountingError):
        composition.add(STEPS)
    for count in (0, -1, 1.0, True):
        with pytest.raises(acc.AccountingError, match="1 time or more"):
            composition.add(SKELLAM, count)  # type: ignore[arg-type]
    assert composition.level is Level.PARTICIPANT
    assert composition.epsilon(DELTA) == before


def test_an_unknown_release_is_refused() -> None:
    @dataclasses.dataclass(frozen=True)
    class Invented(SkellamRelease):
        """It is a SkellamRelease to `isinstance`, and may mean anything."""

    for unknown in (Invented(1.0, 1.0, 1.0), dp_event.GaussianDpEvent(1.0), None):
        with pytest.raises(UnknownEventError, match="cannot be accounted for"):
            acc.epsilon([unknown], DELTA)  # type: ignore[list-item]


def test_no_participant_level_release_can_be_sampled() -> None:
    """The coordinator chooses the cohort, so nothing is amplified by that choice: it cannot even be expressed."""
    release = acc._as_dp_event(SKELLAM, of_ours=True)
    with pytest.raises(UnsupportedEventError):
        acc._Renyi(acc.ORDERS).compose(dp_event.PoissonSampledDpEvent(0.1, release))
    with pytest.raises(UnsupportedEventError):
        acc._Renyi(acc.ORDERS).compose(dp_event.UnsupportedDpEvent())
    for kind in (SkellamRelease, DiscreteGaussianRelease, DiscreteLaplaceRelease):
        assert not any("sampl" in field.name for field in dataclasses.fields(kind))


def test_total_variation_is_paid_out_of_delta() -> None:
    exact = acc.epsilon([SKELLAM] * 10, DELTA)
    previous = exact
    for total_variation in (1e-9, 1e-8, 1e-7):
        off = dataclasses.replace(SKELLAM, total_variation=total_variation)
        at = acc.epsilon([off] * 10, DELTA)
        assert at > previous
        of_noise = acc.delta_for([SKELLAM] * 10, at)
        assert of_noise + (1 + math.exp(at)) * 10 * total_variation <= DELTA * (1 + 1e-12)
        # and no smaller epsilon would do: the bound is the fix point, to its overshoot
        smaller = at * (1 - 1e-4)
        left = acc.delta_for([SKELLAM] * 10, smaller) + (1 + math.exp(smaller)) * 10 * total_variation
        assert left > DELTA
        assert acc.delta_for([off] * 10, at) == pytest.approx(of_noise + (1 + math.exp(at)) * 10 * total_variation)
        previous = at


def test_total_variation_of_all_releases_counts() -> None:
    """It is in no curve, so composing equal releases must still add it up; and kinds with it to kinds without."""
    off = dataclasses.replace(GAUSSIAN, total_variation=1e-8)
    counted = acc.Composition()
    counted.add(off, 20)
    assert counted.epsilon(DELTA) == pytest.approx(acc.epsilon([off] * 20, DELTA), rel=1e-12)
    assert acc.epsilon([off] * 20 + [LAPLACE], DELTA) == pytest.approx(
        acc.epsilon([GAUSSIAN] * 20 + [dataclasses.replace(LAPLACE, total_variation=2e-7)], DELTA), rel=1e-6
    )


def test_a_total_variation_that_delta_cannot_pay_for_is_infinite() -> None:
    for total_variation in (DELTA / 2, DELTA, 0.3):
        assert acc.epsilon([dataclasses.replace(SKELLAM, total_variation=total_variation)], DELTA) == math.inf
    # δ could pay at ε = 0, but not at the ε that this noise needs
    assert acc.epsilon([dataclasses.replace(LAPLACE, scale=0.2, total_variation=DELTA / 10)], DELTA) == math.inf
    assert acc.delta_for([dataclasses.replace(SKELLAM, total_variation=0.3)], 800.0) == 1.0


def test_delta_and_epsilon_are_each_others_inverse() -> None:
    for events in ([SKELLAM] * 30, [STEPS], [LAPLACE] * 30):
        at = acc.epsilon(events, DELTA)
        assert acc.delta_for(events, at) == pytest.approx(DELTA, rel=1e-2)


@settings(max_examples=60, deadline=None)
@given(
    scale=st.floats(1.0, 1e5),
    multiplier=st.floats(0.3, 50.0),
    more=st.floats(1.0, 10.0),
    spread=st.floats(1.0, 30.0),
    count=st.integers(1, 2000),
)
def test_more_noise_never_costs_more(scale: float, multiplier: float, more: float, spread: float, count: int) -> None:
    def cost(kind: type, z: float) -> float:
        variance = (z * scale) ** 2
        composition = acc.Composition()
        if kind is SkellamRelease:
            composition.add(SkellamRelease(scale * spread, scale, variance), count)
        elif kind is DiscreteGaussianRelease:
            composition.add(DiscreteGaussianRelease(scale * spread, scale, 1000, variance, 3), count)
        else:
            composition.add(SkellamRelease(scale * spread, scale, 1e4 * scale**2), count)
            composition.add(DiscreteLaplaceRelease(scale, z * scale), count)
        return composition.epsilon(DELTA)

    for kind in (SkellamRelease, DiscreteGaussianRelease, DiscreteLaplaceRelease):
        assert cost(kind, multiplier * more) <= cost(kind, multiplier) * (1 + 1e-9)


def test_more_releases_and_smaller_deltas_cost_more() -> None:
    for event in (SKELLAM, GAUSSIAN, LAPLACE, STEPS):
        by_count = [acc.epsilon([event] * count, DELTA) for count in (1, 3, 9)]
        by_delta = [acc.epsilon([event] * 3, delta) for delta in (1e-3, 1e-6, 1e-9)]
        assert all(a < b for a, b in pairwise(by_count))
        assert all(a < b for a, b in pairwise(by_delta))


def test_a_thousand_charges_are_added_up() -> None:
    ledger: list[PrivacyEvent] = []
    for charge in range(1000):
        ledger.append(dataclasses.replace(SKELLAM, variance=6e7 + charge % 7))
        ledger.append(dataclasses.replace(GAUSSIAN, parties=6 + charge % 30, total_variation=1e-28))
        ledger.append(LAPLACE)
    assert math.isfinite(acc.epsilon(ledger, DELTA))
    steps = [dataclasses.replace(STEPS, steps=20 + charge % 9) for charge in range(1000)]
    assert math.isfinite(acc.epsilon(steps, DELTA))
    assert math.isfinite(acc.epsilon([PoissonSampledGaussianSteps(0.4, 0.05, 100_000)], DELTA))


def skellam_at(noise_multiplier: float) -> tuple[PrivacyEvent, ...]:
    return (SkellamRelease(3000.0, 1000.0, (noise_multiplier * 1000) ** 2),)


def test_noise_multiplier_is_the_smallest_that_does() -> None:
    for target in (0.5, 2.0, 8.0):
        found = acc.noise_multiplier_for(target, DELTA, 100, skellam_at)
        assert acc.epsilon(skellam_at(found) * 100, DELTA) <= target
        assert acc.epsilon(skellam_at(found * (1 - 1e-3)) * 100, DELTA) > target
    steps = acc.noise_multiplier_for(2.0, DELTA, 1, lambda z: (PoissonSampledGaussianSteps(z, 0.02, 500),))
    assert acc.epsilon([PoissonSampledGaussianSteps(steps, 0.02, 500)], DELTA) <= 2.0
    assert acc.epsilon([PoissonSampledGaussianSteps(steps * 0.995, 0.02, 500)], DELTA) > 2.0  # by the distribution, too


def test_noise_multiplier_that_does_not_exist() -> None:
    with pytest.raises(acc.AccountingError, match="no noise multiplier up to 1,048,576"):
        acc.noise_multiplier_for(1.0, DELTA, 1, lambda z: (dataclasses.replace(SKELLAM, total_variation=0.1),))
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(acc.AccountingError, match="positive finite"):
            acc.noise_multiplier_for(bad, DELTA, 1, skellam_at)
    with pytest.raises(acc.AccountingError, match="1 time or more"):
        acc.noise_multiplier_for(1.0, DELTA, 0, skellam_at)


def test_noise_multiplier_below_what_can_be_had() -> None:
    def up_to(limit: float, noise_multiplier: float) -> tuple[PrivacyEvent, ...]:
        if noise_multiplier > limit:
            raise ValueError("the ring is too narrow")
        return skellam_at(noise_multiplier)

    free = acc.noise_multiplier_for(2.0, DELTA, 100, skellam_at)
    assert acc.noise_multiplier_for(2.0, DELTA, 100, lambda z: up_to(free * 1.01, z)) == pytest.approx(free, rel=2e-3)
    with pytest.raises(ValueError, match="ring is too narrow"):
        acc.noise_multiplier_for(2.0, DELTA, 100, lambda z: up_to(free * 0.9, z))


def test_importing_the_rest_does_not_import_dp_accounting() -> None:
    """A federation without noise does not pay two seconds for it."""
    code = (
        "import sys, pkgutil, importlib, maskwork.privacy as p\n"
        "for m in pkgutil.iter_modules(p.__path__):\n"
        "    m.name == 'accountant' or importlib.import_module('maskwork.privacy.' + m.name)\n"
        "sys.exit('dp_accounting' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
