"""Probability tables of integer noise, exact to 2^-128, and their alias tables for drawing.

`skellam`, `discrete_gaussian` and `discrete_laplace` give every value's probability as an integer number of 2^-128ths.
`alias_table` lays them out after Walker so that a draw takes one column and one comparison, however wide the
distribution is: M = 2^k columns of equal mass, each shared by two values at a threshold. A threshold has 128 - k bits;
a draw looks at 64 - k of them and at the other 64 only if those are equal (`noise.py`).

All of it is integer arithmetic: no probability is ever a float. What is below 2^-128 is given to the value zero, and
the mass moved so is measured: it is the total-variation distance from the exact distribution.

What this deliberately is not: nothing is drawn here, and no privacy is claimed.

Sources: Abramowitz and Stegun 9.6.26 and 9.12 (Miller's backward recurrence for Bessel functions); Skellam, "The
frequency distribution of the difference between two Poisson variates", JRSS 1946; Canonne, Kamath, Steinke, "The
Discrete Gaussian for Differential Privacy", NeurIPS 2020; Walker, "An efficient method for generating discrete random
variables with general distributions", ACM TOMS 1977; Vose 1991 for the construction.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import Final

import numpy as np

from maskwork.secagg.ring import Int32Array, UInt64Array

WEIGHT_BITS: Final = 128
MAX_COLUMN_BITS: Final = 19
MAX_STANDARD_DEVIATION: Final = float(1 << 14)
"""Of one draw. About 26 times as many values have a probability of 2^-128 or more: they fit 2^19 columns."""
MAX_LAPLACE_SCALE: Final = float(1 << 11)
_WORD: Final = (1 << 64) - 1
_WORKING_BITS: Final = 320
_FARTHEST: Final = (WEIGHT_BITS + 4) * math.log(2)


@dataclass(frozen=True, slots=True)
class Weights:
    """A symmetric distribution over the integers from -K to K.

    Attributes:
        halves: probability of 0, 1, …, K in units of 2^-128; together, both sides counted, exactly 2^128.
        moved: the mass, in the same units and rounded up, by which it differs from the exact distribution.
    """

    halves: tuple[int, ...] = field(repr=False)
    moved: int

    @property
    def farthest(self) -> int:
        """K, the largest value that is ever drawn."""
        return len(self.halves) - 1

    @property
    def total_variation(self) -> float:
        """Total-variation distance of one draw from the exact distribution, rounded up."""
        return math.ldexp(float(self.moved), -WEIGHT_BITS) * (1 + 2.0**-50)


def skellam(variance: float) -> Weights:
    """Skellam(variance / 2, variance / 2): p(k) = exp(-variance) I_|k|(variance).

    Raises:
        ValueError: the variance is not positive and finite, or above `MAX_STANDARD_DEVIATION` squared.
    """
    mu = _checked(variance, MAX_STANDARD_DEVIATION**2, "variance")
    last = _skellam_reach(variance)
    # The backward recurrence begins with a wrong start, whose share shrinks like exp(-(start^2 - k^2) / variance).
    start = last * 3 // 2 + 16
    above, here = 0, 1 << 192
    values = [0] * (last + 1)
    total = 0
    for k in range(start, 0, -1):
        if k <= last:
            values[k] = here
        total += 2 * here
        above, here = here, above + 2 * k * here * mu.denominator // mu.numerator
    values[0] = here
    return _weights(values, total + here)


def discrete_gaussian(variance: float) -> Weights:
    """The discrete Gaussian of parameter σ² = `variance`: p(k) proportional to exp(-k² / (2 σ²)).

    Raises:
        ValueError: As `skellam`.
    """
    sigma_squared = _checked(variance, MAX_STANDARD_DEVIATION**2, "variance")
    last = math.isqrt(math.ceil(2 * _FARTHEST * variance)) + 2
    ratio = _exp_of_minus(Fraction(1, 2) / sigma_squared)
    square = ratio * ratio >> _WORKING_BITS
    values = [1 << _WORKING_BITS]
    for _ in range(last):
        values.append(values[-1] * ratio >> _WORKING_BITS)
        ratio = ratio * square >> _WORKING_BITS
    return _weights(values, values[0] + 2 * sum(values[1:]))


def discrete_laplace(scale: float) -> Weights:
    """The discrete Laplace distribution: p(k) proportional to exp(-|k| / scale).

    Raises:
        ValueError: the scale is not positive and finite, or above `MAX_LAPLACE_SCALE`.
    """
    ratio = _exp_of_minus(1 / _checked(scale, MAX_LAPLACE_SCALE, "scale"))
    values = [1 << _WORKING_BITS]
    for _ in range(math.ceil(_FARTHEST * scale) + 2):
        values.append(values[-1] * ratio >> _WORKING_BITS)
    return _weights(values, values[0] + 2 * sum(values[1:]))


def _checked(value: float, most: float, name: str) -> Fraction:
    if not (math.isfinite(value) and 2.0**-40 <= value <= most):
        raise ValueError(f"the {name} of integer noise lies between 2^-40 and {most:g}, not at {value!r}")
    return Fraction(value)


def _exp_of_minus(x: Fraction) -> int:
    """exp(-x) in units of 2^-`_WORKING_BITS`."""
    with decimal.localcontext() as context:
        context.prec = 120  # digits: 398 bits
        exact = (decimal.Decimal(-x.numerator) / decimal.Decimal(x.denominator)).exp()
        return int(exact * (1 << _WORKING_BITS))


def skellam_log_tail(distance: float, variance: float) -> float:
    """Chernoff's bound: ln P(X >= distance) is at most this, for Skellam noise X of this variance in all.

    E exp(sX) = exp(variance (cosh s - 1)), at its best s = asinh(distance / variance).
    """
    gained = distance * distance / (math.hypot(variance, distance) + variance)
    return gained - distance * math.asinh(distance / variance)


def _skellam_reach(variance: float) -> int:
    reach = 1
    while skellam_log_tail(reach, variance) > -_FARTHEST:
        reach *= 2
    low = reach // 2
    while low + 1 < reach:
        middle = (low + reach) // 2
        low, reach = (middle, reach) if skellam_log_tail(middle, variance) > -_FARTHEST else (low, middle)
    return reach


def _weights(values: list[int], total: int) -> Weights:
    halves = [(value << WEIGHT_BITS) // total for value in values]
    while halves[-1] == 0:
        halves.pop()
    missing = (1 << WEIGHT_BITS) - halves[0] - 2 * sum(halves[1:])
    halves[0] += missing
    return Weights(tuple(halves), missing + 1)


# --- drawing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class AliasTable:
    """A distribution laid out for drawing with 64 random bits, and 64 more where they do not decide.

    Attributes:
        column_bits: k; there are M = 2^k columns.
        high: uint64[M], the upper 64 - k bits of each column's threshold, shifted left by k.
        low: uint64[M], the 64 bits below.
        values: int32[2 M]: of column j, [2 j] at or above the threshold and [2 j + 1] below it.
        farthest: the largest absolute value.
        total_variation: of one draw, from the exact distribution.
    """

    column_bits: int
    high: UInt64Array
    low: UInt64Array
    values: Int32Array
    farthest: int
    total_variation: float


def alias_table(weights: Weights) -> AliasTable:
    """Lay a distribution out."""
    signed = [*reversed(weights.halves[1:]), *weights.halves]
    first = -weights.farthest
    bits = (len(signed) - 1).bit_length()
    assert bits <= MAX_COLUMN_BITS  # the parameters of every distribution here are bounded so that it is
    thresholds, aliases = _vose([*signed, *[0] * ((1 << bits) - len(signed))], 1 << (WEIGHT_BITS - bits))
    values = np.empty(2 << bits, np.int32)
    values[1::2] = np.arange(first, first + (1 << bits))
    values[0::2] = np.array(aliases, np.int64) + first
    return AliasTable(
        bits,
        np.array([(t >> 64) << bits for t in thresholds], np.uint64),
        np.array([t & _WORD for t in thresholds], np.uint64),
        values,
        weights.farthest,
        weights.total_variation,
    )


def _vose(masses: list[int], capacity: int) -> tuple[list[int], Sequence[int]]:
    """The threshold of each column and the index that takes what is above it; exact."""
    thresholds, aliases = list(masses), list(range(len(masses)))
    small = [i for i, mass in enumerate(masses) if mass < capacity]
    large = [i for i, mass in enumerate(masses) if mass >= capacity]
    while small:
        poor, rich = small.pop(), large[-1]
        aliases[poor] = rich
        thresholds[rich] -= capacity - thresholds[poor]
        if thresholds[rich] < capacity:
            small.append(large.pop())
    for whole in large:  # all of the column is its own value's, whatever the comparison says
        assert thresholds[whole] == capacity
        thresholds[whole] = 0
    return thresholds, aliases


@lru_cache(maxsize=8)
def skellam_table(variance: float) -> AliasTable:
    """The alias table of `skellam`; kept, since every round of a job draws from the same."""
    return alias_table(skellam(variance))


@lru_cache(maxsize=8)
def discrete_gaussian_table(variance: float) -> AliasTable:
    """The alias table of `discrete_gaussian`."""
    return alias_table(discrete_gaussian(variance))


@lru_cache(maxsize=8)
def discrete_laplace_table(scale: float) -> AliasTable:
    """The alias table of `discrete_laplace`."""
    return alias_table(discrete_laplace(scale))
