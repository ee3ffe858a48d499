"""Error of the decoded mean at d = 1e6, and unbiasedness over many rounding keys.

``benchmarks/nmse.py`` measures more: 1,000 participants, heavy tails, spread weights.
"""

from __future__ import annotations

import numpy as np
import pytest

from maskwork.secagg import encoding as enc
from maskwork.secagg.rotation import Float32Array

D = 1_000_000


@pytest.mark.parametrize("name", ["exact", "compact"])
def test_normalised_mean_squared_error_is_at_most_1e_6(name: str) -> None:
    """N = 3, 10, 100 updates at the clip norm in independent directions, weights at the cap."""
    rng = np.random.default_rng(7)
    true_sum, ring_sums = np.zeros(D), {n: np.zeros(D, np.int32) for n in (3, 10, 100)}
    update, encoded = np.zeros(D, np.float32), np.zeros(D, np.int32)
    for i in range(100):
        rng.standard_normal(dtype=np.float32, out=update)
        update *= np.float32(1 / np.linalg.norm(update))
        true_sum += update
        for n, ring_sum in ring_sums.items():
            if i < n:
                e = enc.preset(name, cohort=n, clip_norm=1.0, weight_cap=1000)
                key = bytes([i]) * 16
                enc.encode_update(update, 1000, encoding=e, rotation_seed=bytes(32), rounding_key=key, out_i32=encoded)
                ring_sum += encoded
                if i == n - 1:
                    assert _nmse(ring_sum, true_sum, e, n) <= 1e-6


def _nmse(ring_sum: np.ndarray[tuple[int], np.dtype[np.int32]], true_sum: object, e: enc.Encoding, n: int) -> float:
    mean: Float32Array = np.zeros(D, np.float32)
    enc.decode_sum(ring_sum.view(np.uint32), e, rotation_seed=bytes(32), total_weight=n * e.weight_cap, out_f32=mean)
    assert isinstance(true_sum, np.ndarray)
    truth = true_sum / n
    return float(np.sum((mean - truth) ** 2) / np.sum(truth**2))


@pytest.mark.parametrize("name", ["exact", "compact"])
def test_the_decoded_mean_is_unbiased_over_rounding_keys(name: str) -> None:
    """The error of the average over K keys shrinks like 1/K; a bias would stay."""
    d, keys = 5000, 400
    update = np.random.default_rng(3).standard_t(2, d).astype(np.float32)
    update *= np.float32(1 / np.linalg.norm(update))
    e = enc.preset(name, cohort=10, clip_norm=1.0, weight_cap=1)
    average, one_error = np.zeros(d), 0.0
    encoded, decoded = np.zeros(d, np.int32), np.zeros(d, np.float32)
    for k in range(keys):
        key = k.to_bytes(16, "big")
        enc.encode_update(update, 1, encoding=e, rotation_seed=bytes(32), rounding_key=key, out_i32=encoded)
        enc.decode_sum(encoded.view(np.uint32), e, rotation_seed=bytes(32), total_weight=1, out_f32=decoded)
        average += decoded.astype(np.float64) / keys
        one_error += float(np.sum((decoded - update.astype(np.float64)) ** 2)) / keys
    average_error = float(np.sum((average - update.astype(np.float64)) ** 2))
    assert average_error < 1.25 * one_error / keys + 1e-14
