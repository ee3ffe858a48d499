"""Shamir secret sharing of 32-byte secrets over GF(p), p = 2^256 + 297.

A polynomial of degree below t with the secret at x = 0; a share is its value at the holder's x. Any t shares give
the secret, any t - 1 are independent of it.

It is NOT verifiable sharing: a share says nothing about whether it is right. The protocol's signed commitments do,
and the caller checks what is reconstructed. It draws no randomness, knows nothing of participants, and its
arithmetic does not run in constant time.

Rules:
1. One encoding for each share: 33 bytes big-endian, below p. Anything else is refused.
2. Messages name an x or a length, never a share, a coefficient or a secret.

Source: Shamir, "How to Share a Secret", CACM 1979; Bonawitz et al., CCS 2017, section 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from operator import mul

import numpy as np

PRIME = (1 << 256) + 297
"""The smallest prime above 2^256, so that every 32-byte string is a field element."""
SECRET_BYTES = 32
SHARE_BYTES = 33
COEFFICIENT_BYTES = 64
MAX_X = (1 << 32) - 1

_LAZY = 16  # Horner steps between reductions; x is short, so the running value grows slowly
_ROWS = 256  # rows of the matrix of differences held at a time: memory stays linear in the number of shares


class SharingError(ValueError):
    """Shares that cannot be combined, or arguments from which no shares can be made."""


def coefficient_bytes(threshold: int) -> int:
    """How many random bytes `split` consumes: 64 for each of the t - 1 coefficients.

    Raises:
        SharingError: `threshold` is smaller than 1.
    """
    if threshold < 1:
        raise SharingError(f"threshold {threshold} is smaller than 1")
    return (threshold - 1) * COEFFICIENT_BYTES


def split(secret: bytes, *, holders: Sequence[int], threshold: int, rand: bytes) -> tuple[bytes, ...]:
    """Shares of a secret, 33 bytes each, aligned with `holders`.

    The coefficient of x^j (j = 1..t-1) is the j-th group of 64 bytes of `rand`, big-endian, modulo p; it is within
    2^-255 of uniform. The top coefficient may come out as zero, and must be allowed to: were it always non-zero,
    t - 1 shares would rule out the one secret whose polynomial through them has a lower degree.

    Args:
        secret: 32 bytes.
        holders: the x of each holder (roster index + 1), distinct, 1 to 2^32 - 1.
        threshold: shares needed to get the secret back, 1 to len(holders).
        rand: exactly `coefficient_bytes(threshold)` fresh random bytes.

    Raises:
        SharingError: a wrong length, an x that is repeated or out of range, a threshold out of range.
    """
    if len(secret) != SECRET_BYTES:
        raise SharingError(f"a secret has {SECRET_BYTES} bytes, not {len(secret)}")
    if len(rand) != coefficient_bytes(threshold):
        raise SharingError(f"rand has {len(rand)} bytes; threshold {threshold} takes {coefficient_bytes(threshold)}")
    _check_xs(holders)
    if threshold > len(holders):
        raise SharingError(f"threshold {threshold} exceeds the {len(holders)} holders")
    descending = [
        int.from_bytes(rand[start : start + COEFFICIENT_BYTES], "big") % PRIME
        for start in range(len(rand) - COEFFICIENT_BYTES, -1, -COEFFICIENT_BYTES)
    ]
    descending.append(int.from_bytes(secret, "big"))
    runs = [descending[start : start + _LAZY] for start in range(0, threshold, _LAZY)]
    return tuple(_evaluate(runs, x).to_bytes(SHARE_BYTES, "big") for x in holders)


def _evaluate(runs: Sequence[Sequence[int]], x: int) -> int:
    """Horner's rule over coefficients in descending order, reduced once for each run."""
    value = 0
    for run in runs:
        for coefficient in run:
            value = value * x + coefficient
        value %= PRIME
    return value


def combine(shares: Mapping[int, bytes]) -> bytes:
    """The 32-byte secret from shares by x. Uses all that are given: pass exactly t.

    Raises:
        SharingError: no shares, an x out of range, a share that is not canonical, or a value that no 32-byte secret
            has (the shares are not of one polynomial).
    """
    xs = tuple(shares)
    return combine_with(lagrange_at_zero(xs), [shares[x] for x in xs])


def lagrange_at_zero(xs: Sequence[int]) -> tuple[int, ...]:
    """The Lagrange coefficients at 0 for these x, aligned: secret = Σ coefficient·share mod p.

    They depend on who answered and not on the secret, so one set serves every secret with the same holders.

    Raises:
        SharingError: no x, or one that is repeated or out of range.
    """
    _check_xs(xs)
    if not xs:
        raise SharingError("no shares: nothing to combine")
    numerator = prod(xs) % PRIME
    return tuple(numerator * inverse % PRIME for inverse in _inverses(_denominators(xs)))


def _denominators(xs: Sequence[int]) -> list[int]:
    """For each x, the product of x itself and of (other - x) over all others, modulo p.

    The t² differences are short: as many of them as fit are multiplied in 64-bit words before long integers see them.
    """
    fold = max(1, 62 // max(xs).bit_length())
    points = np.array(xs, dtype=np.int64)
    denominators = []
    for start in range(0, len(xs), _ROWS):
        rows = np.arange(start, min(start + _ROWS, len(xs)))
        factors = np.ones((len(rows), -(-len(xs) // fold) * fold), dtype=np.int64)
        factors[:, : len(xs)] = points[None, :] - points[rows, None]
        factors[rows - start, rows] = 1
        folded: list[list[int]] = factors.reshape(len(rows), -1, fold).prod(axis=2).tolist()
        for x, words in zip(xs[start:], folded, strict=False):
            value = x
            for word in words:
                value = value * word % PRIME
            denominators.append(value)
    return denominators


def _inverses(values: Sequence[int]) -> list[int]:
    """Inverses modulo p of non-zero values, with a single inversion (Montgomery's trick)."""
    prefix = [1]
    for value in values:
        prefix.append(prefix[-1] * value % PRIME)
    suffix = pow(prefix[-1], -1, PRIME)
    inverses = []
    for before, value in zip(reversed(prefix[:-1]), reversed(values), strict=True):
        inverses.append(suffix * before % PRIME)
        suffix = suffix * value % PRIME
    inverses.reverse()
    return inverses


def combine_with(coefficients: Sequence[int], shares: Sequence[bytes]) -> bytes:
    """The 32-byte secret from shares aligned with coefficients of `lagrange_at_zero`.

    Raises:
        SharingError: as `combine`; or the two sequences differ in length.
    """
    if len(coefficients) != len(shares) or not shares:
        raise SharingError(f"{len(shares)} shares do not go with {len(coefficients)} coefficients")
    if any(len(share) != SHARE_BYTES for share in shares):
        raise SharingError(f"a share is not {SHARE_BYTES} bytes long")
    values = [int.from_bytes(share, "big") for share in shares]
    if max(values) >= PRIME:
        raise SharingError("a share is not canonical: it is not below the prime")
    secret: int = sum(map(mul, coefficients, values)) % PRIME
    if secret >> (8 * SECRET_BYTES):
        raise SharingError("the shares do not combine to a 32-byte secret: they are not of one polynomial")
    return secret.to_bytes(SECRET_BYTES, "big")


def _check_xs(xs: Sequence[int]) -> None:
    for x in xs:
        if not 1 <= x <= MAX_X:
            raise SharingError(f"x = {x} is not within 1..{MAX_X}")
    if len(set(xs)) != len(xs):
        raise SharingError("an x is repeated")
