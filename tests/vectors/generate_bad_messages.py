"""Writes tests/vectors/v1/bad_messages.json: messages that must be refused, each with the step and the reason.

Every case starts from the published transcript (transcript.json): `member` is in the state named, or the coordinator
is, as it was just before the honest message; the bytes under `wire` come instead of it. `fails_at` is "decode" when no
message may come of the bytes, else the step whose check refuses it; `reason` is the enumerated reason, `because` a part
of the detail. Where a peer lies it has signed its lie.

Run ``python -m tests.vectors.generate_bad_messages``: it compares, and with ``--rewrite`` writes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from tests.secagg.cohort import signer
from tests.vectors.generate_transcript import Case, N, session

from maskwork.secagg import keys
from maskwork.secagg.client_states import AdvertisedKeys, SharedKeys, SignedSets, Uploading
from maskwork.secagg.dealing import leaves
from maskwork.secagg.errors import AbortReason, DropReason
from maskwork.secagg.keys import PublicKey, ShareKind
from maskwork.secagg.messages import (
    AdvertiseKeys,
    Advertisements,
    Complaint,
    ConsistencyCheck,
    DealtShare,
    DeliveredShares,
    ParticipantMessage,
    ShareKeys,
    SurvivorSets,
    SurvivorSignatures,
    Unmask,
)
from maskwork.secagg.server_states import (
    CollectingKeys,
    CollectingShares,
    CollectingSignatures,
    CollectingUnmask,
    CollectingUpdates,
)
from maskwork.wire.codec import encode_request, encode_response
from maskwork.wire.v1 import federation_pb2, session_pb2

PATH = Path(__file__).parent / "v1" / "bad_messages.json"
OWN, LIAR = 0, 4
SMALL_ORDER = PublicKey(bytes(32))
T = TypeVar("T")


def heard(kind: type[T]) -> T:
    """What the coordinator honestly sent to OWN."""
    return session()[0].members[OWN].message(kind)


def said(kind: type[T]) -> T:
    """What LIAR would have sent had it been honest."""
    return session()[0].members[LIAR].answer(kind)


def to_participant(
    name: str,
    state: type,
    message: Advertisements | DeliveredShares | SurvivorSets | SurvivorSignatures,
    *,
    step: int,
    reason: AbortReason,
    because: str,
) -> Case:
    """A message that OWN refuses."""
    wire = encode_response(session()[0].id, message, N).SerializeToString(deterministic=True)
    return {
        "name": name,
        "receiver": "participant",
        "member": OWN,
        "state": state.__name__,
        "wire": wire.hex(),
        "fails_at": f"step {step}",
        "reason": reason.value,
        "because": because,
    }


def to_coordinator(
    name: str,
    state: type,
    message: ParticipantMessage,
    *,
    step: int,
    reason: DropReason | AbortReason,
    because: str,
) -> Case:
    """A message for which the coordinator drops LIAR, or ends the session."""
    wire = encode_request(session()[0].id, message).SerializeToString(deterministic=True)
    return {
        "name": name,
        "receiver": "coordinator",
        "member": LIAR,
        "state": state.__name__,
        "wire": wire.hex(),
        "fails_at": f"step {step}",
        "reason": reason.value,
        "because": because,
    }


def undecodable(name: str, receiver: str, wire: bytes, because: str) -> Case:
    """Bytes of which no message comes."""
    return {"name": name, "receiver": receiver, "wire": wire.hex(), "fails_at": "decode", "because": because}


# --- to a participant -----------------------------------------------------------------------------------------------


def step_1() -> Iterator[Case]:
    message, run = heard(Advertisements), session()[0]
    theirs = dict(message.advertised)[LIAR]

    def instead(advertisement: AdvertiseKeys) -> Advertisements:
        return replace(message, advertised=(*message.advertised[:-1], (LIAR, advertisement)))

    def signed(encryption_key: PublicKey, mask_key: PublicKey) -> AdvertiseKeys:
        body = AdvertiseKeys.signed_bytes(encryption_key, mask_key, session=run.id, sender=LIAR)
        return AdvertiseKeys(encryption_key, mask_key, signer(LIAR).sign(body))

    copied = message.advertised[0][1].mask_key
    cases: list[tuple[str, Advertisements, AbortReason, str]] = [
        (
            "U1 without its receiver",
            replace(message, u1=message.u1 - {OWN}),
            AbortReason.BAD_SETS,
            "leaves this participant out",
        ),
        (
            "a neighbour left out",
            replace(message, advertised=message.advertised[1:]),
            AbortReason.WRONG_NEIGHBOURS,
            "not those of the graph",
        ),
        (
            "a key substituted by the relay",
            instead(replace(theirs, mask_key=copied)),
            AbortReason.BAD_PEER_SIGNATURE,
            "not signed by it",
        ),
        (
            "a key of another member, signed",
            instead(signed(theirs.encryption_key, copied)),
            AbortReason.REPEATED_KEY,
            "equal",
        ),
        (
            "a key of small order, signed",
            instead(signed(theirs.encryption_key, SMALL_ORDER)),
            AbortReason.DEGENERATE_KEY,
            "small order",
        ),
    ]
    for name, lie, reason, because in cases:
        yield to_participant(name, AdvertisedKeys, lie, step=1, reason=reason, because=because)


def step_2() -> Iterator[Case]:
    message = heard(DeliveredShares)
    share = message.shares[-1]
    flipped = share.ciphertext[:-1] + bytes([share.ciphertext[-1] ^ 1])
    cases: list[tuple[str, DeliveredShares, AbortReason, str]] = [
        (
            "U2 with a member that dealt nothing",
            replace(message, u2=message.u2 | {1}),
            AbortReason.BAD_SETS,
            "not those of the neighbours in U2",
        ),
        (
            "a share withheld",
            replace(message, shares=message.shares[:-1]),
            AbortReason.BAD_SETS,
            "not those of the neighbours in U2",
        ),
        (
            "too few share holders",
            replace(message, u2=frozenset({0, 4}), shares=(share,)),
            AbortReason.TOO_FEW_PARTICIPANTS,
            "fewer than t",
        ),
        (
            "a ciphertext with one bit flipped",
            replace(message, shares=(*message.shares[:-1], replace(share, ciphertext=flipped))),
            AbortReason.BAD_COMMITMENT_PROOF,
            "not under its signed root",
        ),
        (
            "a root that the dealer did not sign",
            replace(message, shares=(*message.shares[:-1], replace(share, root=bytes(32)))),
            AbortReason.BAD_PEER_SIGNATURE,
            "not signed by it",
        ),
    ]
    for name, lie, reason, because in cases:
        yield to_participant(name, SharedKeys, lie, step=2, reason=reason, because=because)


def steps_3_and_4() -> Iterator[Case]:
    sets, signatures, run = heard(SurvivorSets), heard(SurvivorSignatures), session()[0]
    other = replace(sets, u3=sets.u2)
    body = ConsistencyCheck.signed_bytes(other, N, session=run.id, sender=LIAR)
    split = SurvivorSignatures((*signatures.signatures[:-1], (LIAR, signer(LIAR).sign(body))))
    for name, lie, reason, because in (
        ("another U2", replace(sets, u2=sets.u1), AbortReason.EQUIVOCATION, "not what was delivered before"),
        ("U3 beyond U2", replace(sets, u3=sets.u1), AbortReason.BAD_SETS, "U3 is not within U2"),
        ("U3 without its receiver", replace(sets, u3=frozenset({2, 3, 4})), AbortReason.BAD_SETS, "U3 leaves"),
        ("U3 too small", replace(sets, u3=frozenset({0, 4})), AbortReason.TOO_FEW_PARTICIPANTS, "fewer than 3"),
    ):
        yield to_participant(name, Uploading, lie, step=3, reason=reason, because=because)
    for name, told, reason, because in (
        ("a signature over another U3", split, AbortReason.BAD_PEER_SIGNATURE, "did not sign these survivors"),
        (
            "too few signatures",
            SurvivorSignatures(signatures.signatures[1:]),
            AbortReason.TOO_FEW_SIGNATURES,
            "2 signatures are fewer than t = 3",
        ),
        (
            "a signature of a member that is not in U3",
            SurvivorSignatures(tuple(sorted((*signatures.signatures, (3, bytes(64)))))),
            AbortReason.BAD_SETS,
            "no surviving holder",
        ),
    ):
        yield to_participant(name, SignedSets, told, step=4, reason=reason, because=because)


# --- to the coordinator ---------------------------------------------------------------------------------------------


def dealings() -> Iterator[Case]:
    message, run = said(ShareKeys), session()[0]

    def signed(shares: tuple[DealtShare, ...], root: bytes | None = None) -> ShareKeys:
        made = root or keys.merkle_tree(leaves(shares, owner=LIAR, session=run.id))[0]
        body = ShareKeys.signed_bytes(message.seed_commitment, made, len(shares), session=run.id, sender=LIAR)
        return ShareKeys(message.seed_commitment, made, shares, signer(LIAR).sign(body))

    unencrypted = (replace(message.shares[0], ciphertext=b""), *message.shares[1:])
    for name, lie, reason, because in (
        ("a holder left out", signed(message.shares[1:]), DropReason.WRONG_RECIPIENTS, "not those of the graph"),
        ("a ciphertext missing", signed(unencrypted), DropReason.WRONG_RECIPIENTS, "a ciphertext is missing"),
        ("a wrong root", signed(message.shares, b"\1" * 32), DropReason.WRONG_COMMITMENTS, "not that of the dealing"),
        (
            "another seed commitment than signed",
            replace(message, seed_commitment=bytes(32)),
            DropReason.BAD_SIGNATURE,
            "the dealing is not signed",
        ),
    ):
        yield to_coordinator(name, CollectingShares, lie, step=1, reason=reason, because=because)


def answers() -> Iterator[Case]:
    run = session()[0]
    advertised, unmask = said(AdvertiseKeys), said(Unmask)
    unsigned = replace(advertised, mask_key=dict(heard(Advertisements).advertised)[2].mask_key)
    yield to_coordinator(
        "keys that were not signed",
        CollectingKeys,
        unsigned,
        step=0,
        reason=DropReason.BAD_SIGNATURE,
        because="not signed with the sender's certificate",
    )
    yield to_coordinator(
        "a complaint with a key that opens nothing",
        CollectingUpdates,
        Complaint(2, bytes(32)),
        step=2,
        reason=AbortReason.COMPLAINT_DISPUTED,
        because="one of them lies",
    )
    other = replace(heard(SurvivorSets), u3=heard(SurvivorSets).u2)
    body = ConsistencyCheck.signed_bytes(other, N, session=run.id, sender=LIAR)
    yield to_coordinator(
        "a signature over another U3",
        CollectingSignatures,
        ConsistencyCheck(signer(LIAR).sign(body)),
        step=3,
        reason=DropReason.BAD_SIGNATURE,
        because="not over the survivor sets",
    )
    swapped = run.members[LIAR].before(SignedSets).held[0].reveal(0, ShareKind.MASK_SECRET)
    garbled = replace(unmask.shares[0], share=bytes(33))
    for name, share, reason, because in (
        ("the share of the other secret", swapped, DropReason.WRONG_SHARES, "where SELF_SEED was asked for"),
        ("a forged share", garbled, DropReason.SHARE_MISMATCH, "not the one its dealer committed to"),
    ):
        lie = Unmask((share, *unmask.shares[1:]))
        yield to_coordinator(name, CollectingUnmask, lie, step=4, reason=reason, because=because)


# --- bytes of which no message comes --------------------------------------------------------------------------------


def malformed() -> Iterator[Case]:
    run = session()[0]
    sets = session_pb2.SurvivorSets(u1=b"\xff", u2=b"\x1d", u3=b"\x15")
    wire = federation_pb2.ConnectResponse(session_id=run.id, survivor_sets=sets).SerializeToString(deterministic=True)
    yield undecodable("a bitmap with a member beyond the roster", "participant", wire, "beyond the roster")
    sets = session_pb2.SurvivorSets(u1=b"\x1f\x00", u2=b"\x1d", u3=b"\x15")
    wire = federation_pb2.ConnectResponse(session_id=run.id, survivor_sets=sets).SerializeToString(deterministic=True)
    yield undecodable("a bitmap that is too long", "participant", wire, "has 1 bytes, not 2")
    good = encode_request(run.id, said(AdvertiseKeys))
    good.advertise_keys.signature = good.advertise_keys.signature[:-1]
    yield undecodable("a signature of 63 bytes", "coordinator", good.SerializeToString(deterministic=True), "63 bytes")
    good = encode_request(run.id, said(AdvertiseKeys))
    good.advertise_keys.mask_key = b"\xff" * 32
    yield undecodable(
        "a point with two encodings", "coordinator", good.SerializeToString(deterministic=True), "canonical"
    )
    good = encode_request(run.id, said(ShareKeys))
    good.share_keys.shares.append(good.share_keys.shares[0])
    yield undecodable(
        "a holder twice", "coordinator", good.SerializeToString(deterministic=True), "ascending and distinct"
    )
    good = encode_request(run.id, said(Unmask))
    good.unmask.shares[0].ClearField("self_seed")
    yield undecodable("a share of neither secret", "coordinator", good.SerializeToString(deterministic=True), "neither")
    empty = federation_pb2.ConnectRequest(session_id=run.id).SerializeToString(deterministic=True)
    yield undecodable("no message at all", "coordinator", empty, "no known kind")
    plan = run.proposal.plan_bytes
    yield undecodable("a plan with an unknown field", "plan", plan + b"\xf8\x07\x01", "canonical form")
    yield undecodable("a plan with a field written twice", "plan", plan[:2] + plan, "canonical form")
    yield undecodable("a plan cut short", "plan", plan[:-1], "not a valid plan")


def document() -> str:
    """The text of the file."""
    cases = [*step_1(), *step_2(), *steps_3_and_4(), *dealings(), *answers(), *malformed()]
    return json.dumps(cases, indent=1) + "\n"


def main() -> int:
    """Compares, or with ``--rewrite`` writes."""
    if "--rewrite" in sys.argv[1:]:
        PATH.write_text(document(), encoding="utf-8")
        return 0
    if PATH.read_text(encoding="utf-8") == document():
        return 0
    print(f"{PATH} differs from what this code computes; --rewrite writes it anew")
    return 1


if __name__ == "__main__":
    sys.exit(main())
