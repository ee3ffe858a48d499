"""The hash chain: how one head of 32 bytes stands for every record before it. Pure.

    head_0     = 32 zero bytes
    head_{n+1} = H(label ‖ head_n ‖ u64 n ‖ H(record n))

A record's digest alone is enough to go on from a head, so whoever keeps a head can be shown, 32 bytes for each record
since, that a later head extends it, without being shown the records.

It is NOT a Merkle tree: whoever was away for n records is sent 32·n bytes. Rounds make about ten records.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric import ec

from maskwork.secagg.keys import Signer, verify_signature

DIGEST_BYTES = 32
EMPTY_HEAD = bytes(DIGEST_BYTES)
"""The head of a chain without records."""
_HEAD_LABEL = b"maskwork/v1/audit/head\0"
_SIGNED_LABEL = b"maskwork/v1/audit/signed-head\0"


def record_digest(record: bytes) -> bytes:
    """SHA-256 of a record's bytes, which is all that the chain knows of it."""
    return hashlib.sha256(record).digest()


def next_head(head: bytes, index: int, digest: bytes) -> bytes:
    """The head after the record number `index` (from 0), which has this digest."""
    return hashlib.sha256(_HEAD_LABEL + head + index.to_bytes(8, "big") + digest).digest()


def heads_from(head: bytes, size: int, digests: bytes) -> Iterator[bytes]:
    """Each head that follows a chain of `size` records with `head`, as records with these digests are added.

    Raises:
        ValueError: `digests` is not a whole number of digests.
    """
    if len(digests) % DIGEST_BYTES:
        raise ValueError(f"{len(digests)} bytes are not a whole number of digests")
    for place in range(len(digests) // DIGEST_BYTES):
        head = next_head(head, size + place, digests[place * DIGEST_BYTES : (place + 1) * DIGEST_BYTES])
        yield head


def fold(head: bytes, size: int, digests: bytes) -> bytes:
    """The last of `heads_from`, or `head` itself when there are no digests."""
    for following in heads_from(head, size, digests):
        head = following
    return head


@dataclass(frozen=True, slots=True)
class SignedHead:
    """A head that somebody stands for: that so many records, and no others, are in its log.

    Attributes:
        size: number of records.
        head: 32 bytes.
        signature: over label, federation, size and head, by the certificate key of the log's owner.
    """

    size: int
    head: bytes
    signature: bytes


def signed_bytes(federation: str, size: int, head: bytes) -> bytes:
    """What the signature of a head covers."""
    name = federation.encode()
    return _SIGNED_LABEL + len(name).to_bytes(2, "big") + name + size.to_bytes(8, "big") + head


def sign_head(signer: Signer, federation: str, size: int, head: bytes) -> SignedHead:
    """Stand for a head."""
    return SignedHead(size, head, signer.sign(signed_bytes(federation, size, head)))


def is_signed_by(signed: SignedHead, federation: str, key: ec.EllipticCurvePublicKey) -> bool:
    """Whether this key's owner stands for the head."""
    return verify_signature(key, signed.signature, signed_bytes(federation, signed.size, signed.head))
