"""What masked uploads look like to whoever sees them all: noise, whatever they hide.

Everything goes through production's own functions and entropy: key agreement, encoding, masking, sharing. The
thresholds are chosen so that a test of a sound protocol fails once in more than a thousand million runs; each test has
a control, in which something is broken on purpose, that has to fail.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from maskwork.secagg import keys, masking, sharing
from maskwork.secagg.encoding import Encoding, Rotation
from maskwork.secagg.keys import SecretKey
from maskwork.secagg.masking import MaskingKeys
from maskwork.secagg.prg import KEY_BYTES, SignedKey, add_keystreams_u32
from maskwork.secagg.ring import UInt32Array, centre, packed_size, reduce_in_place, unpack
from maskwork.secagg.rotation import Float32Array

FALSE_ALARM = 1e-10
"""Of one comparison; no test makes more than ten."""
MEMBERS = 4
THRESHOLD = 3
VICTIM = 0
WIDE = Encoding(clip_norm=1.0, weight_cap=1, value_bits=24, ring_bits=26, rotation=Rotation.NONE)
NARROW = Encoding(clip_norm=1.0, weight_cap=1, value_bits=8, ring_bits=10, rotation=Rotation.NONE)


@dataclass(frozen=True)
class Session:
    """One session of four, from the side of its first member: what it holds, and what the others could."""

    id: bytes
    secrets: tuple[SecretKey, ...]
    self_seed: bytes
    shares: Mapping[int, bytes]
    masking_keys: MaskingKeys


def session() -> Session:
    """A session with fresh keys."""
    identifier, self_seed = os.urandom(32), os.urandom(32)
    secrets = tuple(SecretKey(os.urandom(32)) for _ in range(MEMBERS))
    holders = tuple(range(1, MEMBERS + 1))
    rand = os.urandom(sharing.coefficient_bytes(THRESHOLD))
    shares = sharing.split(self_seed, holders=holders, threshold=THRESHOLD, rand=rand)
    own_masks = keys.self_mask_keys(self_seed, index=VICTIM, session=identifier)
    pairs = [pair_masks(secrets, VICTIM, peer, identifier) for peer in range(1, MEMBERS)]
    made = MaskingKeys(
        update=(SignedKey(own_masks[0], False), *(SignedKey(pair[0], False) for pair in pairs)),
        statistics=(SignedKey(own_masks[1], False), *(SignedKey(pair[1], False) for pair in pairs)),
        rounding_key=os.urandom(KEY_BYTES),
    )
    return Session(identifier, secrets, self_seed, dict(zip(holders, shares, strict=True)), made)


def pair_masks(secrets: tuple[SecretKey, ...], own: int, peer: int, identifier: bytes) -> tuple[bytes, bytes]:
    """The keys of the masks between two members, as the first of them derives them."""
    public = [secret.public() for secret in secrets]
    return keys.pair_mask_keys(
        secrets[own], own=public[own], peer=public[peer], own_index=own, peer_index=peer, session=identifier
    )


def upload(update: Float32Array, encoding: Encoding, made: MaskingKeys) -> UInt32Array:
    """The masked update of one member, uint32[d], as the coordinator unpacks it."""
    packed = np.zeros(packed_size(update.size, encoding.ring_bits), np.uint8)
    masking.mask_update(update, 1, encoding=encoding, keys=made, rotation_seed=bytes(32), out_u8=packed)
    values = np.zeros(update.size, np.uint32)
    unpack(packed, encoding.ring_bits, values)
    return values


def telling_update(size: int) -> Float32Array:
    """An update that is anything but noise: the same number everywhere."""
    return np.full(size, 0.9 / np.sqrt(size), np.float32)


def is_uniform(values: UInt32Array, bits: int) -> bool:
    """Whether a chi-square test of every value of so many bits finds nothing."""
    counts = np.bincount(values, minlength=1 << bits)
    return bool(stats.chisquare(counts).pvalue > FALSE_ALARM)


def lanes(values: UInt32Array, bits: int) -> list[tuple[UInt32Array, int]]:
    """The bytes of each ring value, lowest first, the last one as wide as it is."""
    widths = {low: min(8, bits - low) for low in range(0, bits, 8)}
    return [((values >> np.uint32(low)) & np.uint32((1 << width) - 1), width) for low, width in widths.items()]


def test_every_byte_lane_of_a_masked_upload_is_uniform() -> None:
    size = 400_000
    update = telling_update(size)
    masked = upload(update, WIDE, session().masking_keys)
    for lane, width in lanes(masked, WIDE.ring_bits):
        assert is_uniform(lane, width)

    bare = MaskingKeys(update=(), statistics=(), rounding_key=bytes(KEY_BYTES))
    assert not any(is_uniform(lane, width) for lane, width in lanes(upload(update, WIDE, bare), WIDE.ring_bits))


def test_every_value_of_the_ring_occurs_the_highest_too() -> None:
    """`randint(0, R - 1)` elsewhere never drew the last one, and so the masks of that framework were not uniform."""
    size, top = 1_000_000, (1 << NARROW.ring_bits) - 1
    masked = upload(telling_update(size), NARROW, session().masking_keys)
    counts = np.bincount(masked, minlength=top + 1)
    assert counts.size == top + 1
    assert is_uniform(masked, NARROW.ring_bits)
    assert stats.binomtest(int(counts[top]), size, 1 / (top + 1)).pvalue > FALSE_ALARM

    never_the_last = np.random.default_rng(1).integers(0, top, size, dtype=np.uint32)
    assert not is_uniform(never_the_last, NARROW.ring_bits)


def test_two_attempts_of_one_update_have_nothing_to_do_with_each_other() -> None:
    size = 400_000
    update, made = telling_update(size), session().masking_keys
    first, second = upload(update, WIDE, made), upload(update, WIDE, session().masking_keys)
    assert _unrelated(first, second)
    assert not _unrelated(first, upload(update, WIDE, made))  # the same keys twice would be a two-time pad


def _unrelated(first: UInt32Array, second: UInt32Array) -> bool:
    difference = first - second
    reduce_in_place(difference, WIDE.ring_bits)
    signed = [np.zeros(first.size, np.int32) for _ in range(2)]
    for values, out in zip((first, second), signed, strict=True):
        centre(values, WIDE.ring_bits, out)
    correlated = stats.pearsonr(signed[0].astype(np.float64), signed[1].astype(np.float64)).pvalue <= FALSE_ALARM
    return not correlated and all(is_uniform(lane, width) for lane, width in lanes(difference, WIDE.ring_bits))


# --- a coordinator that has everything but t shares ---------------------------------------------------------------

TRIALS = 10_000
SIZE = 8

Guess = Callable[[UInt32Array, Session, Mapping[int, bytes]], int]


def without_pair_masks(masked: UInt32Array, known: Session) -> UInt32Array:
    """What is left when all other members have given their mask keys away: the update under the self mask alone."""
    pairs = [pair_masks(known.secrets, peer, VICTIM, known.id)[0] for peer in range(1, MEMBERS)]
    left = masked.copy()
    add_keystreams_u32(left, [SignedKey(pair, True) for pair in pairs])
    reduce_in_place(left, NARROW.ring_bits)
    return left


def signs_of(left: UInt32Array) -> int:
    """1 if most coordinates are positive."""
    signed = np.zeros(left.size, np.int32)
    centre(left, NARROW.ring_bits, signed)
    return int(np.sum(np.sign(signed)) > 0)


def by_reconstruction(masked: UInt32Array, known: Session, shares: Mapping[int, bytes]) -> int:
    """Open the self seed with the shares there are, a missing one made up; take that mask off, and look."""
    made_up = dict(shares)
    for holder in known.shares:
        if len(made_up) < THRESHOLD and holder not in made_up:
            made_up[holder] = b"\\x00" + os.urandom(32)
    left = without_pair_masks(masked, known)
    try:
        seed = sharing.combine(made_up)
    except sharing.SharingError:  # the made-up share gives no secret of 32 bytes: look at what there is
        return signs_of(left)
    mask = keys.self_mask_keys(seed, index=VICTIM, session=known.id)[0]
    add_keystreams_u32(left, [SignedKey(mask, True)])
    reduce_in_place(left, NARROW.ring_bits)
    return signs_of(left)


def by_looking(masked: UInt32Array, known: Session, _shares: Mapping[int, bytes]) -> int:
    """Take off what can be taken off, and look at the signs."""
    return signs_of(without_pair_masks(masked, known))


def by_the_shares(_masked: UInt32Array, _known: Session, shares: Mapping[int, bytes]) -> int:
    """See whether the shares themselves tell anything."""
    return hashlib.sha256(b"".join(shares.values())).digest()[0] & 1


def wins(*guesses: Guess, trials: int, shares: int) -> list[int]:
    """How often each guess of the victim's bit is right, given so many shares of its self seed."""
    drawn, right = np.random.default_rng(), [0] * len(guesses)
    for _ in range(trials):
        bit = int(drawn.integers(2))
        update = telling_update(SIZE) * np.float32(1 if bit else -1)
        secret = session()
        masked = upload(update, NARROW, secret.masking_keys)
        given = dict(list(secret.shares.items())[1 : 1 + shares])  # of others than the victim
        for at, guess in enumerate(guesses):
            right[at] += guess(masked, secret, given) == bit
    return right


def test_a_coordinator_that_has_everything_but_t_shares_guesses_no_better_than_a_coin() -> None:
    """It has every other member's mask key, all uploads, and t - 1 shares of the victim's self seed."""
    guesses = (by_reconstruction, by_looking, by_the_shares)
    for right in wins(*guesses, trials=TRIALS, shares=THRESHOLD - 1):
        assert stats.binomtest(right, TRIALS, 0.5).pvalue > FALSE_ALARM


def test_with_t_shares_it_is_right_every_time() -> None:
    """So the test above can fail: one share more is all that is missing."""
    assert wins(by_reconstruction, trials=200, shares=THRESHOLD) == [200]
