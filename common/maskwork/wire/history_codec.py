"""The coordinator's audit chain as it is shown with a plan: from the head that a site keeps to the one the plan names.

Digests of records alone: 32 bytes each, inline up to `MAX_INLINE`, else fetched by the digest of them all. Whether they
lead where they should is the site's to check (`maskwork.participant.audit_history`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from maskwork.audit.chain import DIGEST_BYTES
from maskwork.wire.errors import WireError
from maskwork.wire.v1 import session_pb2

MAX_INLINE = 1 << 20
"""Bytes of digests that travel with the offer itself: 32,768 records."""
MAX_RECORDS = 1 << 32
_SIGNATURE_BYTES = 64


@dataclass(frozen=True, slots=True)
class ShownHistory:
    """What a coordinator shows of its chain.

    Attributes:
        size: records under the plan's `audit_head`; 0: it keeps no log.
        signature: over that head, by the key that signs plans; empty if there is no log.
        since: records under the head that the participant said it keeps.
        digests: of the records from `since` on; empty if they are to be fetched.
        digests_digest: SHA-256 of those digests, if they are to be fetched.
    """

    size: int = 0
    signature: bytes = b""
    since: int = 0
    digests: bytes = field(default=b"", repr=False)
    digests_digest: bytes = b""

    @property
    def tail_bytes(self) -> int:
        """How many bytes the digests have, wherever they are."""
        return (self.size - self.since) * DIGEST_BYTES


NO_HISTORY = ShownHistory()
"""Of a coordinator that keeps no log."""


def encode_history(history: ShownHistory) -> session_pb2.ShownHistory:
    """As it goes with an offer."""
    return session_pb2.ShownHistory(
        size=history.size,
        signature=history.signature,
        since=history.since,
        digests=history.digests,
        digests_digest=history.digests_digest,
    )


def decode_history(message: session_pb2.ShownHistory) -> ShownHistory:
    """The inverse.

    Raises:
        WireError: sizes and lengths contradict each other.
    """
    shown = ShownHistory(message.size, message.signature, message.since, message.digests, message.digests_digest)
    if not shown.since <= shown.size <= MAX_RECORDS:
        raise WireError("a history that ends before it begins, or is longer than any")
    if len(shown.signature) != (_SIGNATURE_BYTES if shown.size else 0):
        raise WireError("a history whose head is not signed, or a signature of no head")
    inline = not shown.digests_digest
    if len(shown.digests) != (shown.tail_bytes if inline else 0) or len(shown.digests) > MAX_INLINE:
        raise WireError("a history with more or fewer digests than records")
    if not inline and (len(shown.digests_digest) != DIGEST_BYTES or not shown.tail_bytes):
        raise WireError("a history to be fetched by something that is no digest")
    return shown
