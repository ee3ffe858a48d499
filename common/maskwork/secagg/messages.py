"""One frozen dataclass for each message of the protocol, and the bytes that its signature covers.

A message that exists is well-formed: lengths and ranges are checked on construction (`MessageError`), so the state
machines check meaning only. Who a message came from is never a field of it: the transport authenticated the sender
and the state machines are told its roster index.

Sets of participants are frozensets of roster indices here and bitmaps in roster order on the wire.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from maskwork.secagg.errors import AbortReason, DeclineCode
from maskwork.secagg.keys import (
    AEAD_KEY_BYTES,
    CIPHERTEXT_BYTES,
    COMMITMENT_BYTES,
    SALT_BYTES,
    SIGNATURE_BYTES,
    PublicKey,
    ShareKind,
    signed_message,
)
from maskwork.secagg.plan import RoundPlan
from maskwork.secagg.sharing import SHARE_BYTES

MAX_DETAIL = 500
Members: TypeAlias = frozenset[int]


class MessageError(ValueError):
    """A message is not well-formed; the text names the field."""


def encode_members(members: Members, size: int) -> bytes:
    """A set of roster indices as ceil(size / 8) bytes; index i is bit i % 8, least first, of byte i // 8."""
    outside = [index for index in members if not 0 <= index < size]
    if outside:
        raise MessageError(f"index {outside[0]} is not in a roster of {size}")
    bits = np.zeros(size, np.uint8)
    bits[np.fromiter(members, np.intp, len(members))] = 1
    return np.packbits(bits, bitorder="little").tobytes()


def decode_members(bitmap: bytes, size: int) -> Members:
    """The inverse of `encode_members`.

    Raises:
        MessageError: the length is not ceil(size / 8), or a bit beyond the roster is set.
    """
    if len(bitmap) != (size + 7) // 8:
        raise MessageError(f"a bitmap over {size} members has {(size + 7) // 8} bytes, not {len(bitmap)}")
    bits = np.unpackbits(np.frombuffer(bitmap, np.uint8), bitorder="little")
    members = frozenset(np.flatnonzero(bits).tolist())
    if members and max(members) >= size:
        raise MessageError(f"a bitmap names a member beyond the roster of {size}")
    return members


def _exact(value: bytes, length: int, name: str) -> None:
    if len(value) != length:
        raise MessageError(f"{name} has {len(value)} bytes, not {length}")


# --- participant to coordinator -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AdvertiseKeys:
    """Step 0: the two fresh public keys of a session, signed with the certificate's key."""

    encryption_key: PublicKey
    mask_key: PublicKey
    signature: bytes

    def __post_init__(self) -> None:
        _exact(self.signature, SIGNATURE_BYTES, "signature")

    @staticmethod
    def signed_bytes(encryption_key: PublicKey, mask_key: PublicKey, *, session: bytes, sender: int) -> bytes:
        """What the signature covers."""
        return signed_message(
            "advertise-keys", session=session, sender=sender, fields=encryption_key.raw + mask_key.raw
        )

    def verified_bytes(self, *, session: bytes, sender: int) -> bytes:
        """What this message's signature must cover."""
        return self.signed_bytes(self.encryption_key, self.mask_key, session=session, sender=sender)


@dataclass(frozen=True, slots=True)
class DealtShare:
    """What a dealer makes for one holder: a ciphertext (empty for itself) and the commitments to both shares."""

    holder: int
    ciphertext: bytes
    self_commitment: bytes
    mask_commitment: bytes

    def __post_init__(self) -> None:
        if len(self.ciphertext) not in (0, CIPHERTEXT_BYTES):
            raise MessageError(f"a share's ciphertext has {len(self.ciphertext)} bytes, not {CIPHERTEXT_BYTES}")
        _exact(self.self_commitment, COMMITMENT_BYTES, "self_commitment")
        _exact(self.mask_commitment, COMMITMENT_BYTES, "mask_commitment")


@dataclass(frozen=True, slots=True)
class ShareKeys:
    """Step 1: shares of both secrets for every holder, ascending by holder, under one signed Merkle root."""

    seed_commitment: bytes
    root: bytes
    shares: tuple[DealtShare, ...]
    signature: bytes

    def __post_init__(self) -> None:
        _exact(self.seed_commitment, COMMITMENT_BYTES, "seed_commitment")
        _exact(self.root, COMMITMENT_BYTES, "root")
        _exact(self.signature, SIGNATURE_BYTES, "signature")
        holders = [s.holder for s in self.shares]
        if holders != sorted(set(holders)):
            raise MessageError("the holders of a dealing are not ascending and distinct")

    @staticmethod
    def signed_bytes(seed_commitment: bytes, root: bytes, count: int, *, session: bytes, sender: int) -> bytes:
        """What the signature covers: the seed commitment, the root and the number of leaves under it."""
        fields = seed_commitment + root + count.to_bytes(4, "big")
        return signed_message("share-keys", session=session, sender=sender, fields=fields)

    def verified_bytes(self, *, session: bytes, sender: int) -> bytes:
        """What this message's signature must cover."""
        return self.signed_bytes(self.seed_commitment, self.root, len(self.shares), session=session, sender=sender)


@dataclass(frozen=True, slots=True)
class Complaint:
    """Step 2, instead of an upload: this dealer's signed ciphertext for me is bad; here is its AEAD key."""

    dealer: int
    key: bytes = field(repr=False)

    def __post_init__(self) -> None:
        _exact(self.key, AEAD_KEY_BYTES, "key")


@dataclass(frozen=True, slots=True)
class ConsistencyCheck:
    """Step 3: a signature over the three sets of a session."""

    signature: bytes

    def __post_init__(self) -> None:
        _exact(self.signature, SIGNATURE_BYTES, "signature")

    @staticmethod
    def fields(sets: SurvivorSets, size: int) -> bytes:
        """The bitmaps U1, U2 and U3, which every member's signature covers."""
        return b"".join(encode_members(members, size) for members in (sets.u1, sets.u2, sets.u3))

    @staticmethod
    def signed_over(fields: bytes, *, session: bytes, sender: int) -> bytes:
        """What one member's signature covers, for whoever looks at many of them."""
        return signed_message("consistency-check", session=session, sender=sender, fields=fields)

    @classmethod
    def signed_bytes(cls, sets: SurvivorSets, size: int, *, session: bytes, sender: int) -> bytes:
        """What the signature covers: the bitmaps U1, U2 and U3."""
        return cls.signed_over(cls.fields(sets, size), session=session, sender=sender)


@dataclass(frozen=True, slots=True)
class RevealedShare:
    """One share, opened: of b_owner, or else of mask_sk_owner. There is no field for the other one."""

    owner: int
    kind: ShareKind
    salt: bytes = field(repr=False)
    share: bytes = field(repr=False)

    def __post_init__(self) -> None:
        _exact(self.salt, SALT_BYTES, "salt")
        _exact(self.share, SHARE_BYTES, "share")


@dataclass(frozen=True, slots=True)
class Unmask:
    """Step 4: one share for every member of U2(u), ascending by owner."""

    shares: tuple[RevealedShare, ...]

    def __post_init__(self) -> None:
        owners = [s.owner for s in self.shares]
        if owners != sorted(set(owners)):
            raise MessageError("the owners of the revealed shares are not ascending and distinct")


@dataclass(frozen=True, slots=True)
class Decline:
    """The answer to a plan that a participant will not take part in."""

    code: DeclineCode
    detail: str

    def __post_init__(self) -> None:
        if len(self.detail) > MAX_DETAIL:
            raise MessageError(f"a detail has at most {MAX_DETAIL} characters")


@dataclass(frozen=True, slots=True)
class Withdraw:
    """A participant leaves a session that it had joined.

    The detail goes with `AbortReason.POLICY` alone, for the coordinator's operator; any other stays at the site.
    """

    reason: AbortReason
    detail: str = ""

    def __post_init__(self) -> None:
        if len(self.detail) > MAX_DETAIL:
            raise MessageError(f"a detail has at most {MAX_DETAIL} characters")


# --- coordinator to participant -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Proposal:
    """The opening of an attempt: the plan's bytes, the coordinator's signature over them, and the plan decoded."""

    plan_bytes: bytes
    signature: bytes
    plan: RoundPlan

    def __post_init__(self) -> None:
        _exact(self.signature, SIGNATURE_BYTES, "signature")


@dataclass(frozen=True, slots=True)
class Advertisements:
    """Step 1 opens: who completed step 0, the neighbours' keys, and on the sparse graph everyone's digests."""

    u1: Members
    advertised: tuple[tuple[int, AdvertiseKeys], ...]
    digests: tuple[bytes, ...]

    def __post_init__(self) -> None:
        indices = [index for index, _ in self.advertised]
        if indices != sorted(set(indices)):
            raise MessageError("the advertisements are not ascending and distinct")
        if self.digests and len(self.digests) != len(self.u1):
            raise MessageError("there is not one advertisement digest for each member of U1")
        for digest in self.digests:
            _exact(digest, COMMITMENT_BYTES, "advertisement digest")


@dataclass(frozen=True, slots=True)
class DeliveredShare:
    """What one dealer made for the recipient, with the proof that the dealer signed it."""

    dealer: int
    seed_commitment: bytes
    root: bytes
    holders: int
    signature: bytes
    self_commitment: bytes
    mask_commitment: bytes
    ciphertext: bytes
    proof: tuple[bytes, ...]

    def __post_init__(self) -> None:
        for name in ("seed_commitment", "root", "self_commitment", "mask_commitment"):
            _exact(getattr(self, name), COMMITMENT_BYTES, name)
        _exact(self.signature, SIGNATURE_BYTES, "signature")
        _exact(self.ciphertext, CIPHERTEXT_BYTES, "ciphertext")
        if not 0 < self.holders < 1 << 32:
            raise MessageError("the number of holders is out of range")
        if len(self.proof) > 32:
            raise MessageError("a Merkle proof has at most 32 hashes")
        for sibling in self.proof:
            _exact(sibling, COMMITMENT_BYTES, "proof")


@dataclass(frozen=True, slots=True)
class DeliveredShares:
    """Step 2 opens: who completed step 1, and the shares that the recipient's neighbours dealt to it."""

    u2: Members
    shares: tuple[DeliveredShare, ...]

    def __post_init__(self) -> None:
        dealers = [s.dealer for s in self.shares]
        if dealers != sorted(set(dealers)):
            raise MessageError("the dealers of the delivered shares are not ascending and distinct")


@dataclass(frozen=True, slots=True)
class SurvivorSets:
    """Step 3 opens: who completed steps 0, 1 and 2."""

    u1: Members
    u2: Members
    u3: Members


@dataclass(frozen=True, slots=True)
class SurvivorSignatures:
    """Step 4 opens: signatures over the sets, of holders of the recipient's secrets, ascending by index."""

    signatures: tuple[tuple[int, bytes], ...]

    def __post_init__(self) -> None:
        indices = [index for index, _ in self.signatures]
        if indices != sorted(set(indices)):
            raise MessageError("the signatures are not ascending and distinct")
        for _, signature in self.signatures:
            _exact(signature, SIGNATURE_BYTES, "signature")


@dataclass(frozen=True, slots=True)
class SessionClosed:
    """A session is over for the recipient: released, aborted, or it was dropped. `phrase` says which, generically."""

    released: bool
    phrase: str


ParticipantMessage: TypeAlias = AdvertiseKeys | ShareKeys | Complaint | ConsistencyCheck | Unmask | Decline | Withdraw
CoordinatorMessage: TypeAlias = (
    Proposal | Advertisements | DeliveredShares | SurvivorSets | SurvivorSignatures | SessionClosed
)


def advertisement_digest(message: AdvertiseKeys) -> bytes:
    """The 32 bytes by which an advertisement enters the graph seed."""
    body = message.encryption_key.raw + message.mask_key.raw + message.signature
    return hashlib.sha256(b"maskwork/v1/advertisement\0" + body).digest()
