"""Writes tests/vectors/v1/transcript.json: one whole session of five, every key, share and byte of it.

Member 1 drops out before step 1 (it is in U1, not in U2), member 3 before its upload (in U2, not in U3), so that both
kinds of secret are reconstructed: b_u of members 0, 2 and 4, mask_sk of member 3. t = 3, c = 0.

Run ``python -m tests.vectors.generate_transcript``: it compares, and with ``--rewrite`` writes. Bytes are hexadecimal,
vectors of floats little-endian float32, ring elements and shares of secrets as the wire has them. Certificates are
stand-ins (any bytes; the fingerprint is their SHA-256): chains are not part of the protocol's arithmetic.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.serialization import Encoding as KeyEncoding
from cryptography.hazmat.primitives.serialization import PublicFormat
from tests.secagg.cohort import (
    COORDINATOR_SCALAR,
    certificate_of,
    make_plan,
    name_of,
    private_key,
    session_seed,
    statistics_of,
    update_of,
    weight_of,
)
from tests.secagg.harness import Federation, Member

from maskwork.secagg import keys, masking, prg
from maskwork.secagg.client_states import AdvertisedKeys, MaskUpdate, SharedKeys, UploadUpdate
from maskwork.secagg.dealing import HeldShares, open_held
from maskwork.secagg.encoding import Encoding, Rotation, decode_statistics, encode_statistics, encode_update
from maskwork.secagg.keys import SALT_BYTES, SecretKey, Segment, SessionSecrets, ShareKind
from maskwork.secagg.messages import (
    AdvertiseKeys,
    ConsistencyCheck,
    CoordinatorMessage,
    ParticipantMessage,
    Proposal,
    ShareKeys,
)
from maskwork.secagg.prg import SignedKey
from maskwork.secagg.ring import UInt32Array, UInt64Array, reduce_in_place
from maskwork.secagg.server_states import CollectingSignatures, CollectingUpdates, RemoveMasks
from maskwork.secagg.sharing import COEFFICIENT_BYTES, PRIME, coefficient_bytes
from maskwork.secagg.unmasking import remaining_masks
from maskwork.wire.codec import OpenSession, encode_certificates, encode_request, encode_response

Value = str | int | float | bool | Sequence["Value"] | Mapping[str, "Value"]
Case = dict[str, Value]

PATH = Path(__file__).parent / "v1" / "transcript.json"
N, SEED, THRESHOLD = 5, 5, 3
TRAINING_CONFIG = b"{}"


@lru_cache(maxsize=1)
def session() -> tuple[Federation, list[Case]]:
    """The run, and every message of it in the order in which it was sent."""
    wire: list[Case] = []
    plan = make_plan(
        N,
        threshold=THRESHOLD,
        parameters=16,
        encoding=Encoding(1.0, 100, 16, 19, Rotation.NONE),
        training_digest=hashlib.sha256(TRAINING_CONFIG).digest(),
    )

    def up(sender: int, message: ParticipantMessage) -> Sequence[ParticipantMessage]:
        wire.append(_on_the_wire(sender, "to the coordinator", message))
        return (message,)

    def down(recipient: int, message: CoordinatorMessage) -> Sequence[CoordinatorMessage]:
        wire.append(_on_the_wire(recipient, "from the coordinator", message))
        return (message,)

    run = Federation(plan, seed=SEED, uplink=up, downlink=down, dies_before={1: ShareKeys, 3: UploadUpdate})
    run.run().assert_exact()
    for case in wire:  # only now is the session known
        message = case.pop("message")
        case["wire"] = _encoded(run, message).hex()  # type: ignore[arg-type]  # put there below
    return run, wire


def _on_the_wire(member: int, way: str, message: ParticipantMessage | CoordinatorMessage) -> Case:
    return {"member": member, "way": way, "kind": type(message).__name__, "message": message}  # type: ignore[dict-item]


def _encoded(run: Federation, message: ParticipantMessage | CoordinatorMessage) -> bytes:
    match message:
        case Proposal():
            bundle = encode_certificates(certificate_of(i) for i in range(N))
            opened = OpenSession(message, TRAINING_CONFIG, 0, hashlib.sha256(bundle).digest(), len(bundle))
            return encode_response(run.id, opened, N).SerializeToString(deterministic=True)
        case AdvertiseKeys() | ShareKeys() | ConsistencyCheck():
            return encode_request(run.id, message).SerializeToString(deterministic=True)
        case _ if type(message).__name__ in ("Unmask", "Withdraw", "Complaint", "Decline"):
            return encode_request(run.id, message).SerializeToString(deterministic=True)  # type: ignore[arg-type]
        case _:
            return encode_response(run.id, message, N).SerializeToString(deterministic=True)  # type: ignore[arg-type]


# --- what each member makes -----------------------------------------------------------------------------------------


def member_case(run: Federation, member: Member) -> Case:
    """All that one member knows, draws and derives."""
    index = member.index
    seed = session_seed(index, SEED)
    secrets = keys.derive_session_secrets(seed)
    point = private_key(1_000 + index).public_key()
    case: Case = {
        "index": index,
        "name": name_of(index),
        "certificate": certificate_of(index).hex(),
        "fingerprint": run.plan.roster[index].fingerprint.hex(),
        "signing_scalar": 1_000 + index,
        "signing_point": point.public_bytes(KeyEncoding.X962, PublicFormat.UncompressedPoint).hex(),
        "session_seed": seed.hex(),
        "encryption_secret": secrets.encryption_secret.raw.hex(),
        "encryption_key": secrets.encryption_secret.public().raw.hex(),
        "mask_secret": secrets.mask_secret.raw.hex(),
        "mask_key": secrets.mask_secret.public().raw.hex(),
        "self_seed": secrets.self_seed.hex(),
        "rounding_key": secrets.rounding_key.hex(),
        "dealing_stream_key": keys.dealing_stream_key(seed).hex(),
        "step_0": advertised_case(run, member),
    }
    if member.answers(ShareKeys):
        case["step_1"] = dealing_case(run, member, secrets)
        case["masks"] = masks_case(run, member, secrets)
    if index in run.survivors:
        case["step_2"] = upload_case(run, member)
        case["step_3"] = signature_case(run, member)
    return case


def advertised_case(run: Federation, member: Member) -> Case:
    sent = member.before(AdvertisedKeys).sent
    signed = sent.verified_bytes(session=run.id, sender=member.index)
    return {"signed_bytes": signed.hex(), "signature": sent.signature.hex()}


def dealing_case(run: Federation, member: Member, secrets: SessionSecrets) -> Case:
    """Step 1: both polynomials, and for each holder salts, shares, commitments, key, ciphertext, leaf and proof."""
    message, half = member.answer(ShareKeys), coefficient_bytes(THRESHOLD)
    stream_key = keys.dealing_stream_key(session_seed(member.index, SEED))
    stream = prg.keystream(stream_key, 0, 2 * half)
    drawn = [stream[i : i + COEFFICIENT_BYTES] for i in range(0, len(stream), COEFFICIENT_BYTES)]
    numbers = [f"{int.from_bytes(d, 'big') % PRIME:066x}" for d in drawn]
    leaves = [leaf_of(run, member.index, position) for position in range(len(message.shares))]
    _, proofs = keys.merkle_tree(leaves)
    return {
        "self_seed_coefficients": numbers[: THRESHOLD - 1],
        "mask_secret_coefficients": numbers[THRESHOLD - 1 :],
        "seed_commitment": message.seed_commitment.hex(),
        "holders": [
            {**share_case(run, member, secrets, position), "leaf": leaf.hex(), "proof": [p.hex() for p in proof]}
            for position, (leaf, proof) in enumerate(zip(leaves, proofs, strict=True))
        ],
        "root": message.root.hex(),
        "signed_bytes": message.verified_bytes(session=run.id, sender=member.index).hex(),
        "signature": message.signature.hex(),
    }


def leaf_of(run: Federation, dealer: int, position: int) -> bytes:
    share = run.members[dealer].answer(ShareKeys).shares[position]
    return keys.dealing_leaf(
        owner=dealer,
        holder=share.holder,
        self_commitment=share.self_commitment,
        mask_commitment=share.mask_commitment,
        ciphertext=share.ciphertext,
        session=run.id,
    )


def share_case(run: Federation, member: Member, secrets: SessionSecrets, position: int) -> Case:
    dealer, dealt = member.index, member.answer(ShareKeys).shares[position]
    state = member.before(SharedKeys)
    case: Case = {"holder": dealt.holder, "x": dealt.holder + 1}
    held: HeldShares | None
    if dealt.holder == dealer:
        held = state.own_shares
    else:
        peer = state.peers[dealt.holder]
        agreed = keys.agree(secrets.encryption_secret, peer.encryption_key)
        key = keys.share_key(
            secrets.encryption_secret,
            own=secrets.encryption_secret.public(),
            peer=peer.encryption_key,
            dealer=dealer,
            holder=dealt.holder,
            own_index=dealer,
            session=run.id,
        )
        case |= {"agreed": agreed.hex(), "key": key.hex()}
        plaintext = keys.open_sealed(key, dealt.ciphertext, dealer=dealer, holder=dealt.holder, session=run.id)
        held = open_held(
            plaintext,
            self_commitment=dealt.self_commitment,
            mask_commitment=dealt.mask_commitment,
            owner=dealer,
            holder=dealt.holder,
            session=run.id,
        )
    assert held is not None
    encoded = held.encode()
    one = len(encoded) // 2
    return {
        **case,
        "self_salt": encoded[:SALT_BYTES].hex(),
        "self_share": encoded[SALT_BYTES:one].hex(),
        "mask_salt": encoded[one : one + SALT_BYTES].hex(),
        "mask_share": encoded[one + SALT_BYTES :].hex(),
        "self_commitment": dealt.self_commitment.hex(),
        "mask_commitment": dealt.mask_commitment.hex(),
        "ciphertext": dealt.ciphertext.hex(),
    }


def masks_case(run: Federation, member: Member, secrets: SessionSecrets) -> Case:
    """The self mask and one pair mask for each other member of U2, with their signs in this member's upload."""
    own = keys.self_mask_keys(secrets.self_seed, index=member.index, session=run.id)
    pairs: list[Case] = []
    for peer in sorted(set(run.seen(CollectingUpdates).dealings) - {member.index}):
        theirs = keys.derive_session_secrets(session_seed(peer, SEED)).mask_secret.public()
        made = keys.pair_mask_keys(
            secrets.mask_secret,
            own=secrets.mask_secret.public(),
            peer=theirs,
            own_index=member.index,
            peer_index=peer,
            session=run.id,
        )
        pairs.append(
            {
                "peer": peer,
                "agreed": keys.agree(secrets.mask_secret, theirs).hex(),
                **_segments(made),
                "negative": member.index > peer,
            }
        )
    return {"self": _segments(own), "pairs": pairs}


def _segments(pair: tuple[bytes, bytes]) -> Case:
    return {segment.name.lower(): pair[segment].hex() for segment in Segment}


def upload_case(run: Federation, member: Member) -> Case:
    """Step 2: what was trained, its integers, its masked bytes."""
    plan, index = run.plan, member.index
    made = next(e for e in member.effects if isinstance(e, MaskUpdate)).keys
    integers = np.zeros(plan.parameters, np.int32)
    encode_update(
        update_of(index, plan.parameters),
        weight_of(index),
        encoding=plan.encoding,
        rotation_seed=keys.rotation_seed(run.id),
        rounding_key=made.rounding_key,
        out_i32=integers,
    )
    encoded = encode_statistics(
        statistics_of(index), [s.bound for s in plan.statistics], [s.name for s in plan.statistics]
    )
    assert member.upload is not None
    return {
        "update": update_of(index, plan.parameters).astype("<f4").tobytes().hex(),
        "weight": weight_of(index),
        "encoded_update": integers.tolist(),
        "masked_update": member.upload[0].hex(),
        "statistics": statistics_of(index),
        "encoded_statistics": [str(v) for v in encoded.tolist()],
        "masked_statistics": member.upload[1].hex(),
    }


def signature_case(run: Federation, member: Member) -> Case:
    sets = run.seen(CollectingSignatures).sets
    signed = ConsistencyCheck.signed_bytes(sets, N, session=run.id, sender=member.index)
    return {"signed_bytes": signed.hex(), "signature": member.answer(ConsistencyCheck).signature.hex()}


# --- what the coordinator makes -------------------------------------------------------------------------------------


def coordinator_case(run: Federation) -> Case:
    proposal = run.proposal
    signed = keys.signed_message("plan", session=run.id, sender=keys.COORDINATOR_INDEX, fields=b"")
    point = private_key(COORDINATOR_SCALAR).public_key()
    return {
        "signing_scalar": COORDINATOR_SCALAR,
        "signing_point": point.public_bytes(KeyEncoding.X962, PublicFormat.UncompressedPoint).hex(),
        "plan_bytes": proposal.plan_bytes.hex(),
        "session_id": run.id.hex(),
        "signed_bytes": signed.hex(),
        "signature": proposal.signature.hex(),
    }


def unmasking_case(run: Federation) -> Case:
    """Step 4: the sum as it was masked, the secrets put together, the masks taken off, and what is left."""
    job = next(e.job for e in run.effects if isinstance(e, RemoveMasks))
    masks = remaining_masks(job)
    masked_update, masked_statistics = masked_sums(run)
    reduced = run.update.copy()
    reduce_in_place(reduced, run.plan.encoding.ring_bits)
    reduce_in_place(masked_update, run.plan.encoding.ring_bits)
    assert run.mean is not None
    return {
        "sets": {name: sorted(getattr(run.seen(CollectingSignatures).sets, name)) for name in ("u1", "u2", "u3")},
        "masked_update": masked_update.tolist(),
        "masked_statistics": [str(v) for v in masked_statistics.tolist()],
        "reconstructed": [
            *(_secret("self_seed", s.owner, s.shares) for s in job.self_seeds),
            *(_secret("mask_secret", s.owner, s.shares) for s in job.mask_secrets),
        ],
        "removed": {"update": _removed(masks.update), "statistics": _removed(masks.statistics)},
        "update": reduced.tolist(),
        "statistics": decode_statistics(run.statistics),
        "mean": run.mean.astype("<f4").tobytes().hex(),
    }


def masked_sums(run: Federation) -> tuple[UInt32Array, UInt64Array]:
    """The accumulators before any mask was taken off."""
    update, statistics = np.zeros_like(run.update), np.zeros_like(run.statistics)
    for index in sorted(run.survivors):
        upload = run.members[index].upload
        assert upload is not None
        masking.accumulate(update, np.frombuffer(upload[0], np.uint8), run.plan.encoding.ring_bits)
        masking.accumulate_statistics(statistics, upload[1])
    return update, statistics


def _secret(kind: str, owner: int, shares: Mapping[int, bytes]) -> Case:
    made = keys.derive_session_secrets(session_seed(owner, SEED))
    secret = made.self_seed if kind == "self_seed" else made.mask_secret.raw
    assert len(secret) == len(SecretKey(secret).raw)
    return {
        "owner": owner,
        "kind": kind,
        "share_kind": int(ShareKind[kind.upper()]),
        "shares": {str(x): share.hex() for x, share in sorted(shares.items())},
        "secret": secret.hex(),
    }


def _removed(masks: Sequence[SignedKey]) -> list[Case]:
    return [{"key": mask.key.hex(), "negative": mask.negative} for mask in masks]


def document() -> str:
    """The text of the file."""
    run, wire = session()
    content: Case = {
        "coordinator": coordinator_case(run),
        "members": [member_case(run, member) for member in run.members],
        "messages": wire,
        "unmasking": unmasking_case(run),
    }
    return json.dumps(content, indent=1) + "\n"


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
