"""What the coordinator does with the shares of step 4: reconstruct, verify, and name the masks left in the sum.

Pure and heavy (Shamir and X25519 for every survivor and dropout), so it runs in a worker process: an `UnmaskingJob`
goes in, the `RemainingMasks` come out, and `maskwork.secagg.masking.remove_masks` applies it to the accumulator.

A reconstructed secret is used only after it has been checked against what its owner signed: b_u against its
commitment, mask_sk_u against the mask_pk_u of step 0.

Source: Bonawitz et al. CCS 2017, figure 4, round 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from maskwork.secagg import keys
from maskwork.secagg.errors import DealerEquivocated
from maskwork.secagg.keys import PublicKey, SecretKey
from maskwork.secagg.prg import SignedKey
from maskwork.secagg.sharing import SharingError, combine_with, lagrange_at_zero

Reconstruct: TypeAlias = Callable[[Mapping[int, bytes]], bytes]


@dataclass(frozen=True, slots=True)
class SelfSeedShares:
    """A survivor's b_u: exactly t shares by x-coordinate, and the commitment they must lead to."""

    owner: int
    commitment: bytes
    shares: Mapping[int, bytes] = field(repr=False)


@dataclass(frozen=True, slots=True)
class MaskSecretShares:
    """A dropout's mask_sk_u: exactly t shares by x-coordinate, its public half, and its surviving neighbours."""

    owner: int
    mask_key: PublicKey
    shares: Mapping[int, bytes] = field(repr=False)
    neighbours: tuple[tuple[int, PublicKey], ...]


@dataclass(frozen=True, slots=True)
class UnmaskingJob:
    """Everything that step 4 gathered for one session."""

    session: bytes
    self_seeds: tuple[SelfSeedShares, ...]
    mask_secrets: tuple[MaskSecretShares, ...]


@dataclass(frozen=True, slots=True)
class RemainingMasks:
    """The masks still in the sum of each segment, signed as they stand there."""

    update: tuple[SignedKey, ...]
    statistics: tuple[SignedKey, ...]


def remaining_masks(job: UnmaskingJob) -> RemainingMasks:
    """Reconstruct every secret of a job and derive the masks that did not cancel.

    Raises:
        DealerEquivocated: shares that match their dealer's signed commitments reconstruct something else than the
            dealer announced.
    """
    coefficients: dict[tuple[int, ...], tuple[int, ...]] = {}

    def reconstruct(shares: Mapping[int, bytes]) -> bytes:
        xs = tuple(sorted(shares))
        if xs not in coefficients:
            coefficients[xs] = lagrange_at_zero(xs)
        return combine_with(coefficients[xs], [shares[x] for x in xs])

    pairs: list[tuple[tuple[bytes, bytes], bool]] = []
    for seed in job.self_seeds:
        pairs.append((_self_mask(job.session, seed, reconstruct), False))
    for secret in job.mask_secrets:
        pairs.extend(_pair_masks(job.session, secret, reconstruct))
    return RemainingMasks(
        update=tuple(SignedKey(pair[0], negative) for pair, negative in pairs),
        statistics=tuple(SignedKey(pair[1], negative) for pair, negative in pairs),
    )


def _self_mask(session: bytes, seed: SelfSeedShares, reconstruct: Reconstruct) -> tuple[bytes, bytes]:
    try:
        self_seed = reconstruct(seed.shares)
    except SharingError as error:
        raise DealerEquivocated(seed.owner, "self seed") from error
    if keys.seed_commitment(self_seed, owner=seed.owner, session=session) != seed.commitment:
        raise DealerEquivocated(seed.owner, "self seed")
    return keys.self_mask_keys(self_seed, index=seed.owner, session=session)


def _pair_masks(
    session: bytes, secret: MaskSecretShares, reconstruct: Reconstruct
) -> list[tuple[tuple[bytes, bytes], bool]]:
    try:
        mask_secret = SecretKey(reconstruct(secret.shares))
    except SharingError as error:
        raise DealerEquivocated(secret.owner, "mask key") from error
    if mask_secret.public() != secret.mask_key:
        raise DealerEquivocated(secret.owner, "mask key")
    masks = []
    for index, mask_key in secret.neighbours:
        pair = keys.pair_mask_keys(
            mask_secret,
            own=secret.mask_key,
            peer=mask_key,
            own_index=secret.owner,
            peer_index=index,
            session=session,
        )
        masks.append((pair, index > secret.owner))  # the survivor subtracted it when its index is the higher one
    return masks
