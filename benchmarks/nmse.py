"""Error of the decoded mean: ``python benchmarks/nmse.py``.

Prints three tables, for both presets at d = 1,000,000 with updates at the clip norm in independent directions:

1. Normalised mean squared error ``|decoded - mean|^2 / |mean|^2`` against the float64 weighted mean of the clipped
   updates, for 3 to 1,000 participants, with all weights at the cap and with weights spread log-uniformly over a factor
   of 100 below it.
2. Unbiasedness: the error of the average over many rounding keys. A bias would keep the ratio in the last column
   (error of the average, times the number of keys, over the error of one) from staying at 1.
3. Clamped coordinates of the rotated preset.

The shapes: Gaussian; Student t with two degrees of freedom; a spike (one coordinate carries the whole norm; each
participant's stands elsewhere).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from maskwork.secagg import encoding as enc

D = 1_000_000
COHORTS = (3, 10, 100, 1000)
WEIGHT_CAP = 1000
SEED = bytes(range(32))
UNBIASED_D, UNBIASED_KEYS = 20_000, 2000

Float32Array = NDArray[np.float32]
Shape = Callable[[np.random.Generator, int], Float32Array]


def gaussian(rng: np.random.Generator, d: int) -> Float32Array:
    """Independent normal coordinates."""
    return rng.standard_normal(d, dtype=np.float32)


def student_t2(rng: np.random.Generator, d: int) -> Float32Array:
    """Heavy tails: normal over the square root of a standard exponential, which is Student t with df = 2."""
    return (rng.standard_normal(d, dtype=np.float32) / np.sqrt(rng.standard_exponential(d))).astype(np.float32)


def spike(rng: np.random.Generator, d: int) -> Float32Array:
    """One coordinate carries the whole norm."""
    update = np.zeros(d, np.float32)
    update[rng.integers(d)] = 1
    return update


SHAPES: dict[str, Shape] = {"gaussian": gaussian, "student t, df 2": student_t2, "spike": spike}


def at_clip_norm(update: Float32Array) -> Float32Array:
    """The update on the unit sphere, which is the clip norm here."""
    update *= np.float32(1 / np.linalg.norm(update))
    return update


class Aggregate:
    """A running ring sum under one preset, with the float64 truth beside it."""

    def __init__(self, name: str, cohort: int) -> None:
        """Starts an empty sum for ``cohort`` participants."""
        self.encoding = enc.preset(name, cohort=cohort, clip_norm=1.0, weight_cap=WEIGHT_CAP)
        self.ring_sum = np.zeros(D, np.uint32)
        self.truth = np.zeros(D)
        self.total_weight = self.clamped = 0
        self._encoded = np.zeros(D, np.int32)

    def add(self, update: Float32Array, weight: int, rounding_key: bytes) -> None:
        """Encodes one update and adds it to both sums."""
        self.clamped += enc.encode_update(
            update,
            weight,
            encoding=self.encoding,
            rotation_seed=SEED,
            rounding_key=rounding_key,
            out_i32=self._encoded,
        )
        self.ring_sum += self._encoded.view(np.uint32)
        norm = float(np.linalg.norm(update.astype(np.float64)))
        self.truth += update * (weight * min(1.0, 1.0 / norm))
        self.total_weight += weight

    def nmse(self) -> float:
        """The error of the decoded mean so far."""
        mean = np.zeros(D, np.float32)
        enc.decode_sum(self.ring_sum, self.encoding, rotation_seed=SEED, total_weight=self.total_weight, out_f32=mean)
        truth = self.truth / self.total_weight
        return float(np.sum((mean - truth) ** 2) / np.sum(truth**2))


def measure(shape: Shape, cohort: int) -> dict[tuple[str, str], tuple[float, float]]:
    """(nmse, clamped per coordinate) for each preset and kind of weights; all see the same updates."""
    rng = np.random.default_rng(cohort)
    aggregates = {(p, w): Aggregate(p, cohort) for p in ("exact", "compact") for w in ("cap", "spread")}
    for i in range(cohort):
        update = at_clip_norm(shape(rng, D))
        spread = max(1, round(WEIGHT_CAP * 100 ** -float(rng.random())))
        for (_, weights), aggregate in aggregates.items():
            aggregate.add(update, WEIGHT_CAP if weights == "cap" else spread, i.to_bytes(16, "big"))
    return {key: (a.nmse(), a.clamped / (cohort * D)) for key, a in aggregates.items()}


def unbiasedness(name: str, shape: Shape) -> tuple[float, float, float]:
    """(error of one decoding, error of the average over the keys, clamped per coordinate).

    The rotation changes with the key. Keys under which a coordinate was clamped are left out of the errors.
    """
    d = UNBIASED_D
    update = at_clip_norm(shape(np.random.default_rng(5), d))
    e = enc.preset(name, cohort=10, clip_norm=1.0, weight_cap=1)
    total, one, clamped, used = np.zeros(d), 0.0, 0, 0
    encoded, decoded = np.zeros(d, np.int32), np.zeros(d, np.float32)
    for k in range(UNBIASED_KEYS):
        seed = sha256(k.to_bytes(4, "big")).digest()
        now = enc.encode_update(
            update, 1, encoding=e, rotation_seed=seed, rounding_key=k.to_bytes(16, "big"), out_i32=encoded
        )
        if now:
            clamped += now
            continue
        used += 1
        enc.decode_sum(encoded.view(np.uint32), e, rotation_seed=seed, total_weight=1, out_f32=decoded)
        error = decoded.astype(np.float64) - update
        total += error
        one += float(np.sum(error**2))
    return one / used, float(np.sum((total / used) ** 2)), clamped / (UNBIASED_KEYS * d)


def clamp_rate(shape: Shape) -> float:
    """Clamped per coordinate of the rotated preset where that is most: the whole norm in one block."""
    d, rounds, clamped = 1 << 16, 400, 0
    e = enc.preset("compact", cohort=10, clip_norm=1.0, weight_cap=1)
    update, encoded = at_clip_norm(shape(np.random.default_rng(6), d)), np.zeros(d, np.int32)
    for k in range(rounds):
        seed = sha256(k.to_bytes(4, "big")).digest()
        clamped += enc.encode_update(update, 1, encoding=e, rotation_seed=seed, rounding_key=seed[:16], out_i32=encoded)
    return clamped / (rounds * d)


def main() -> None:
    """Measures and prints everything; about five minutes on one core."""
    began = time.perf_counter()
    print(f"d = {D:,}; weights at the cap | spread over a factor of 100")
    print(f"{'shape':16} {'n':>5} {'exact':>9} {'compact':>9} | {'exact':>9} {'compact':>9}   clamped (compact, cap)")
    for label, shape in SHAPES.items():
        for cohort in COHORTS:
            found = measure(shape, cohort)
            cap, spread = ([found[p, w][0] for p in ("exact", "compact")] for w in ("cap", "spread"))
            clamped = found["compact", "cap"][1]
            figures = " | ".join(f"{a:9.2e} {b:9.2e}" for a, b in (cap, spread))
            print(f"{label:16} {cohort:5} {figures}   {clamped:.1e}", flush=True)
    print(f"\nunbiasedness over {UNBIASED_KEYS} keys, d = {UNBIASED_D:,}")
    print(f"{'shape':16} {'preset':8} {'one':>9} {'average':>9} {'ratio':>7}   clamped")
    for label, shape in SHAPES.items():
        for name in ("exact", "compact"):
            one, average, clamped = unbiasedness(name, shape)
            ratio = average * UNBIASED_KEYS / one if one else 0.0
            print(f"{label:16} {name:8} {one:9.2e} {average:9.2e} {ratio:7.3f}   {clamped:.1e}", flush=True)
    print("\nclamped per coordinate of compact, the whole norm in one block of 65,536")
    for label, shape in SHAPES.items():
        print(f"{label:16} {clamp_rate(shape):.1e}")
    print(f"\n{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
