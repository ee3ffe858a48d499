"""Shamir over GF(2^256 + 297): any t shares suffice, t - 1 say nothing, and what is malformed is refused."""

from __future__ import annotations

import hashlib
import itertools
import time
from contextlib import suppress

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from maskwork.secagg import sharing
from maskwork.secagg.sharing import (
    MAX_X,
    PRIME,
    SHARE_BYTES,
    SharingError,
    coefficient_bytes,
    combine,
    combine_with,
    lagrange_at_zero,
    split,
)

SECRETS = st.binary(min_size=32, max_size=32)


def stream(length: int, label: str) -> bytes:
    return hashlib.shake_256(label.encode()).digest(length)


@st.composite
def dealings(draw: st.DrawFn) -> tuple[bytes, list[int], int, bytes]:
    """(secret, holders, threshold, rand)."""
    holders = draw(st.lists(st.one_of(st.integers(1, 20), st.integers(1, MAX_X)), min_size=1, max_size=12, unique=True))
    threshold = draw(st.integers(1, len(holders)))
    rand = stream(coefficient_bytes(threshold), draw(st.text(max_size=4)))
    return draw(SECRETS), holders, threshold, rand


def slow_value(coefficients: list[int], x: int) -> int:
    """The polynomial at x, lowest coefficient first, by powers."""
    return sum(c * pow(x, j, PRIME) for j, c in enumerate(coefficients)) % PRIME


def slow_polynomial(points: list[tuple[int, int]]) -> list[int]:
    """Coefficients, lowest first, of the polynomial through the points: Gaussian elimination modulo p."""
    size = len(points)
    rows = [[pow(x, j, PRIME) for j in range(size)] + [y] for x, y in points]
    for i in range(size):
        swap = next(r for r in range(i, size) if rows[r][i])
        rows[i], rows[swap] = rows[swap], rows[i]
        inverse = pow(rows[i][i], -1, PRIME)
        rows[i] = [value * inverse % PRIME for value in rows[i]]
        for r in range(size):
            if r != i:
                factor = rows[r][i]
                rows[r] = [(a - factor * b) % PRIME for a, b in zip(rows[r], rows[i], strict=True)]
    return [row[size] for row in rows]


def as_rand(coefficients: list[int]) -> bytes:
    return b"".join(c.to_bytes(64, "big") for c in coefficients)


def probably_prime(n: int, bases: list[int]) -> bool:
    """Miller–Rabin."""
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in bases:
        x = pow(base, odd, n)
        if x in (1, n - 1):
            continue
        for _ in range(twos - 1):
            x = x * x % n
            if x == n - 1:
                break
        else:
            return False
    return True


def test_the_modulus_is_the_first_prime_above_2_to_the_256() -> None:
    bases = [b for b in range(2, 300) if all(b % d for d in range(2, b))]
    assert PRIME == 2**256 + 297
    assert probably_prime(PRIME, bases)
    assert not any(probably_prime(n, bases[:4]) for n in range(2**256, PRIME))


@given(dealing=dealings(), data=st.data())
def test_any_t_shares_recover_the_secret(dealing: tuple[bytes, list[int], int, bytes], data: st.DataObject) -> None:
    secret, holders, threshold, rand = dealing
    shares = dict(zip(holders, split(secret, holders=holders, threshold=threshold, rand=rand), strict=True))
    assert all(len(share) == SHARE_BYTES for share in shares.values())
    chosen = data.draw(st.permutations(holders))[:threshold]
    assert combine({x: shares[x] for x in chosen}) == secret
    assert combine(shares) == secret  # more than t lie on the same polynomial


@given(dealing=dealings())
def test_shares_are_the_values_of_the_specified_polynomial(dealing: tuple[bytes, list[int], int, bytes]) -> None:
    secret, holders, threshold, rand = dealing
    coefficients = [int.from_bytes(secret, "big")]
    coefficients += [int.from_bytes(rand[64 * j : 64 * (j + 1)], "big") % PRIME for j in range(threshold - 1)]
    shares = split(secret, holders=holders, threshold=threshold, rand=rand)
    assert [int.from_bytes(share, "big") for share in shares] == [slow_value(coefficients, x) for x in holders]


@given(dealing=dealings(), candidate=SECRETS, other=SECRETS, data=st.data())
def test_any_fewer_than_t_shares_fit_every_secret_in_exactly_one_way(
    dealing: tuple[bytes, list[int], int, bytes], candidate: bytes, other: bytes, data: st.DataObject
) -> None:
    """For each candidate there is exactly one choice of coefficients that deals the very same t - 1 shares.

    Coefficients are uniform, so having seen t - 1 shares every candidate is as likely as it was before.
    """
    secret, holders, threshold, rand = dealing
    shares = dict(zip(holders, split(secret, holders=holders, threshold=threshold, rand=rand), strict=True))
    seen = {x: shares[x] for x in data.draw(st.permutations(holders))[: threshold - 1]}
    through = {}
    for guess in (candidate, other, secret):
        # Gaussian elimination finds a pivot for every unknown, so this is the only polynomial.
        points = [(0, int.from_bytes(guess, "big"))] + [(x, int.from_bytes(s, "big")) for x, s in seen.items()]
        coefficients = slow_polynomial(points)
        through[guess] = tuple(coefficients[1:])
        again = split(guess, holders=holders, threshold=threshold, rand=as_rand(coefficients[1:]))
        dealt = dict(zip(holders, again, strict=True))
        assert {x: dealt[x] for x in seen} == seen
        missing = next(x for x in holders if x not in seen)
        assert combine({**seen, missing: dealt[missing]}) == guess
    if threshold > 1:
        assert (through[candidate] == through[other]) == (candidate == other)
        assert through[secret] == tuple(
            int.from_bytes(rand[64 * j : 64 * (j + 1)], "big") % PRIME for j in range(threshold - 1)
        )


def test_a_top_coefficient_of_zero_is_dealt_like_any_other() -> None:
    """Were it refused, two shares on a line would rule out the secret that is on the line with them."""
    secret = stream(32, "secret")
    rand = as_rand([5, 0])
    shares = split(secret, holders=[1, 2, 3], threshold=3, rand=rand)
    assert [int.from_bytes(s, "big") - int.from_bytes(secret, "big") for s in shares] == [5, 10, 15]
    assert split(secret, holders=[7, 9], threshold=2, rand=bytes(64)) == (b"\0" + secret, b"\0" + secret)


@given(dealing=dealings(), data=st.data())
def test_one_altered_share_changes_the_result(
    dealing: tuple[bytes, list[int], int, bytes], data: st.DataObject
) -> None:
    secret, holders, threshold, rand = dealing
    shares = dict(zip(holders, split(secret, holders=holders, threshold=threshold, rand=rand), strict=True))
    chosen = {x: shares[x] for x in holders[:threshold]}
    victim = data.draw(st.sampled_from(sorted(chosen)))
    altered = bytearray(chosen[victim])
    altered[data.draw(st.integers(0, SHARE_BYTES - 1))] ^= data.draw(st.integers(1, 255))
    with suppress(SharingError):  # not canonical any more, or not the shares of any 32-byte secret
        assert combine({**chosen, victim: bytes(altered)}) != secret


@given(dealing=dealings())
def test_fewer_than_t_shares_do_not_recover_the_secret(dealing: tuple[bytes, list[int], int, bytes]) -> None:
    secret, holders, threshold, rand = dealing
    assume(threshold > 1)
    shares = split(secret, holders=holders, threshold=threshold, rand=rand)
    with suppress(SharingError):
        assert combine(dict(list(zip(holders, shares, strict=True))[: threshold - 1])) != secret


@given(first=dealings(), second=SECRETS)
def test_one_set_of_coefficients_serves_many_secrets(first: tuple[bytes, list[int], int, bytes], second: bytes) -> None:
    secret, holders, threshold, rand = first
    coefficients = lagrange_at_zero(holders[:threshold])
    for value in (secret, second):
        shares = split(value, holders=holders, threshold=threshold, rand=rand)
        assert combine_with(coefficients, shares[:threshold]) == value


@settings(deadline=None)
@given(xs=st.lists(st.one_of(st.integers(1, 40), st.integers(1, MAX_X)), min_size=1, max_size=30, unique=True))
def test_lagrange_coefficients_agree_with_their_slow_twin(xs: list[int]) -> None:
    expected = []
    for x in xs:
        value = 1
        for other in xs:
            if other != x:
                value = value * other * pow(other - x, -1, PRIME) % PRIME
        expected.append(value)
    assert lagrange_at_zero(xs) == tuple(expected)


@pytest.mark.parametrize("xs", [range(1, 602), range(MAX_X - 300, MAX_X + 1), [1, MAX_X], [*range(1, 300), MAX_X]])
def test_many_and_large_x(xs: range | list[int]) -> None:
    secret, holders = stream(32, "s"), list(xs)
    threshold = len(holders)
    rand = stream(coefficient_bytes(threshold), "r")
    shares = split(secret, holders=holders, threshold=threshold, rand=rand)
    assert combine(dict(zip(holders, shares, strict=True))) == secret


def test_keys_for_a_hundred_holders_are_shared_in_a_few_milliseconds() -> None:
    holders, threshold = list(range(1, 101)), 67
    rand = stream(coefficient_bytes(threshold), "r")
    begin = time.perf_counter()
    for label in ("self seed", "mask secret"):
        split(stream(32, label), holders=holders, threshold=threshold, rand=rand)
    assert time.perf_counter() - begin < 0.1  # measured: 0.8 ms; the margin is for a busy machine


@pytest.mark.parametrize(
    ("secret", "holders", "threshold", "rand", "words"),
    [
        (31, [1, 2, 3], 2, 64, "a secret has 32 bytes, not 31"),
        (33, [1, 2, 3], 2, 64, "a secret has 32 bytes, not 33"),
        (32, [1, 2, 3], 2, 63, "rand has 63 bytes; threshold 2 takes 64"),
        (32, [1, 2, 3], 2, 128, "rand has 128 bytes"),
        (32, [1, 2, 3], 0, 0, "threshold 0 is smaller than 1"),
        (32, [1, 2, 3], 4, 192, "threshold 4 exceeds the 3 holders"),
        (32, [1, 2, 2], 2, 64, "repeated"),
        (32, [0, 1, 2], 2, 64, "x = 0 "),
        (32, [1, 2, MAX_X + 1], 2, 64, "x = 4294967296 "),
        (32, [], 1, 0, "threshold 1 exceeds the 0 holders"),
    ],
)
def test_a_dealing_that_cannot_be_made_is_refused(
    secret: int, holders: list[int], threshold: int, rand: int, words: str
) -> None:
    with pytest.raises(SharingError, match=words):
        split(bytes(secret), holders=holders, threshold=threshold, rand=bytes(rand))


def test_only_canonical_shares_are_taken() -> None:
    top = (PRIME - 1).to_bytes(33, "big")
    too_large = PRIME.to_bytes(33, "big")
    good = bytes(33)
    for bad, words in (
        (too_large, "canonical"),
        (b"\xff" * 33, "canonical"),
        (bytes(32), "33 bytes"),
        (bytes(34), "33"),
    ):
        for shares in ({1: bad, 2: good}, {1: good, 2: bad}):
            with pytest.raises(SharingError, match=words):
                combine(shares)
    assert combine({1: top, 2: (PRIME - 2).to_bytes(33, "big")}) == bytes(32)  # -1 and -2 are on a line through 0


def test_a_value_that_no_secret_has_is_refused() -> None:
    for value in (2**256, PRIME - 1):
        with pytest.raises(SharingError, match="not of one polynomial"):
            combine({1: value.to_bytes(33, "big")})
    assert combine({1: (2**256 - 1).to_bytes(33, "big")}) == b"\xff" * 32


def test_misuse_of_coefficients_is_refused() -> None:
    with pytest.raises(SharingError, match="nothing to combine"):
        combine({})
    with pytest.raises(SharingError, match="x = 0"):
        combine({0: bytes(33)})
    with pytest.raises(SharingError, match="repeated"):
        lagrange_at_zero([1, 2, 1])
    with pytest.raises(SharingError, match="1 shares do not go with 2 coefficients"):
        combine_with(lagrange_at_zero([1, 2]), [bytes(33)])
    with pytest.raises(SharingError, match="0 shares do not go with 0"):
        combine_with((), [])


def test_no_message_carries_a_share_or_a_secret() -> None:
    secret_byte = 0xA7
    said = []
    for shares in (
        {1: bytes([secret_byte]) * 33},
        {1: bytes([secret_byte]) * 31},
        {1: b"\1" + bytes([secret_byte]) * 32},
    ):
        with pytest.raises(SharingError) as refusal:
            combine(shares)
        said.append(str(refusal.value))
    for length, rand in ((31, 64), (32, 63)):
        with pytest.raises(SharingError) as refusal:
            split(bytes([secret_byte]) * length, holders=[1, 2], threshold=2, rand=bytes([secret_byte]) * rand)
        said.append(str(refusal.value))
    decimals = [str(int.from_bytes(bytes([secret_byte]) * n, "big")) for n in (31, 32, 33)]
    for message, trace in itertools.product(said, ["a7a7", "xa7", "167167", *decimals]):
        assert trace not in message


def test_reduction_happens_within_long_polynomials_too() -> None:
    # More coefficients than one run of Horner's rule, at the largest x there is.
    threshold = 3 * sharing._LAZY + 1
    rand = b"\xff" * coefficient_bytes(threshold)
    (share,) = split(b"\xff" * 32, holders=[MAX_X], threshold=1, rand=b"")
    assert share == b"\0" + b"\xff" * 32
    holders = [MAX_X - i for i in range(threshold)]
    shares = split(b"\xff" * 32, holders=holders, threshold=threshold, rand=rand)
    top = int.from_bytes(b"\xff" * 64, "big") % PRIME
    expected = [slow_value([2**256 - 1] + [top] * (threshold - 1), x) for x in holders]
    assert [int.from_bytes(s, "big") for s in shares] == expected
