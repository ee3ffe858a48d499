"""Real traffic, recorded from real sessions in this process: what mutations start from. Not a test itself."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from tests.coordinator.local_federation import AUTHORITY, COORDINATOR, ISSUED, der_of, spec
from tests.secagg.cohort import private_key
from tests.secagg.harness import Federation, clean_run

from maskwork import job_events as events
from maskwork.model_signature import ModelStatement, sign_model
from maskwork.net.identity import Identity, Role, serial_bytes
from maskwork.net.requests import new_request
from maskwork.net.revocation import Reason
from maskwork.net.revoking import next_list
from maskwork.secagg import client_states, server_states
from maskwork.secagg import messages as domain
from maskwork.secagg.errors import AbortReason, DeclineCode
from maskwork.secagg.keys import SoftwareSigner
from maskwork.secagg.messages import Complaint, Decline, SessionClosed, Withdraw
from maskwork.tensors import Schema, TensorSpec, write_model
from maskwork.wire import codec, job_codec
from maskwork.wire.v1 import federation_pb2, jobs_pb2

COHORT: Final = 5


@dataclass(frozen=True, slots=True)
class Moment:
    """A state of one half, and the message that it was about to take."""

    state: server_states.State | client_states.State
    index: int
    message: federation_pb2.ConnectRequest | federation_pb2.ConnectResponse


@cache
def session() -> Federation:
    """One whole session of five, of the pure halves."""
    return clean_run(COHORT)


@cache
def requests() -> tuple[federation_pb2.ConnectRequest, ...]:
    """Every message that participants sent, and one of each kind that a clean session does not have."""
    run = session()
    hello = codec.Hello((1,), "maskwork", ("digits",), run.id)
    said: list[codec.Request] = [m for member in run.members for m in member.sent]
    said += [
        hello,
        codec.UploadReady(),
        Decline(DeclineCode.POLICY, "no"),
        Withdraw(AbortReason.TRAINING_FAILED),
        Complaint(2, private_key(1).private_numbers().private_value.to_bytes(32, "big")),
    ]
    return tuple(codec.encode_request(run.id, message) for message in said)


@cache
def responses() -> tuple[federation_pb2.ConnectResponse, ...]:
    """Every message that the coordinator sent, and those around a session."""
    run = session()
    sent: list[codec.Response] = []
    for member in run.members:
        sent += [m for m in member.received if not isinstance(m, domain.Proposal)]
    sent += [
        codec.Welcome(1, der_of(COORDINATOR)),
        codec.OpenSession(run.proposal, spec().training.canonical_json(), 1000, bytes(32), 4000),
        codec.UploadGrant(0, 0),
        SessionClosed(released=False, phrase="left out of this session: deadline"),
    ]
    return tuple(codec.encode_response(run.id, message, COHORT) for message in sent)


@cache
def coordinator_moments() -> tuple[Moment, ...]:
    """The coordinator's states, each before a message that it took."""
    run = session()
    return tuple(
        Moment(before, event.sender, codec.encode_request(run.id, event.message))
        for before, event, _ in run.history
        if isinstance(event, server_states.Received)
    )


@cache
def participant_moments() -> tuple[Moment, ...]:
    """Every participant's states, each before a message that it took."""
    run = session()
    found = []
    for member in run.members:
        for before, event, _ in member.history:
            if not isinstance(event, domain.Proposal | client_states.UpdateMasked | client_states.LocalFailure):
                message = codec.encode_response(run.id, event, COHORT)
                found.append(Moment(before, member.index, message))
    return tuple(found)


@cache
def transcripts() -> tuple[bytes, ...]:
    """What `PersistUnmask` writes, without and with an accusation."""
    run = session()
    transcript = codec.Transcript(
        run.proposal.plan_bytes,
        run.proposal.signature,
        tuple(der_of(ISSUED["site-a"]) for _ in range(COHORT)),
        {m.index: m.answer(domain.AdvertiseKeys) for m in run.members},
        {m.index: m.answer(domain.ShareKeys) for m in run.members},
        run.survivors,
        {m.index: m.answer(domain.ConsistencyCheck) for m in run.members},
        {m.index: m.answer(domain.Unmask) for m in run.members},
    )
    accused = codec.with_accusation(transcript, 1, Complaint(2, bytes(range(1, 33))))
    return codec.encode_transcript(transcript), codec.encode_transcript(accused)


@cache
def pem_files() -> tuple[bytes, ...]:
    """Certificates, a CA bundle and a key, all PEM."""
    ca = AUTHORITY.certificate.public_bytes(Encoding.PEM)
    return (ca, ca + ca, ISSUED["site-a"].cert_pem, COORDINATOR.cert_pem, ISSUED["site-a"].key_pem)


@cache
def der_certificates() -> tuple[bytes, ...]:
    return (*(der_of(issued) for issued in ISSUED.values()), der_of(COORDINATOR))


@cache
def revocation_list() -> bytes:
    """A list with two entries, DER."""
    serials = [serial_bytes(x509.load_der_x509_certificate(der)) for der in der_certificates()[:2]]
    withdrawn = dict(zip(serials, (Reason.KEY_COMPROMISE, Reason.UNSPECIFIED), strict=True))
    with tempfile.TemporaryDirectory() as folder:
        return next_list(AUTHORITY, Path(folder), now=time.time(), withdrawn=withdrawn).der


@cache
def request_pem() -> bytes:
    """What a site asks a CA for."""
    return new_request(ec.generate_private_key(ec.SECP256R1()), Identity(AUTHORITY.federation, Role.PARTICIPANT, "s"))


@cache
def signature_json() -> bytes:
    """What lies beside an exported model."""
    digest = bytes(range(32))
    statement = ModelStatement(
        federation=AUTHORITY.federation,
        job_id="job-1",
        round_number=1,
        session_id=digest,
        file_sha256=digest,
        model_digest=digest,
        signed_at=int(time.time()),
        audit_head=digest,
        audit_size=9,
        certificate=der_of(COORDINATOR),
    )
    return sign_model(statement, SoftwareSigner(private_key(1))).to_json()


@cache
def model_files() -> tuple[bytes, ...]:
    """Small safetensors files with every dtype."""
    schemas = (
        Schema((TensorSpec("w", "F32", (6,)),)),
        Schema((TensorSpec("a", "F16", (2, 3)), TensorSpec("b", "BF16", (4,)), TensorSpec("c", "F64", ()))),
        Schema(tuple(TensorSpec(f"layer.{i}.weight", "F32", (3, 2)) for i in range(12))),
    )
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for schema in schemas:
            path = Path(folder) / "m"
            write_model(path, schema, np.ones(schema.size, np.float32), {"round": "1"})
            found.append(path.read_bytes())
    return tuple(found)


@cache
def watch_responses() -> tuple[jobs_pb2.WatchJobResponse, ...]:
    """One event of each kind, as watchers get them."""
    job = events.JobSummary(
        "job-1", 1.0, "job", "digits", "running", 5, 1, "", "spiffe://ward/researcher/rosa", 1.0, bytes(32)
    )
    told: tuple[events.JobEvent, ...] = (
        job,
        events.AttemptOpened("job-1", 1.0, 1, 1, ("site-a", "site-b"), 3, bytes(32)),
        events.StageOpened("job-1", 1.0, 1, 1, "unmask", ("site-a",)),
        events.Answered("job-1", 1.0, 1, 1, "unmask", "site-a"),
        events.Dropped("job-1", 1.0, 1, 1, "unmask", "site-a", "deadline", "late"),
        events.RoundCommitted(
            "job-1", 1.0, 1, 1, ("site-a",), ("site-b",), {"examples": 4.0}, {"unmask": 0.1}, 1.0, 99, bytes(32), 2.0
        ),
        events.AttemptAborted("job-1", 1.0, 1, 1, "cancelled", "by hand"),
        events.Waiting("job-1", 1.0, "for sites", ("site-a",)),
    )
    return tuple(job_codec.encode_event(event) for event in told)


SPEC_JSON: Final = spec(cohort={"participants": ["site-a", "site-b", "site-c"]}).canonical_json()
JOB_TOML: Final = b"""
name = "digits"
task = "digits"
rounds = 5
model = "initial.safetensors"
[training]
epochs = 1
learning_rate = 0.1
[metrics]
"train.loss" = 10.0
[cohort]
participants = ["site-a", "site-b", "site-c"]
min_participants = 3
[deadlines]
unmask_s = 60.0
"""
COORDINATOR_TOML: Final = b"""
listen = "127.0.0.1:8750"
identity = "identity"
state = "state"
max_uploads = 8
log_level = "info"
"""
PARTICIPANT_TOML: Final = b"""
coordinator = "127.0.0.1:8750"
identity = "identity"
state = "state"
policy = "policy.toml"
seed = 7
[tasks.digits]
use = "maskwork.participant.tasks.digits:Digits"
[tasks.digits.options]
shard = 1
"""
POLICY_TOML: Final = b"""
tasks = ["digits"]
min_cohort = 3
sparse_graph = false
min_survivor_difference = 2
max_clip_norm = 10.0
"""
