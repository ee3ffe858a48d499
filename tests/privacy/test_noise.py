"""Integer noise: tables against the formulae, draws against the tables, and the draws that 64 bits leave open."""

from __future__ import annotations

import decimal
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from maskwork.privacy import tables
from maskwork.privacy.noise import NOISE_KEY_BYTES, IntegerNoise, noise
from maskwork.privacy.tables import AliasTable, Weights, alias_table
from maskwork.secagg.prg import keystream

KEY = bytes(range(NOISE_KEY_BYTES))
WHOLE = 1 << tables.WEIGHT_BITS
DISTRIBUTIONS: dict[str, Callable[[float], Weights]] = {
    "skellam": tables.skellam,
    "gaussian": tables.discrete_gaussian,
    "laplace": tables.discrete_laplace,
}
each = pytest.mark.parametrize("name", DISTRIBUTIONS)


def exact(name: str, parameter: float, k: int) -> float:
    if name == "skellam":
        return float(special.ive(k, parameter))
    if name == "gaussian":
        series = sum(math.exp(-(j**2) / (2 * parameter)) for j in range(-2000, 2001))
        return math.exp(-(k**2) / (2 * parameter)) / series
    q = math.exp(-1 / parameter)
    return (1 - q) / (1 + q) * q**k


@each
@pytest.mark.parametrize("parameter", [0.4, 3.0, 250.0, 1000.0])
def test_tables_hold_the_probabilities_of_the_formulae(name: str, parameter: float) -> None:
    weights = DISTRIBUTIONS[name](parameter)
    for k in range(0, weights.farthest + 1, 1 + weights.farthest // 50):
        expected = exact(name, parameter, k)
        if expected > 1e-30:  # beyond that a weight is a few units of 2^-128
            assert weights.halves[k] / WHOLE == pytest.approx(expected, rel=1e-6), k


@each
@pytest.mark.parametrize("parameter", [0.01, 1.0, 777.25, 2000.0])
def test_tables_sum_to_one_and_a_whole_vector_is_within_two_to_the_minus_sixty(name: str, parameter: float) -> None:
    weights = DISTRIBUTIONS[name](parameter)
    assert weights.halves[0] + 2 * sum(weights.halves[1:]) == WHOLE
    assert weights.halves[-1] > 0
    assert 0 < weights.total_variation * 2**34 <= 2.0**-60  # 2^34: the longest vector that a plan may have


@pytest.mark.parametrize("scale", [0.5, 30.0, 2000.0])
def test_the_mass_that_is_moved_is_what_zero_has_too_much(scale: float) -> None:
    with decimal.localcontext() as context:
        context.prec = 80
        q = (-1 / decimal.Decimal(scale)).exp()
        exactly = (1 - q) / (1 + q) * WHOLE  # the discrete Laplace distribution's probability of zero
        weights = tables.discrete_laplace(scale)
        too_much = weights.halves[0] - exactly
        assert 0 < too_much <= weights.moved <= too_much + 2


def test_the_widest_skellam_still_is() -> None:
    weights = tables.skellam(tables.MAX_STANDARD_DEVIATION**2)
    assert weights.total_variation * 2**34 <= 2.0**-60
    assert 2 * weights.farthest + 1 <= 1 << tables.MAX_COLUMN_BITS
    squares = sum(2 * k * k * w for k, w in enumerate(weights.halves))
    assert float(Fraction(squares, WHOLE)) == pytest.approx(tables.MAX_STANDARD_DEVIATION**2, rel=1e-9)


@each
def test_a_parameter_that_is_none_is_refused(name: str) -> None:
    for parameter in (0.0, -1.0, math.nan, math.inf, 2.0**40):
        with pytest.raises(ValueError, match="integer noise"):
            DISTRIBUTIONS[name](parameter)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 3).map(lambda i: (0.3, 2.0, 40.0, 900.0)[i]), st.sampled_from(sorted(DISTRIBUTIONS)))
def test_an_alias_table_gives_every_value_its_whole_mass(parameter: float, name: str) -> None:
    weights = DISTRIBUTIONS[name](parameter)
    table = alias_table(weights)
    capacity = WHOLE >> table.column_bits
    mass: dict[int, int] = {}
    for column, (high, low) in enumerate(zip(table.high.tolist(), table.low.tolist(), strict=True)):
        threshold = ((high >> table.column_bits) << 64) | low
        assert 0 <= threshold <= capacity
        for value, share in (
            (int(table.values[2 * column + 1]), threshold),
            (int(table.values[2 * column]), capacity - threshold),
        ):
            mass[value] = mass.get(value, 0) + share
    expected = {sign * k: w for k, w in enumerate(weights.halves) for sign in (1, -1)}
    assert {value: share for value, share in mass.items() if share} == expected


# --- drawing --------------------------------------------------------------------------------------------------------


def drawn_one_by_one(table: AliasTable, key: bytes, i: int) -> int:
    """A slow twin of the sampler: all 128 bits at once."""
    word = int.from_bytes(keystream(key[:16], 8 * i, 8), "little")
    finer = int.from_bytes(keystream(key[16:], 8 * i, 8), "little")
    column = word % (1 << table.column_bits)
    threshold = (int(table.high[column]) >> table.column_bits << 64) | int(table.low[column])
    below = ((word >> table.column_bits) << 64 | finer) < threshold
    return int(table.values[2 * column + below])


@each
def test_draws_are_those_of_the_slow_twin(name: str) -> None:
    table = alias_table(DISTRIBUTIONS[name](300.0))
    drawn = noise(table, KEY, 70_000)
    for i in [*range(300), 65_535, 65_536, 69_999]:
        assert drawn[i] == drawn_one_by_one(table, KEY, i)


def test_where_64_bits_do_not_decide_the_next_64_do() -> None:
    table = tables.skellam_table(50.0)
    columns = np.array([int.from_bytes(keystream(KEY[:16], 8 * i, 8), "little") for i in range(200)], np.uint64)
    mask = np.uint64((1 << table.column_bits) - 1)
    for low, expected in ((0, 0), ((1 << 64) - 1, 1)):
        # Every threshold's upper part is made equal to what is drawn against it, so that only the lower part differs.
        high = table.high.copy()
        high[columns & mask] = columns & ~mask
        forced = AliasTable(
            table.column_bits,
            high,
            np.full_like(table.low, low),
            table.values,
            table.farthest,
            table.total_variation,
        )
        drawn = noise(forced, KEY, 200)
        decided = [i for i in range(200) if high[int(columns[i] & mask)] == columns[i] & ~mask]
        assert len(decided) > 50
        for i in decided:
            assert drawn[i] == table.values[2 * int(columns[i] & mask) + expected]
            assert drawn[i] == drawn_one_by_one(forced, KEY, i)


def test_a_coordinate_is_the_same_draw_however_the_vector_is_cut() -> None:
    table = tables.skellam_table(1e6)
    whole = noise(table, KEY, 140_001)
    for start, stop in ((0, 1), (1, 70_000), (65_535, 140_001)):
        part = np.zeros(stop - start, np.int32)
        IntegerNoise(table, KEY, start).add_to(part)
        assert np.array_equal(part, whole[start:stop])
    stepwise = np.zeros(140_001, np.int32)
    reader = IntegerNoise(table, KEY)
    for at in range(0, 140_001, 9_973):
        reader.add_to(stepwise[at : at + 9_973])
    assert np.array_equal(stepwise, whole)


def test_noise_is_added_to_what_is_there_and_another_key_draws_another() -> None:
    table = tables.discrete_gaussian_table(81.0)
    acc = np.arange(5000, dtype=np.int32)
    IntegerNoise(table, KEY).add_to(acc)
    assert np.array_equal(acc - np.arange(5000), noise(table, KEY, 5000))
    for other in (bytes(16) + KEY[16:], KEY[:16] + bytes(16)):
        same = np.array_equal(noise(table, other, 5000), noise(table, KEY, 5000))
        assert same == (other[:16] == KEY[:16])  # the second half only decides what the first leaves open


def test_a_short_key_is_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        IntegerNoise(tables.skellam_table(1.0), KEY[:16])


# --- statistics -----------------------------------------------------------------------------------------------------

DRAWS = 400_000
ALARM = 1e-6
"""Keys are fixed, so a right sampler passes every time; a wrong one would have to be lucky once in a million."""


@each
@pytest.mark.parametrize("parameter", [0.7, 20.0, 1500.0])
def test_draws_follow_the_distribution(name: str, parameter: float) -> None:
    weights = DISTRIBUTIONS[name](parameter)
    drawn = noise(alias_table(weights), KEY, DRAWS)
    signed = np.array([*reversed(weights.halves[1:]), *weights.halves], object)
    expected = np.array([float(Fraction(int(w), WHOLE)) * DRAWS for w in signed])
    counts = np.bincount(drawn + weights.farthest, minlength=len(expected)).astype(float)
    # Neighbouring values are pooled until each bin expects 20, the tails included.
    edges = np.searchsorted(np.cumsum(expected), np.arange(20, DRAWS - 20, max(20.0, DRAWS / 400)))
    edges = np.unique(np.concatenate([[0], edges]))
    pooled_expected, pooled = np.add.reduceat(expected, edges), np.add.reduceat(counts, edges)
    keep = pooled_expected > 5
    assert keep.sum() >= 3
    statistic = ((pooled - pooled_expected)[keep] ** 2 / pooled_expected[keep]).sum()
    assert stats.chi2.sf(statistic, keep.sum() - 1) > ALARM


@each
def test_moments_are_those_of_the_distribution(name: str) -> None:
    weights = DISTRIBUTIONS[name](400.0)
    moment = {p: float(Fraction(sum(2 * k**p * w for k, w in enumerate(weights.halves)), WHOLE)) for p in (2, 4, 8)}
    drawn = noise(alias_table(weights), KEY, DRAWS).astype(float)
    assert abs(drawn.mean()) < 5 * math.sqrt(moment[2] / DRAWS)
    assert abs((drawn**2).mean() - moment[2]) < 5 * math.sqrt((moment[4] - moment[2] ** 2) / DRAWS)
    assert abs((drawn**4).mean() - moment[4]) < 5 * math.sqrt((moment[8] - moment[4] ** 2) / DRAWS)


@each
def test_tails_are_as_heavy_as_they_should_be(name: str) -> None:
    weights = DISTRIBUTIONS[name](100.0)
    drawn = np.abs(noise(alias_table(weights), KEY, 2_000_000))
    beyond, distance = 1.0, 0
    while beyond > 2e-4:
        distance += 1
        beyond = float(Fraction(2 * sum(weights.halves[distance:]), WHOLE))
    seen = int((drawn >= distance).sum())
    assert stats.binomtest(seen, len(drawn), beyond).pvalue > ALARM


def test_neighbouring_draws_and_keys_are_independent() -> None:
    table = tables.skellam_table(900.0)
    drawn = noise(table, KEY, DRAWS).astype(float)
    other = noise(table, bytes(reversed(KEY)), DRAWS).astype(float)
    for a, b in ((drawn[1:], drawn[:-1]), (drawn, other)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / math.sqrt(DRAWS)


def test_skellam_is_closed_under_addition() -> None:
    """What distributed noise rests on: h draws of variance v are one of variance h v."""
    parts = [noise(tables.skellam_table(3.0), bytes([i]) + KEY[1:], DRAWS) for i in range(4)]
    total = np.sum(parts, axis=0)
    whole = tables.skellam(12.0)
    for k in range(8):
        probability = whole.halves[k] / WHOLE
        assert stats.binomtest(int((total == k).sum()), DRAWS, probability).pvalue > ALARM
