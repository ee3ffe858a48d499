"""Key agreement, key derivation, authenticated encryption, signatures and commitments of the protocol.

Primitives come from ``cryptography``; this module only fixes how they are composed: which label, salt, info and
associated data each use carries. Every derivation and every signature carries the session id, so nothing made in
one session means anything in another.

It does not store keys, choose peers or decide who is right; randomness is an argument (one 32-byte seed a session).

Sources: X25519 (RFC 7748), HKDF-SHA256 (RFC 5869), AES-256-GCM (NIST SP 800-38D), ECDSA P-256 with SHA-256 and
deterministic nonces (FIPS 186-5, RFC 6979), Merkle tree hashing as in RFC 9162 section 2.1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from maskwork.secagg import prg
from maskwork.secagg.sharing import SHARE_BYTES

PUBLIC_KEY_BYTES = 32
SECRET_BYTES = 32
AEAD_KEY_BYTES = 32
SALT_BYTES = 16
SIGNATURE_BYTES = 64
SESSION_SEED_BYTES = 32
COMMITMENT_BYTES = 32
SHARE_PLAINTEXT_BYTES = 2 * (SALT_BYTES + SHARE_BYTES)
CIPHERTEXT_BYTES = SHARE_PLAINTEXT_BYTES + 16
COORDINATOR_INDEX = 0xFFFF_FFFF
"""The sender index in what the coordinator signs; no roster is that long."""

_FIELD = (1 << 255) - 19
_ZERO_NONCE = bytes(12)  # each AEAD key encrypts exactly one message, so the nonce need not vary


class Segment(IntEnum):
    """The two masked vectors of an upload; each has mask keys of its own."""

    UPDATE = 0
    STATISTICS = 1


class ShareKind(IntEnum):
    """Which of its owner's two secrets a share belongs to."""

    SELF_SEED = 0
    MASK_SECRET = 1


@dataclass(frozen=True, slots=True)
class PublicKey:
    """An X25519 public key, 32 bytes as RFC 7748 encodes it.

    RFC 7748 would take every 32 bytes; here a point has one encoding, so that two keys are equal when their bytes are.
    """

    raw: bytes

    def __post_init__(self) -> None:
        if len(self.raw) != PUBLIC_KEY_BYTES:
            raise ValueError(f"an X25519 public key has {PUBLIC_KEY_BYTES} bytes, not {len(self.raw)}")
        if int.from_bytes(self.raw, "little") >= _FIELD:
            raise ValueError("an X25519 public key is not in canonical form")


@dataclass(frozen=True, slots=True)
class SecretKey:
    """An X25519 secret key; never printed."""

    raw: bytes = field(repr=False)
    # Parsed once: parsing derives the public half and costs as much as an agreement.
    _parsed: X25519PrivateKey = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.raw) != SECRET_BYTES:
            raise ValueError(f"an X25519 secret key has {SECRET_BYTES} bytes")
        object.__setattr__(self, "_parsed", X25519PrivateKey.from_private_bytes(self.raw))

    def public(self) -> PublicKey:
        """The public half."""
        return PublicKey(self._parsed.public_key().public_bytes_raw())

    def exchange(self, public: PublicKey) -> bytes:
        """The raw agreement; see `agree`."""
        return self._parsed.exchange(X25519PublicKey.from_public_bytes(public.raw))


class DegenerateKey(ValueError):
    """A public key of small order: agreeing with it gives a secret that everybody knows."""


@dataclass(frozen=True, slots=True)
class SessionSecrets:
    """Everything secret that one participant draws for one session, expanded from one seed.

    `self_seed` is the papers' b_u; `mask_secret` the X25519 key whose agreements seed the pair masks;
    `encryption_secret` the one whose agreements encrypt shares; `rounding_key` drives stochastic rounding.
    """

    encryption_secret: SecretKey
    mask_secret: SecretKey
    self_seed: bytes = field(repr=False)
    rounding_key: bytes = field(repr=False)


class Signer(Protocol):
    """Signs with a certificate's key. A port, so that the key may live in hardware."""

    def sign(self, message: bytes) -> bytes:
        """ECDSA P-256/SHA-256 over `message` as 64 bytes, r ‖ s."""
        ...


@dataclass(frozen=True, slots=True)
class SoftwareSigner:
    """A `Signer` whose private key is in memory; signatures are deterministic (RFC 6979)."""

    private_key: ec.EllipticCurvePrivateKey = field(repr=False)

    def sign(self, message: bytes) -> bytes:
        """ECDSA P-256/SHA-256 over `message` as 64 bytes, r ‖ s."""
        der = self.private_key.sign(message, ec.ECDSA(hashes.SHA256(), deterministic_signing=True))
        r, s = decode_dss_signature(der)
        return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def derive_session_secrets(seed: bytes) -> SessionSecrets:
    """Expand a session's fresh 32-byte seed. The caller forgets the seed afterwards."""
    if len(seed) != SESSION_SEED_BYTES:
        raise ValueError(f"a session seed has {SESSION_SEED_BYTES} bytes")
    return SessionSecrets(
        encryption_secret=SecretKey(_hkdf(seed, b"", b"maskwork/v1/secret/encryption\0", SECRET_BYTES)),
        mask_secret=SecretKey(_hkdf(seed, b"", b"maskwork/v1/secret/mask\0", SECRET_BYTES)),
        self_seed=_hkdf(seed, b"", b"maskwork/v1/secret/self-seed\0", SECRET_BYTES),
        rounding_key=_hkdf(seed, b"", b"maskwork/v1/secret/rounding\0", prg.KEY_BYTES),
    )


def dealing_stream_key(seed: bytes) -> bytes:
    """The key of the stream from which a dealer's polynomial coefficients and salts are read."""
    return _hkdf(seed, b"", b"maskwork/v1/secret/dealing\0", prg.KEY_BYTES)


def agree(secret: SecretKey, public: PublicKey) -> bytes:
    """X25519; 32 bytes.

    Raises:
        DegenerateKey: `public` has small order (the all-zero output of RFC 7748 section 6.1).
    """
    try:
        return secret.exchange(public)
    except ValueError as error:
        raise DegenerateKey("an X25519 public key of small order") from error


def is_degenerate(public: PublicKey) -> bool:
    """Whether `public` has small order: there are five such points in canonical form, on the curve and its twist.

    They are looked up, since an agreement for each key of each neighbour would double the key set-up of a session;
    `agree` refuses them all the same.
    """
    return public.raw in _SMALL_ORDER


def pair_mask_keys(
    secret: SecretKey, *, own: PublicKey, peer: PublicKey, own_index: int, peer_index: int, session: bytes
) -> tuple[bytes, bytes]:
    """The AES-128 keys of the pair masks between two participants, one for each `Segment`; the same from either side.

    Raises:
        DegenerateKey: `peer` has small order.
    """
    shared = agree(secret, peer)
    salt, indices = _ordered(own, peer, own_index, peer_index)
    info = b"maskwork/v1/pair-mask\0" + session + indices
    update, statistics = (_hkdf(shared, salt, info + bytes([segment]), prg.KEY_BYTES) for segment in Segment)
    return update, statistics


def self_mask_keys(self_seed: bytes, *, index: int, session: bytes) -> tuple[bytes, bytes]:
    """The AES-128 keys of a participant's self masks, PRG(b_u), one for each `Segment`."""
    info = b"maskwork/v1/self-mask\0" + session + _u32(index)
    update, statistics = (_hkdf(self_seed, b"", info + bytes([segment]), prg.KEY_BYTES) for segment in Segment)
    return update, statistics


def rotation_seed(session: bytes) -> bytes:
    """The public seed of the random signs of the rotated encoding: 32 bytes."""
    return hashlib.sha256(b"maskwork/v1/rotation\0" + session).digest()


def share_key(
    secret: SecretKey, *, own: PublicKey, peer: PublicKey, dealer: int, holder: int, own_index: int, session: bytes
) -> bytes:
    """The AES-256 key under which `dealer` encrypts to `holder`: 32 bytes, one key for each direction."""
    salt, _ = _ordered(own, peer, own_index, dealer + holder - own_index)
    info = b"maskwork/v1/share-encryption\0" + session + _u32(dealer) + _u32(holder)
    return _hkdf(agree(secret, peer), salt, info, AEAD_KEY_BYTES)


def seal(key: bytes, plaintext: bytes, *, dealer: int, holder: int, session: bytes) -> bytes:
    """AES-256-GCM under a key that is used once."""
    return AESGCM(key).encrypt(_ZERO_NONCE, plaintext, _associated_data(dealer, holder, session))


def open_sealed(key: bytes, ciphertext: bytes, *, dealer: int, holder: int, session: bytes) -> bytes | None:
    """The plaintext, or None when the ciphertext is not what was sealed under this key for these two."""
    try:
        return AESGCM(key).decrypt(_ZERO_NONCE, ciphertext, _associated_data(dealer, holder, session))
    except InvalidTag:
        return None


def seed_commitment(self_seed: bytes, *, owner: int, session: bytes) -> bytes:
    """Commitment to b_u; it needs no salt because b_u has 256 bits of entropy."""
    return hashlib.sha256(b"maskwork/v1/seed-commitment\0" + session + _u32(owner) + self_seed).digest()


def share_commitment(share: bytes, salt: bytes, *, owner: int, holder: int, kind: ShareKind, session: bytes) -> bytes:
    """Commitment to one share: SHA-256 over label, session, owner, holder, kind, salt and share."""
    body = session + _u32(owner) + _u32(holder) + bytes([kind]) + salt + share
    return hashlib.sha256(b"maskwork/v1/share-commitment\0" + body).digest()


def dealing_leaf(
    *, owner: int, holder: int, self_commitment: bytes, mask_commitment: bytes, ciphertext: bytes, session: bytes
) -> bytes:
    """The Merkle leaf that binds what `owner` dealt to `holder`: both commitments and the ciphertext."""
    body = (
        session + _u32(owner) + _u32(holder) + self_commitment + mask_commitment + hashlib.sha256(ciphertext).digest()
    )
    return hashlib.sha256(b"\x00maskwork/v1/dealing\0" + body).digest()


def merkle_tree(leaves: Sequence[bytes]) -> tuple[bytes, tuple[tuple[bytes, ...], ...]]:
    """Root over leaf hashes and, for each leaf, its sibling hashes from the bottom up.

    Split as in RFC 9162 section 2.1.1: at the largest power of two below the count.
    """
    if not leaves:
        raise ValueError("a Merkle tree has at least one leaf")
    if len(leaves) == 1:
        return leaves[0], ((),)
    split = _split(len(leaves))
    left, left_proofs = merkle_tree(leaves[:split])
    right, right_proofs = merkle_tree(leaves[split:])
    proofs = tuple((*p, right) for p in left_proofs) + tuple((*p, left) for p in right_proofs)
    return _node(left, right), proofs


def merkle_root_from_proof(leaf: bytes, position: int, count: int, proof: Sequence[bytes]) -> bytes | None:
    """The root that `proof` leads to from `leaf`, or None when the proof has not the length the tree demands."""
    if not 0 <= position < count:
        return None
    if count == 1:
        return leaf if not proof else None
    if not proof:
        return None
    split = _split(count)
    if position < split:
        left = merkle_root_from_proof(leaf, position, split, proof[:-1])
        return None if left is None else _node(left, proof[-1])
    right = merkle_root_from_proof(leaf, position - split, count - split, proof[:-1])
    return None if right is None else _node(proof[-1], right)


def signed_message(step: str, *, session: bytes, sender: int, fields: bytes) -> bytes:
    """What a signature covers: "maskwork/v1/sig/" step ‖ 0x00 ‖ session id ‖ sender index ‖ fixed-width fields."""
    return b"maskwork/v1/sig/" + step.encode("ascii") + b"\0" + session + _u32(sender) + fields


def verify_signature(public_key: ec.EllipticCurvePublicKey, signature: bytes, message: bytes) -> bool:
    """Whether `signature` (64 bytes, r ‖ s) over `message` was made with `public_key`'s private half."""
    if len(signature) != SIGNATURE_BYTES:
        return False
    der = encode_dss_signature(int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big"))
    try:
        public_key.verify(der, message, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


# Order 2 (0), order 4 (1, and -1 on the twist), order 8; Bernstein, "Curve25519: new Diffie-Hellman speed records", and
# the list on the curve's page.
_SMALL_ORDER = frozenset(
    u.to_bytes(PUBLIC_KEY_BYTES, "little")
    for u in (
        0,
        1,
        _FIELD - 1,
        325606250916557431795983626356110631294008115727848805560023387167927233504,
        39382357235489614581723060781553021112529911719440698176882885853963445705823,
    )
)


def _hkdf(key_material: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    return HKDF(algorithm=hashes.SHA256(), length=length, salt=salt or None, info=info).derive(key_material)


def _ordered(own: PublicKey, peer: PublicKey, own_index: int, peer_index: int) -> tuple[bytes, bytes]:
    if own_index < peer_index:
        return own.raw + peer.raw, _u32(own_index) + _u32(peer_index)
    return peer.raw + own.raw, _u32(peer_index) + _u32(own_index)


def _associated_data(dealer: int, holder: int, session: bytes) -> bytes:
    return b"maskwork/v1/share-encryption\0" + session + _u32(dealer) + _u32(holder)


def _u32(value: int) -> bytes:
    return value.to_bytes(4, "big")


def _split(count: int) -> int:
    return 1 << ((count - 1).bit_length() - 1)


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()
