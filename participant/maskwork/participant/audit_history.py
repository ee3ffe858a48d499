"""Does what the coordinator shows of its past go on from what this site knows of it? Pure.

Two things are compared before anything is answered: the head of the coordinator's audit chain, which must extend the
one that this site kept last, and the survivors of the round before, if this site took part in that round to its end.
A site that knows nothing yet takes what it is first shown.

It decides nothing about the plan itself (`agent`, the policy and the protocol core do) and writes nothing down
(`audit` does).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric import ec

from maskwork.audit import chain
from maskwork.audit.chain import EMPTY_HEAD, SignedHead
from maskwork.secagg.errors import DeclineCode, PlanRefused
from maskwork.secagg.plan import RoundPlan, survivors_digest
from maskwork.wire.history_codec import ShownHistory

PIECE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class FinishedRound:
    """The last round of a job in which this site helped to unmask and heard that the sum was released."""

    round_number: int
    rounds_total: int
    survivors: tuple[str, ...]


NOTHING_KEPT = SignedHead(0, EMPTY_HEAD, b"")


@dataclass(slots=True)
class Known:
    """What this site knows of the coordinator's past.

    Attributes:
        kept: the newest head kept; of size 0: none.
        heads: heads kept, by size; a coordinator may go on from an earlier one if it has not heard of the last.
        finished: by job.
    """

    kept: SignedHead = NOTHING_KEPT
    heads: dict[int, bytes] = field(default_factory=dict)
    finished: dict[str, FinishedRound] = field(default_factory=dict)


class HistoryDiffers(PlanRefused):
    """What is shown contradicts a head that this site holds: evidence, not a misunderstanding."""


def check_history(known: Known, plan: RoundPlan, shown: ShownHistory, *, key: ec.EllipticCurvePublicKey) -> None:
    """Check all but the digests, which may have to be fetched first: `check_digests` follows.

    Raises:
        PlanRefused: the head is not signed or nothing leads to it; as `HistoryDiffers`, it is not the past known here.
    """
    kept = known.kept
    if not shown.size:
        if plan.audit_head != EMPTY_HEAD:
            raise PlanRefused(DeclineCode.AUDIT, "the plan names an audit head, and nothing says of how many records")
        if kept.size:
            raise HistoryDiffers(
                DeclineCode.AUDIT, f"no audit log, where this site holds a head of {kept.size} records"
            )
        return
    signed = SignedHead(shown.size, plan.audit_head, shown.signature)
    if not chain.is_signed_by(signed, plan.federation, key):
        raise PlanRefused(DeclineCode.AUDIT, "the head of the audit log is not signed by the coordinator")
    if shown.size < kept.size:
        detail = f"an audit log of {shown.size} records, where this site holds a head of {kept.size}"
        raise HistoryDiffers(DeclineCode.AUDIT, detail)
    if shown.since not in known.heads and shown.since:
        detail = f"the audit log is shown from record {shown.since}; this site holds a head of {kept.size}"
        raise PlanRefused(DeclineCode.AUDIT, detail)


def check_digests(known: Known, plan: RoundPlan, shown: ShownHistory, pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Fold the digests shown over the head that they begin from; gives those after the kept head, piece by piece.

    Raises:
        PlanRefused: they are not as many as were announced; as `HistoryDiffers`, they lead elsewhere.
    """
    size, kept = shown.since, known.kept
    head = known.heads.get(size, EMPTY_HEAD)
    passed = size >= kept.size
    for piece in pieces:
        for following in chain.heads_from(head, size, piece):
            head, size = following, size + 1
            if size == kept.size and head != kept.head:
                raise HistoryDiffers(DeclineCode.AUDIT, _other_history(kept, plan, shown))
        yield piece if passed else piece[-(size - kept.size) * chain.DIGEST_BYTES :] if size > kept.size else b""
        passed = size >= kept.size
    if size != shown.size:
        raise PlanRefused(DeclineCode.AUDIT, "the audit log was shown incompletely")
    if head != plan.audit_head:
        raise HistoryDiffers(DeclineCode.AUDIT, _other_history(kept, plan, shown))


def check_previous_survivors(finished: Mapping[str, FinishedRound], plan: RoundPlan) -> None:
    """Compare the survivors of the round before, if this site took part in it to its end.

    A plan that counts more rounds in all says that some were taken back since: then the round before this one is not
    the one with the number before, and nothing is known of it here.

    Raises:
        HistoryDiffers: the plan names others than those whom this site helped to unmask.
    """
    last = finished.get(plan.job)
    if last is None or last.round_number != plan.round_number - 1 or last.rounds_total != plan.rounds_total:
        return
    if plan.previous_survivors != survivors_digest(last.survivors):
        detail = f"the plan's survivors of round {last.round_number} are not those whom this site helped to unmask"
        raise HistoryDiffers(DeclineCode.AUDIT, detail)


def _other_history(kept: SignedHead, plan: RoundPlan, shown: ShownHistory) -> str:
    return (
        f"the audit log shown ({shown.size} records, head {plan.audit_head.hex()[:16]}…) does not extend the one that "
        f"this site holds ({kept.size} records, head {kept.head.hex()[:16]}…)"
    )
