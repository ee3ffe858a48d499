"""What a dishonest site or coordinator puts in the place of an honest message.

Every lie is well-formed, so that it reaches the check that must catch it; what is not well-formed at all is the
business of the fuzzers. Lies that convict a site for the rest of a job are left to tests by name: a job cannot be
expected to finish with everybody after them.
"""

from __future__ import annotations

from dataclasses import replace

from maskwork.secagg.errors import AbortReason
from maskwork.secagg.keys import SIGNATURE_BYTES, PublicKey
from maskwork.secagg.messages import (
    AdvertiseKeys,
    Advertisements,
    ConsistencyCheck,
    DeliveredShares,
    RevealedShare,
    ShareKeys,
    SurvivorSets,
    SurvivorSignatures,
    Unmask,
    Withdraw,
)
from maskwork.wire.codec import OpenSession, Request, Response, UploadGrant

FORGED_KEY = PublicKey(bytes([9]) + bytes(31))
"""The base point: anyone knows its secret key, 1."""


def lie_up(message: Request | None, variant: int) -> Request:
    """What a site says instead of `message`; None: out of turn."""
    match message:
        case AdvertiseKeys() if variant % 2:
            return replace(message, mask_key=FORGED_KEY)
        case ShareKeys() if variant % 2:
            return replace(message, root=_flipped(message.root))
        case AdvertiseKeys() | ShareKeys():
            return replace(message, signature=_flipped(message.signature))
        case ConsistencyCheck():
            return ConsistencyCheck(_flipped(message.signature))
        case Unmask() if message.shares:
            at = variant % len(message.shares)
            share = message.shares[at]
            return Unmask((*message.shares[:at], _other_share(share), *message.shares[at + 1 :]))
        case _:
            return Withdraw(AbortReason.TRAINING_FAILED) if variant % 2 else ConsistencyCheck(bytes(SIGNATURE_BYTES))


def lie_down(message: Response, variant: int) -> Response | None:
    """What the coordinator says instead of `message`; None: nothing of this kind is worth a lie."""
    match message:
        case OpenSession():
            return replace(message, proposal=replace(message.proposal, signature=_flipped(message.proposal.signature)))
        case Advertisements() if message.advertised:
            at = variant % len(message.advertised)
            index, honest = message.advertised[at]
            forged = (index, replace(honest, mask_key=FORGED_KEY))
            return replace(
                message, advertised=(*message.advertised[:at], forged, *message.advertised[at + 1 :]), digests=()
            )
        case DeliveredShares() if message.shares:
            at = variant % len(message.shares)
            share = replace(message.shares[at], ciphertext=_flipped(message.shares[at].ciphertext))
            return replace(message, shares=(*message.shares[:at], share, *message.shares[at + 1 :]))
        case SurvivorSets():
            others = sorted(message.u2)
            changed = message.u3 ^ {others[variant % len(others)]}
            return replace(message, u3=changed)
        case SurvivorSignatures() if message.signatures:
            if variant % 2:
                return SurvivorSignatures(message.signatures[:1])
            index, signature = message.signatures[0]
            return SurvivorSignatures(((index, _flipped(signature)), *message.signatures[1:]))
        case UploadGrant():
            return UploadGrant(message.update_offset + 1, message.statistics_offset)
        case _:
            return None


def _other_share(share: RevealedShare) -> RevealedShare:
    return replace(share, salt=_flipped(share.salt))


def _flipped(value: bytes) -> bytes:
    return value[:-1] + bytes([value[-1] ^ 1])
