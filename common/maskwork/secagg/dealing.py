"""Dealing: one participant's two secrets, cut into committed and encrypted shares, and the checks on what was dealt.

Both halves use it: the participant to deal and to check what it was dealt, the coordinator to check a dealing's
structure and to judge a complaint by the very function with which the accuser judged it. It decides nothing about
blame; `client` and `server` do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from maskwork.secagg import prg
from maskwork.secagg.keys import (
    SALT_BYTES,
    PublicKey,
    SessionSecrets,
    ShareKind,
    Signer,
    dealing_leaf,
    merkle_tree,
    seal,
    seed_commitment,
    share_commitment,
    share_key,
)
from maskwork.secagg.messages import DealtShare, RevealedShare, ShareKeys
from maskwork.secagg.sharing import PRIME, SHARE_BYTES, coefficient_bytes, split

_ONE = SALT_BYTES + SHARE_BYTES


@dataclass(frozen=True, slots=True)
class HeldShares:
    """One holder's opened shares of one owner's two secrets. At most one of the two ever leaves the holder."""

    self_salt: bytes = field(repr=False)
    self_share: bytes = field(repr=False)
    mask_salt: bytes = field(repr=False)
    mask_share: bytes = field(repr=False)

    def encode(self) -> bytes:
        """98 bytes: salt ‖ share of b_u, salt ‖ share of mask_sk_u."""
        return self.self_salt + self.self_share + self.mask_salt + self.mask_share

    def reveal(self, owner: int, kind: ShareKind) -> RevealedShare:
        """The share of one kind, as step 4 sends it."""
        if kind is ShareKind.SELF_SEED:
            return RevealedShare(owner, kind, self.self_salt, self.self_share)
        return RevealedShare(owner, kind, self.mask_salt, self.mask_share)


@dataclass(frozen=True, slots=True)
class Dealer:
    """Who deals, in which session."""

    index: int
    session: bytes
    threshold: int
    encryption_key: PublicKey
    mask_key: PublicKey


def deal(
    dealer: Dealer,
    secrets: SessionSecrets,
    *,
    holders: Sequence[int],
    encryption_keys: Mapping[int, PublicKey],
    stream_key: bytes,
    signer: Signer,
) -> tuple[ShareKeys, HeldShares | None]:
    """Share b_u and mask_sk_u among `holders` (roster indices, ascending); sign the whole.

    Args:
        dealer: who deals.
        secrets: the session's secrets.
        holders: everyone who gets a share; may include the dealer itself, whose share is kept, not sent.
        encryption_keys: X25519 key of each holder but the dealer.
        stream_key: 16 bytes; coefficients and salts are read from its keystream.
        signer: the certificate's key.

    Returns:
        The message, and the dealer's own shares when it is among the holders.
    """
    half = coefficient_bytes(dealer.threshold)
    stream = prg.keystream(stream_key, 0, 2 * half + 2 * SALT_BYTES * len(holders))
    points = [h + 1 for h in holders]
    self_shares = split(secrets.self_seed, holders=points, threshold=dealer.threshold, rand=stream[:half])
    mask_shares = split(
        secrets.mask_secret.raw, holders=points, threshold=dealer.threshold, rand=stream[half : 2 * half]
    )
    salts = [stream[i : i + SALT_BYTES] for i in range(2 * half, len(stream), SALT_BYTES)]
    own: HeldShares | None = None
    dealt = []
    for position, holder in enumerate(holders):
        held = HeldShares(salts[2 * position], self_shares[position], salts[2 * position + 1], mask_shares[position])
        if holder == dealer.index:
            own = held
            ciphertext = b""
        else:
            key = share_key(
                secrets.encryption_secret,
                own=dealer.encryption_key,
                peer=encryption_keys[holder],
                dealer=dealer.index,
                holder=holder,
                own_index=dealer.index,
                session=dealer.session,
            )
            ciphertext = seal(key, held.encode(), dealer=dealer.index, holder=holder, session=dealer.session)
        commitments = _commitments(held, owner=dealer.index, holder=holder, session=dealer.session)
        dealt.append(DealtShare(holder, ciphertext, *commitments))
    return _sign(dealer, secrets, tuple(dealt), signer), own


def leaves(shares: Sequence[DealtShare], *, owner: int, session: bytes) -> list[bytes]:
    """The Merkle leaves of a dealing, in the order of its holders."""
    return [
        dealing_leaf(
            owner=owner,
            holder=s.holder,
            self_commitment=s.self_commitment,
            mask_commitment=s.mask_commitment,
            ciphertext=s.ciphertext,
            session=session,
        )
        for s in shares
    ]


def open_held(
    plaintext: bytes | None, *, self_commitment: bytes, mask_commitment: bytes, owner: int, holder: int, session: bytes
) -> HeldShares | None:
    """The shares in a decrypted dealing, or None when they are not what the dealer's commitments say.

    A share that is no canonical field element is refused too, so that whatever passes can be combined.
    """
    if plaintext is None or len(plaintext) != 2 * _ONE:
        return None
    held = HeldShares(
        plaintext[:SALT_BYTES],
        plaintext[SALT_BYTES:_ONE],
        plaintext[_ONE : _ONE + SALT_BYTES],
        plaintext[_ONE + SALT_BYTES :],
    )
    if any(int.from_bytes(share, "big") >= PRIME for share in (held.self_share, held.mask_share)):
        return None
    if _commitments(held, owner=owner, holder=holder, session=session) != (self_commitment, mask_commitment):
        return None
    return held


def revealed_matches(revealed: RevealedShare, commitment: bytes, *, holder: int, session: bytes) -> bool:
    """Whether a share opened at step 4 is the one its dealer committed to."""
    made = share_commitment(
        revealed.share, revealed.salt, owner=revealed.owner, holder=holder, kind=revealed.kind, session=session
    )
    return made == commitment


def _commitments(held: HeldShares, *, owner: int, holder: int, session: bytes) -> tuple[bytes, bytes]:
    return (
        share_commitment(
            held.self_share, held.self_salt, owner=owner, holder=holder, kind=ShareKind.SELF_SEED, session=session
        ),
        share_commitment(
            held.mask_share, held.mask_salt, owner=owner, holder=holder, kind=ShareKind.MASK_SECRET, session=session
        ),
    )


def _sign(dealer: Dealer, secrets: SessionSecrets, shares: tuple[DealtShare, ...], signer: Signer) -> ShareKeys:
    root, _ = merkle_tree(leaves(shares, owner=dealer.index, session=dealer.session))
    commitment = seed_commitment(secrets.self_seed, owner=dealer.index, session=dealer.session)
    message = ShareKeys.signed_bytes(commitment, root, len(shares), session=dealer.session, sender=dealer.index)
    return ShareKeys(commitment, root, shares, signer.sign(message))
