"""From a round's parameters to noise: sensitivities that hold, rings that hold, events that say what was drawn."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from maskwork.privacy import mechanisms, tables
from maskwork.privacy.events import DiscreteGaussianRelease, DiscreteLaplaceRelease, SkellamRelease
from maskwork.privacy.mechanisms import Mechanism, MechanismError, NoisyRelease, Wanted, private_release
from maskwork.secagg.encoding import Encoding, EncodingError, Rotation, decode_sum
from maskwork.secagg.masking import MaskedTiles, MaskingKeys, accumulate, mask_update, remove_masks
from maskwork.secagg.prg import SignedKey
from maskwork.secagg.ring import Int32Array, centre, packed_size

SEED = bytes(range(32))
WANTED = Wanted(
    Mechanism.SKELLAM, cohort=10, min_honest_survivors=6, parameters=9610, clip_norm=1.0, noise_multiplier=1.0
)
distributed = pytest.mark.parametrize("mechanism", [Mechanism.SKELLAM, Mechanism.DISCRETE_GAUSSIAN])


def key(name: str, length: int = 16) -> bytes:
    return (name.encode() * 32)[:length]


def keys(name: str) -> MaskingKeys:
    return MaskingKeys((SignedKey(key(name), False),), (), key(f"rounding {name}"))


def masked(release: NoisyRelease, update: np.ndarray, name: str) -> np.ndarray:
    out = np.zeros(packed_size(len(update), release.encoding.ring_bits), np.uint8)
    mask_update(
        update,
        1,
        encoding=release.encoding,
        keys=keys(name),
        rotation_seed=SEED,
        out_u8=out,
        contribution=release.contribution(key(f"noise {name}", 32)),
    )
    return out


def rounded(release: NoisyRelease, update: np.ndarray, name: str) -> Int32Array:
    """What goes into the sum, without the noise: the encoding alone, its mask taken off."""
    silent = replace(release.contribution(key(name, 32)), noise=None)
    out = np.zeros(packed_size(len(update), release.encoding.ring_bits), np.uint8)
    mask_update(
        update, 1, encoding=release.encoding, keys=keys(name), rotation_seed=SEED, out_u8=out, contribution=silent
    )
    return unmasked(release, [out], [name])


def unmasked(release: NoisyRelease, uploads: list[np.ndarray], names: list[str]) -> Int32Array:
    total = np.zeros(release.parameters, np.uint32)
    for upload in uploads:
        accumulate(total, upload, release.encoding.ring_bits)
    remove_masks(total, [SignedKey(key(name), False) for name in names])
    centred = np.zeros(release.parameters, np.int32)
    centre(total, release.encoding.ring_bits, centred)
    return centred


# --- sensitivity ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", Mechanism)
@pytest.mark.parametrize("shape", ["one", "flat", "far too long"])
def test_no_rounded_update_is_beyond_the_sensitivity(mechanism: Mechanism, shape: str) -> None:
    release = private_release(replace(WANTED, mechanism=mechanism, parameters=3000), ring_bits=20)
    update = np.zeros(3000, np.float32)
    if shape == "one":
        update[1234] = 1.0
    else:
        update[:] = 1.0 if shape == "far too long" else 1e-3
    for i in range(10):
        q = rounded(release, update, f"site {i}").astype(np.int64)
        norm = np.abs(q).sum() if mechanism is Mechanism.CENTRAL_LAPLACE else math.sqrt(np.dot(q, q))
        assert 0 < norm <= release.sensitivity


def test_rounding_is_repeated_until_the_norm_is_within_the_bound() -> None:
    release = private_release(WANTED, ring_bits=16)
    update = np.full(9610, 1 / math.sqrt(9610), np.float32)
    norms = []
    for attempt in range(6):
        tiles = MaskedTiles(
            update,
            1,
            encoding=release.encoding,
            keys=keys("a"),
            rotation_seed=SEED,
            contribution=release.contribution(key("n", 32)),
        )
        norms.append(tiles._norm_of(attempt))
    assert len(set(norms)) == 6  # every attempt rounds afresh
    third = sorted(norms[:4])[0]
    bound = replace(release.contribution(key("n", 32)), bound=math.sqrt(third), noise=None)
    chosen = MaskedTiles(update, 1, encoding=release.encoding, keys=keys("a"), rotation_seed=SEED, contribution=bound)
    assert norms.index(third) == chosen._attempt
    assert [bytes(tile) for tile in chosen] == [bytes(tile) for tile in chosen]


def test_a_bound_that_nothing_meets_is_an_error_and_no_endless_loop() -> None:
    release = private_release(WANTED, ring_bits=16)
    update = np.full(9610, 0.01, np.float32)
    hopeless = replace(release.contribution(key("n", 32)), bound=1.0)
    with pytest.raises(EncodingError, match="beyond its bound"):
        MaskedTiles(update, 1, encoding=release.encoding, keys=keys("a"), rotation_seed=SEED, contribution=hopeless)


def test_rounding_costs_little_where_the_ring_is_wide_and_is_counted_where_it_is_not() -> None:
    wide, narrow = (private_release(WANTED, ring_bits=bits).inflation for bits in (24, 14))
    assert 1 < wide < 1.001 < narrow <= mechanisms.MAX_INFLATION


# --- noise ----------------------------------------------------------------------------------------------------------


@distributed
@pytest.mark.parametrize("survivors", [10, 6])
def test_the_released_sums_noise_has_the_stated_variance(mechanism: Mechanism, survivors: int) -> None:
    """With every participant, and with as many dropouts as were provisioned for: encode, noise, mask, add, unmask."""
    release = private_release(replace(WANTED, mechanism=mechanism, parameters=60_000), ring_bits=18)
    generator = np.random.default_rng(1)
    names = [f"site {i}" for i in range(survivors)]
    updates = [generator.normal(size=60_000).astype(np.float32) for _ in names]
    noisy = unmasked(release, [masked(release, u, n) for u, n in zip(updates, names, strict=True)], names)
    exact = np.sum([rounded(release, u, n) for u, n in zip(updates, names, strict=True)], axis=0)
    noise = (noisy - exact).astype(float)
    stated = release.noise_parameter * survivors
    assert abs(noise.mean()) < 5 * math.sqrt(stated / len(noise))
    assert noise.var() == pytest.approx(stated, rel=5 * math.sqrt(2 / len(noise)))
    least = (release.noise_multiplier * release.sensitivity) ** 2
    assert stated >= least * survivors / release.min_honest_survivors * (1 - 1e-12)


@distributed
def test_the_mean_that_is_decoded_is_the_mean_of_the_clipped_updates(mechanism: Mechanism) -> None:
    release = private_release(replace(WANTED, mechanism=mechanism, noise_multiplier=0.01), ring_bits=22)
    generator = np.random.default_rng(2)
    names = [f"site {i}" for i in range(10)]
    updates = [generator.normal(size=9610).astype(np.float32) for _ in names]
    total = np.zeros(9610, np.uint32)
    for update, name in zip(updates, names, strict=True):
        accumulate(total, masked(release, update, name), release.encoding.ring_bits)
    remove_masks(total, [SignedKey(key(name), False) for name in names])
    mean = np.zeros(9610, np.float32)
    decode_sum(total, release.encoding, rotation_seed=SEED, total_weight=10, out_f32=mean)
    clipped = np.mean([u / np.linalg.norm(u) for u in updates], axis=0)
    expected = 0.01 * math.sqrt(10 / 6) / 10 * math.sqrt(9610) * release.inflation  # z C sqrt(n / h) / n a coordinate
    assert np.linalg.norm(mean - clipped) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("mechanism", [Mechanism.CENTRAL_GAUSSIAN, Mechanism.CENTRAL_LAPLACE])
def test_participants_add_no_noise_where_the_coordinator_does(mechanism: Mechanism) -> None:
    release = private_release(replace(WANTED, mechanism=mechanism, parameters=62), ring_bits=20)
    assert release.contribution(b"").noise is None
    assert release.table().total_variation <= mechanisms.DRAW_ERROR


def test_the_error_of_one_draw_is_below_what_is_charged() -> None:
    for weights in (
        tables.skellam(tables.MAX_STANDARD_DEVIATION**2),
        tables.discrete_gaussian(tables.MAX_STANDARD_DEVIATION**2),
        tables.discrete_laplace(tables.MAX_LAPLACE_SCALE),
        tables.skellam(0.5),
    ):
        assert weights.total_variation <= mechanisms.DRAW_ERROR


# --- events ---------------------------------------------------------------------------------------------------------


def test_events_say_what_the_honest_survivors_draw_together() -> None:
    release = private_release(WANTED, ring_bits=18)
    bound = release.sensitivity
    (least,), (more,) = release.events(6), release.events(9)
    assert isinstance(least, SkellamRelease)
    assert isinstance(more, SkellamRelease)
    assert math.sqrt(least.variance) == pytest.approx(WANTED.noise_multiplier * bound)
    assert more.variance == pytest.approx(1.5 * least.variance)
    assert least.l2 == bound
    assert least.l1 == pytest.approx(math.sqrt(9610) * bound)
    assert least.total_variation == pytest.approx(6 * 9610 * mechanisms.DRAW_ERROR)
    (gaussian,) = replace(release, mechanism=Mechanism.DISCRETE_GAUSSIAN).events(6)
    assert isinstance(gaussian, DiscreteGaussianRelease)
    assert gaussian.parties == 6
    assert 6 * gaussian.variance == pytest.approx(bound**2)
    (central,) = replace(release, mechanism=Mechanism.CENTRAL_GAUSSIAN).events(6)
    assert isinstance(central, DiscreteGaussianRelease)
    assert central.parties == 1
    assert central.variance == pytest.approx(bound**2)
    laplace = private_release(replace(WANTED, mechanism=Mechanism.CENTRAL_LAPLACE, parameters=62), ring_bits=20)
    (said,) = laplace.events(6)
    assert isinstance(said, DiscreteLaplaceRelease)
    assert said.scale == pytest.approx(said.l1)


def test_fewer_honest_survivors_than_provisioned_for_are_no_release() -> None:
    with pytest.raises(MechanismError, match="5 honest survivors"):
        private_release(WANTED, ring_bits=18).events(5)


# --- the ring -------------------------------------------------------------------------------------------------------


@distributed
def test_the_ring_holds_the_sum_and_the_next_narrower_does_not(mechanism: Mechanism) -> None:
    release = private_release(replace(WANTED, mechanism=mechanism), ring_bits=18)
    release.check_ring(10)
    finer = replace(release, encoding=replace(release.encoding, value_bits=release.encoding.value_bits + 1))
    with pytest.raises(MechanismError, match="ring of 19 bits"):
        finer.check_ring(10)
    half = 1 << 17
    assert 10 * release.encoding.scale + release.noise_reach(10) < half
    assert 10 * finer.encoding.scale + finer.noise_reach(10) >= half


@distributed
def test_the_reach_is_a_tail_bound(mechanism: Mechanism) -> None:
    """At probabilities that can be computed: the exact tail of the table is below the bound, and not by much."""
    release = private_release(replace(WANTED, mechanism=mechanism, cohort=2, min_honest_survivors=2), ring_bits=14)
    reach = release.noise_reach(1)
    make = tables.skellam if mechanism is Mechanism.SKELLAM else tables.discrete_gaussian
    weights = make(release.noise_parameter)
    tail = sum(weights.halves[math.ceil(reach) :])
    wanted = math.ldexp(1, tables.WEIGHT_BITS - mechanisms.WRAP_BITS) / (2 * 9610)
    assert tail <= wanted
    assert sum(weights.halves[int(0.9 * reach) :]) > wanted


REFUSED = [
    ({"noise_multiplier": 0.0}, 18, "not private"),
    ({"noise_multiplier": math.nan}, 18, "not private"),
    ({"clip_norm": math.nan}, 18, "clip norm"),
    ({"clip_norm": 0.0}, 18, "clip norm"),
    ({"min_honest_survivors": 1}, 18, "at least 2"),
    ({"min_honest_survivors": 11}, 18, "at most all"),
    ({"parameters": 0}, 18, "nothing"),
    ({}, 33, "8 to 32"),
    ({"cohort": 1000, "min_honest_survivors": 800, "parameters": 10_000_000}, 16, "18 bits would do"),
    ({"noise_multiplier": 1e9}, 18, "smaller one would do"),
]


@pytest.mark.parametrize(("changed", "ring_bits", "says"), REFUSED)
def test_what_cannot_run_is_refused_with_what_would_be_accepted(
    changed: dict[str, float], ring_bits: int, says: str
) -> None:
    with pytest.raises(MechanismError, match=says):
        private_release(replace(WANTED, **changed), ring_bits=ring_bits)  # type: ignore[arg-type]


def test_another_rotation_than_the_mechanisms_is_refused() -> None:
    encoding = Encoding(1.0, 1, 10, 18, Rotation.NONE)
    with pytest.raises(MechanismError, match="rotation"):
        NoisyRelease(Mechanism.SKELLAM, encoding, 100, 1.0, 3)
