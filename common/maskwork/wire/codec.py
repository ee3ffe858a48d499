"""The one border between the two vocabularies: protobuf types on one side, domain types on the other.

Decoding either gives a well-formed domain object or raises `WireError`; nothing half-checked gets through. It does
not check who sent something or whether it fits the state of a round: the service and the state machines do.

Plans, which have exactly one encoding, are `plan_codec`'s; jobs and their events are `job_codec`'s.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias, TypeVar

from google.protobuf.message import DecodeError
from google.protobuf.message import Message as ProtobufMessage

from maskwork.secagg import messages as domain
from maskwork.secagg.errors import AbortReason, DeclineCode
from maskwork.secagg.keys import PublicKey, ShareKind
from maskwork.wire.errors import WireError as WireError
from maskwork.wire.history_codec import NO_HISTORY, decode_history, encode_history
from maskwork.wire.history_codec import ShownHistory as ShownHistory
from maskwork.wire.plan_codec import decode_plan as decode_plan
from maskwork.wire.plan_codec import encode_plan as encode_plan
from maskwork.wire.v1 import federation_pb2, session_pb2

MAX_CERTIFICATE_BYTES = 16_384
MAX_REVOCATION_LIST_BYTES = 4 << 20
MAX_VERSIONS = 64
MAX_TASKS = 1024
MAX_TASK_NAME = 256

K = TypeVar("K")
V = TypeVar("V")
M = TypeVar("M", bound=ProtobufMessage)


@dataclass(frozen=True, slots=True)
class Hello:
    """The first message of a control stream: what the participant speaks and which session it is still in."""

    versions: tuple[int, ...]
    software: str
    tasks: tuple[str, ...]
    active_session: bytes
    audit_size: int = 0
    succeeds_another: bool = False


@dataclass(frozen=True, slots=True)
class UploadReady:
    """The masked update exists and can be streamed."""


@dataclass(frozen=True, slots=True)
class Welcome:
    """The coordinator's first message: the version chosen, and the certificate that signs plans."""

    version: int
    coordinator_certificate: bytes


@dataclass(frozen=True, slots=True)
class OpenSession:
    """A proposal with what is needed to fetch the rest: the training config, and how large each of the others is."""

    proposal: domain.Proposal
    training_config: bytes
    model_size: int
    certificates_digest: bytes
    certificates_size: int
    history: ShownHistory = NO_HISTORY
    revocation_list_size: int = 0


@dataclass(frozen=True, slots=True)
class UploadGrant:
    """Stream now, from the offsets that are durable at the coordinator."""

    update_offset: int
    statistics_offset: int


@dataclass(frozen=True, slots=True)
class Transcript:
    """A session up to where it stands: what `PersistUnmask` writes, and the evidence against a dishonest dealer."""

    plan_bytes: bytes = field(repr=False)
    plan_signature: bytes = field(repr=False)
    certificates: tuple[bytes, ...] = field(repr=False)
    advertised: Mapping[int, domain.AdvertiseKeys]
    dealings: Mapping[int, domain.ShareKeys]
    u3: domain.Members = frozenset()
    signatures: Mapping[int, domain.ConsistencyCheck] = field(default_factory=dict)
    revealed: Mapping[int, domain.Unmask] = field(default_factory=dict)
    accusation: tuple[int, domain.Complaint] | None = None


Request: TypeAlias = Hello | UploadReady | domain.ParticipantMessage
Response: TypeAlias = (
    Welcome
    | OpenSession
    | UploadGrant
    | domain.Advertisements
    | domain.DeliveredShares
    | domain.SurvivorSets
    | domain.SurvivorSignatures
    | domain.SessionClosed
)

# --- participant to coordinator -------------------------------------------------------------------------------------


def encode_request(session_id: bytes, message: Request) -> federation_pb2.ConnectRequest:
    """A participant's message as it goes on the control stream."""
    request = federation_pb2.ConnectRequest(session_id=session_id)
    match message:
        case Hello():
            request.hello.CopyFrom(
                federation_pb2.Hello(
                    versions=message.versions,
                    software=message.software,
                    tasks=message.tasks,
                    audit_size=message.audit_size,
                    succeeds_another=message.succeeds_another,
                )
            )
        case UploadReady():
            request.upload_ready.CopyFrom(federation_pb2.UploadReady())
        case domain.Decline():
            request.decline.CopyFrom(session_pb2.Decline(code=message.code.value, detail=message.detail))
        case domain.AdvertiseKeys():
            request.advertise_keys.CopyFrom(_advertise_keys(message))
        case domain.ShareKeys():
            request.share_keys.CopyFrom(_share_keys(message))
        case domain.Complaint():
            request.complaint.CopyFrom(session_pb2.Complaint(dealer=message.dealer, key=message.key))
        case domain.ConsistencyCheck():
            request.consistency_check.CopyFrom(session_pb2.ConsistencyCheck(signature=message.signature))
        case domain.Unmask():
            request.unmask.CopyFrom(_unmask(message))
        case domain.Withdraw():
            request.withdraw.CopyFrom(session_pb2.Withdraw(reason=message.reason.value, detail=message.detail))
    return request


def decode_request(request: federation_pb2.ConnectRequest) -> Request:
    """A participant's message.

    Raises:
        WireError: it is not well-formed.
    """
    kind = request.WhichOneof("message")
    try:
        match kind:
            case "hello":
                return _decode_hello(request)
            case "upload_ready":
                return UploadReady()
            case "decline":
                detail = _shown(request.decline.detail, domain.MAX_DETAIL)
                return domain.Decline(DeclineCode(request.decline.code), detail)
            case "advertise_keys":
                return _decode_advertise_keys(request.advertise_keys)
            case "share_keys":
                return _decode_share_keys(request.share_keys)
            case "complaint":
                return domain.Complaint(request.complaint.dealer, request.complaint.key)
            case "consistency_check":
                return domain.ConsistencyCheck(request.consistency_check.signature)
            case "unmask":
                return _decode_unmask(request.unmask)
            case "withdraw":
                detail = _shown(request.withdraw.detail, domain.MAX_DETAIL)
                return domain.Withdraw(AbortReason(request.withdraw.reason), detail)
            case _:
                raise WireError("a message of no known kind")
    except WireError:
        raise
    except ValueError as error:
        raise WireError(f"{kind}: {error}") from error


def _decode_hello(request: federation_pb2.ConnectRequest) -> Hello:
    hello = request.hello
    if len(hello.versions) > MAX_VERSIONS or len(hello.tasks) > MAX_TASKS:
        raise WireError(f"a Hello of {len(hello.versions)} versions and {len(hello.tasks)} tasks")
    if any(len(task) > MAX_TASK_NAME for task in hello.tasks):
        raise WireError(f"a task's name of more than {MAX_TASK_NAME} characters")
    if len(request.session_id) not in (0, 32):
        raise WireError("a Hello that names a session by something that is no session id")
    software = _shown(hello.software, 200)
    session, size, succeeds = request.session_id, hello.audit_size, hello.succeeds_another
    return Hello(tuple(hello.versions), software, tuple(hello.tasks), session, size, succeeds)


def _shown(text: str, most: int) -> str:
    """A peer's words as they may be logged and shown: cut, and without what a terminal takes for commands."""
    return "".join(c if c.isprintable() else "?" for c in text[:most])


def _advertise_keys(message: domain.AdvertiseKeys) -> session_pb2.AdvertiseKeys:
    return session_pb2.AdvertiseKeys(
        encryption_key=message.encryption_key.raw, mask_key=message.mask_key.raw, signature=message.signature
    )


def _decode_advertise_keys(message: session_pb2.AdvertiseKeys) -> domain.AdvertiseKeys:
    return domain.AdvertiseKeys(PublicKey(message.encryption_key), PublicKey(message.mask_key), message.signature)


def _share_keys(message: domain.ShareKeys) -> session_pb2.ShareKeys:
    return session_pb2.ShareKeys(
        seed_commitment=message.seed_commitment,
        root=message.root,
        shares=[
            session_pb2.DealtShare(
                holder=s.holder,
                ciphertext=s.ciphertext,
                self_commitment=s.self_commitment,
                mask_commitment=s.mask_commitment,
            )
            for s in message.shares
        ],
        signature=message.signature,
    )


def _decode_share_keys(message: session_pb2.ShareKeys) -> domain.ShareKeys:
    shares = tuple(
        domain.DealtShare(s.holder, s.ciphertext, s.self_commitment, s.mask_commitment) for s in message.shares
    )
    return domain.ShareKeys(message.seed_commitment, message.root, shares, message.signature)


def _unmask(message: domain.Unmask) -> session_pb2.Unmask:
    return session_pb2.Unmask(shares=[_revealed(s) for s in message.shares])


def _decode_unmask(message: session_pb2.Unmask) -> domain.Unmask:
    return domain.Unmask(tuple(_decode_revealed(s) for s in message.shares))


def _revealed(share: domain.RevealedShare) -> session_pb2.RevealedShare:
    if share.kind is ShareKind.SELF_SEED:
        return session_pb2.RevealedShare(owner=share.owner, salt=share.salt, self_seed=share.share)
    return session_pb2.RevealedShare(owner=share.owner, salt=share.salt, mask_secret=share.share)


def _decode_revealed(message: session_pb2.RevealedShare) -> domain.RevealedShare:
    match message.WhichOneof("share"):
        case "self_seed":
            return domain.RevealedShare(message.owner, ShareKind.SELF_SEED, message.salt, message.self_seed)
        case "mask_secret":
            return domain.RevealedShare(message.owner, ShareKind.MASK_SECRET, message.salt, message.mask_secret)
        case _:
            raise WireError("a revealed share of neither kind")


# --- coordinator to participant -------------------------------------------------------------------------------------


def encode_response(session_id: bytes, message: Response, roster_size: int) -> federation_pb2.ConnectResponse:
    """A message of the coordinator as it goes on the control stream; bitmaps are over `roster_size` members."""
    response = federation_pb2.ConnectResponse(session_id=session_id)
    match message:
        case Welcome():
            response.welcome.CopyFrom(
                federation_pb2.Welcome(version=message.version, coordinator_certificate=message.coordinator_certificate)
            )
        case OpenSession():
            response.open_session.CopyFrom(_open_session(message))
        case UploadGrant():
            response.upload_grant.CopyFrom(
                federation_pb2.UploadGrant(
                    update_offset=message.update_offset, statistics_offset=message.statistics_offset
                )
            )
        case domain.Advertisements():
            response.advertisements.CopyFrom(_advertisements(message, roster_size))
        case domain.DeliveredShares():
            response.delivered_shares.CopyFrom(_delivered_shares(message, roster_size))
        case domain.SurvivorSets():
            u1, u2, u3 = (domain.encode_members(m, roster_size) for m in (message.u1, message.u2, message.u3))
            response.survivor_sets.CopyFrom(session_pb2.SurvivorSets(u1=u1, u2=u2, u3=u3))
        case domain.SurvivorSignatures():
            response.survivor_signatures.CopyFrom(
                session_pb2.SurvivorSignatures(signatures=_signatures(message.signatures))
            )
        case domain.SessionClosed():
            response.session_closed.CopyFrom(
                session_pb2.SessionClosed(released=message.released, phrase=message.phrase)
            )
    return response


def decode_response(response: federation_pb2.ConnectResponse, roster_size: int) -> Response:
    """A message of the coordinator; `roster_size` is that of the plan of the session it belongs to (0: none yet).

    Raises:
        WireError: it is not well-formed.
    """
    kind = response.WhichOneof("message")
    try:
        match kind:
            case "welcome":
                return Welcome(response.welcome.version, response.welcome.coordinator_certificate)
            case "open_session":
                return _decode_open_session(response.open_session)
            case "upload_grant":
                return UploadGrant(response.upload_grant.update_offset, response.upload_grant.statistics_offset)
            case "advertisements":
                return _decode_advertisements(response.advertisements, roster_size)
            case "delivered_shares":
                return _decode_delivered_shares(response.delivered_shares, roster_size)
            case "survivor_sets":
                s = response.survivor_sets
                return domain.SurvivorSets(*(domain.decode_members(m, roster_size) for m in (s.u1, s.u2, s.u3)))
            case "survivor_signatures":
                signatures = response.survivor_signatures.signatures
                return domain.SurvivorSignatures(tuple((s.index, s.signature) for s in signatures))
            case "session_closed":
                closed = response.session_closed
                return domain.SessionClosed(closed.released, _shown(closed.phrase, 200))
            case _:
                raise WireError("a message of no known kind")
    except WireError:
        raise
    except ValueError as error:
        raise WireError(f"{kind}: {error}") from error


def _open_session(message: OpenSession) -> session_pb2.OpenSession:
    return session_pb2.OpenSession(
        plan=message.proposal.plan_bytes,
        signature=message.proposal.signature,
        training_config=message.training_config,
        model_size=message.model_size,
        certificates_digest=message.certificates_digest,
        certificates_size=message.certificates_size,
        # Left out where there is none: an offer without a history has the bytes that it always had.
        history=None if message.history == NO_HISTORY else encode_history(message.history),
        revocation_list_size=message.revocation_list_size,
    )


def _decode_open_session(message: session_pb2.OpenSession) -> OpenSession:
    plan = decode_plan(message.plan)
    if len(message.certificates_digest) != 32:
        raise WireError("certificates_digest is not 32 bytes")
    if message.certificates_size > (MAX_CERTIFICATE_BYTES + 4) * plan.cohort:
        raise WireError("certificates_size is more than a roster's certificates can take")
    if message.revocation_list_size > MAX_REVOCATION_LIST_BYTES:
        raise WireError("revocation_list_size is more than a revocation list may take")
    return OpenSession(
        domain.Proposal(message.plan, message.signature, plan),
        message.training_config,
        message.model_size,
        message.certificates_digest,
        message.certificates_size,
        decode_history(message.history),
        message.revocation_list_size,
    )


def _advertisements(message: domain.Advertisements, roster_size: int) -> session_pb2.Advertisements:
    return session_pb2.Advertisements(
        u1=domain.encode_members(message.u1, roster_size),
        advertised=_indexed(message.advertised),
        digests=message.digests,
    )


def _decode_advertisements(message: session_pb2.Advertisements, roster_size: int) -> domain.Advertisements:
    return domain.Advertisements(
        domain.decode_members(message.u1, roster_size),
        tuple((a.index, _decode_advertise_keys(a.keys)) for a in message.advertised),
        tuple(message.digests),
    )


def _indexed(advertised: Iterable[tuple[int, domain.AdvertiseKeys]]) -> list[session_pb2.Advertisement]:
    return [session_pb2.Advertisement(index=i, keys=_advertise_keys(m)) for i, m in advertised]


def _signatures(signatures: Iterable[tuple[int, bytes]]) -> list[session_pb2.SurvivorSignature]:
    return [session_pb2.SurvivorSignature(index=i, signature=s) for i, s in signatures]


_DELIVERED = (
    "dealer",
    "seed_commitment",
    "root",
    "holders",
    "signature",
    "self_commitment",
    "mask_commitment",
    "ciphertext",
)


def _delivered_shares(message: domain.DeliveredShares, roster_size: int) -> session_pb2.DeliveredShares:
    return session_pb2.DeliveredShares(
        u2=domain.encode_members(message.u2, roster_size),
        shares=[
            session_pb2.DeliveredShare(proof=s.proof, **{name: getattr(s, name) for name in _DELIVERED})
            for s in message.shares
        ],
    )


def _decode_delivered_shares(message: session_pb2.DeliveredShares, roster_size: int) -> domain.DeliveredShares:
    return domain.DeliveredShares(
        domain.decode_members(message.u2, roster_size),
        tuple(
            domain.DeliveredShare(proof=tuple(s.proof), **{name: getattr(s, name) for name in _DELIVERED})
            for s in message.shares
        ),
    )


# --- certificates and the durable record ------------------------------------------------------------------------------


def encode_certificates(certificates: Iterable[bytes]) -> bytes:
    """A roster's DER certificates as one download: each preceded by its length in four big-endian bytes."""
    return b"".join(len(der).to_bytes(4, "big") + der for der in certificates)


def decode_certificates(bundle: bytes, digest: bytes, count: int) -> tuple[bytes, ...]:
    """The inverse of `encode_certificates`.

    Raises:
        WireError: the digest is another, or the bundle does not hold exactly `count` certificates.
    """
    if hashlib.sha256(bundle).digest() != digest:
        raise WireError("the certificates delivered are not those announced")
    certificates, offset = [], 0
    while offset < len(bundle):
        length = int.from_bytes(bundle[offset : offset + 4], "big")
        certificate = bundle[offset + 4 : offset + 4 + length]
        if not 0 < length <= MAX_CERTIFICATE_BYTES or len(certificate) != length:
            raise WireError("the certificates delivered are cut short or too long")
        certificates.append(certificate)
        offset += 4 + length
    if len(certificates) != count:
        raise WireError(f"{len(certificates)} certificates for a roster of {count}")
    return tuple(certificates)


def with_accusation(transcript: Transcript, accuser: int, complaint: domain.Complaint) -> Transcript:
    """The transcript that a complaint is judged by."""
    return replace(transcript, accusation=(accuser, complaint))


def encode_transcript(transcript: Transcript) -> bytes:
    """The bytes that the coordinator stores."""
    size = decode_plan(transcript.plan_bytes).cohort
    message = session_pb2.Transcript(
        plan=transcript.plan_bytes,
        plan_signature=transcript.plan_signature,
        certificates=transcript.certificates,
        advertised=_indexed(sorted(transcript.advertised.items())),
        dealings=[session_pb2.Dealing(index=i, shares=_share_keys(m)) for i, m in sorted(transcript.dealings.items())],
        u3=domain.encode_members(transcript.u3, size),
        signatures=_signatures(sorted((i, m.signature) for i, m in transcript.signatures.items())),
        revealed=[session_pb2.Revelation(index=i, shares=_unmask(m)) for i, m in sorted(transcript.revealed.items())],
    )
    if transcript.accusation is not None:
        accuser, complaint = transcript.accusation
        message.accusation.accuser = accuser
        message.accusation.complaint.CopyFrom(session_pb2.Complaint(dealer=complaint.dealer, key=complaint.key))
    return message.SerializeToString(deterministic=True)


def decode_transcript(data: bytes) -> Transcript:
    """The inverse of `encode_transcript`.

    Raises:
        WireError: the record is damaged.
    """
    message = parse(session_pb2.Transcript, data)
    try:
        plan = decode_plan(message.plan)
        accusation = None
        if message.HasField("accusation"):
            complaint = message.accusation.complaint
            accusation = (message.accusation.accuser, domain.Complaint(complaint.dealer, complaint.key))
        return Transcript(
            message.plan,
            message.plan_signature,
            tuple(message.certificates),
            {a.index: _decode_advertise_keys(a.keys) for a in message.advertised},
            {d.index: _decode_share_keys(d.shares) for d in message.dealings},
            domain.decode_members(message.u3, plan.cohort),
            {s.index: domain.ConsistencyCheck(s.signature) for s in message.signatures},
            {r.index: _decode_unmask(r.shares) for r in message.revealed},
            accusation,
        )
    except ValueError as error:
        raise WireError(f"a damaged transcript: {error}") from error


def parse(kind: type[M], data: bytes) -> M:
    """Parse protobuf bytes.

    Raises:
        WireError: they are not a message of this kind.
    """
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise WireError(f"not a {kind.__name__}: {error}") from error
