"""Everything that reads something from elsewhere, each as a target: what to start from, and what must come of it.

A target is called with one input and either returns, or raises one of the errors that it documents. Any other
exception is a crash. The functions are the ones that production calls, in the order in which it calls them; files go
through real files. IDX and CSV files are not here: nothing of ours reads any, only a site's own `Task` may.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from cryptography import x509
from google.protobuf.message import Message
from tests.audit.recorded import recorded
from tests.coordinator.local_federation import AUTHORITY, ISSUED
from tests.fuzz import recordings
from tests.fuzz.mutations import mutate_bytes, mutate_json, mutate_message, mutate_text
from tests.secagg.cohort import NOW

from maskwork.audit.lines import LineError, decode_line, split_line
from maskwork.coordinator.config import read_config as read_coordinator_config
from maskwork.errors import UserError
from maskwork.job import parse_spec, read_job_file
from maskwork.model_signature import SignatureRefused, parse_signature, verify_signed
from maskwork.net.diagnosis import check_own_files, load_private_key
from maskwork.net.identity import IdentityError, IdentityFiles, Role, TrustRoots, load_certificate
from maskwork.net.requests import CertificateRequest, RequestError, read_request
from maskwork.net.revocation import RevocationError, RevocationList
from maskwork.net.tokens import NotAToken, Token
from maskwork.participant.agent import check_offer
from maskwork.participant.config import read_config as read_participant_config
from maskwork.participant.policy import Policy, read_policy
from maskwork.plan_json import PlanJsonError, canonical_json, plan_of_json
from maskwork.secagg import client, server, server_states
from maskwork.secagg.errors import PlanRefused
from maskwork.task import TrainingConfig, TrainingConfigError
from maskwork.tensors import ModelFileError, read_finite_vector
from maskwork.wire import codec, job_codec
from maskwork.wire.codec import Hello, OpenSession, UploadReady, WireError
from maskwork.wire.v1 import federation_pb2, jobs_pb2, plan_pb2

M = TypeVar("M", bound=Message)
Mutator = Callable[[random.Random], Any]


@dataclass(frozen=True, slots=True)
class Target:
    """One reader.

    Attributes:
        name: for the report.
        draw: makes an input from a generator.
        check: gives it to production's functions.
        typed: the errors that it may raise.
    """

    name: str
    draw: Mutator
    check: Callable[[Any], object]
    typed: tuple[type[Exception], ...]


def targets(folder: Path) -> tuple[Target, ...]:
    """Every target; files that are read are written under `folder`."""
    return (*_wire(), *_states(), *_certificates(folder), *_trust(), *_files(folder))


# --- the wire -------------------------------------------------------------------------------------------------------


def _wire() -> tuple[Target, ...]:
    certificates = recordings.der_certificates()
    bundle = codec.encode_certificates(certificates)
    plan = recordings.session().proposal.plan_bytes
    return (
        Target("ConnectRequest", _message(recordings.requests()), _request, (WireError,)),
        Target("ConnectResponse", _message(recordings.responses()), _response, (WireError,)),
        Target("plan", _bytes_of((plan,)), codec.decode_plan, (WireError,)),
        Target("plan, by field", _fields_of_plan, codec.decode_plan, (WireError,)),
        Target("offer", _message(_offers()), _offer, (WireError, PlanRefused)),
        Target("transcript", _bytes_of(recordings.transcripts()), codec.decode_transcript, (WireError,)),
        Target("certificate bundle", _bytes_of((bundle,)), _bundle, (WireError,)),
        Target("WatchJobResponse", _message(recordings.watch_responses()), _watch, (WireError,)),
        Target("training config", _json(TrainingConfig().canonical_json()), _training, (TrainingConfigError,)),
        Target("job spec JSON", _json(recordings.SPEC_JSON), parse_spec, (ValueError,)),
    )


def _bytes_of(seeds: Sequence[bytes]) -> Mutator:
    return lambda rng: mutate_bytes(rng, rng.choice(seeds), seeds)


def _text(*seeds: bytes) -> Mutator:
    return lambda rng: mutate_text(rng, rng.choice(seeds))


def _json(*seeds: bytes) -> Mutator:
    return lambda rng: mutate_json(rng, rng.choice(seeds))


def _message(seeds: Sequence[Message]) -> Mutator:
    """Half by field, half by byte."""
    raw = [seed.SerializeToString() for seed in seeds]

    def draw(rng: random.Random) -> bytes:
        if rng.random() < 0.5:
            return mutate_message(rng, rng.choice(seeds)).SerializeToString()
        return mutate_bytes(rng, rng.choice(raw), raw)

    return draw


def _fields_of_plan(rng: random.Random) -> bytes:
    plan = plan_pb2.RoundPlan.FromString(recordings.session().proposal.plan_bytes)
    return mutate_message(rng, plan, huge=False).SerializeToString(deterministic=True)


def _request(data: bytes) -> codec.Request:
    return codec.decode_request(codec.parse(federation_pb2.ConnectRequest, data))


def _response(data: bytes) -> codec.Response:
    return codec.decode_response(codec.parse(federation_pb2.ConnectResponse, data), recordings.COHORT)


def _offers() -> tuple[federation_pb2.ConnectResponse, ...]:
    return tuple(r for r in recordings.responses() if r.WhichOneof("message") == "open_session")


def _offer(data: bytes) -> TrainingConfig | None:
    offer = _response(data)
    if not isinstance(offer, OpenSession):
        return None
    plan = offer.proposal.plan
    return check_offer(
        offer, federation=plan.federation, tasks=[plan.task], policy=Policy(), highest=None, rounds_taken=(), now=0.0
    )


def _bundle(data: bytes) -> tuple[bytes, ...]:
    return codec.decode_certificates(data, hashlib.sha256(data).digest(), len(recordings.der_certificates()))


def _watch(data: bytes) -> object:
    return job_codec.decode_event(codec.parse(jobs_pb2.WatchJobResponse, data), job_id="job-1")


def _training(data: bytes) -> TrainingConfig:
    return TrainingConfig.from_canonical_json(data)


# --- the two state machines -----------------------------------------------------------------------------------------


def _states() -> tuple[Target, ...]:
    return (
        Target("coordinator's session", partial(_moment, recordings.coordinator_moments), _coordinator, (WireError,)),
        Target("participant's session", partial(_moment, recordings.participant_moments), _participant, (WireError,)),
    )


def _moment(moments: Callable[[], Sequence[recordings.Moment]], rng: random.Random) -> recordings.Moment:
    """A state with its message spoilt; or with the message of another moment, or of another member."""
    moment = rng.choice(moments())
    what = rng.random()
    if what < 0.2:
        return recordings.Moment(moment.state, moment.index, rng.choice(moments()).message)
    if what < 0.3:
        return recordings.Moment(moment.state, rng.randrange(recordings.COHORT), moment.message)
    return recordings.Moment(moment.state, moment.index, mutate_message(rng, moment.message))


def _coordinator(moment: recordings.Moment) -> None:
    assert isinstance(moment.message, federation_pb2.ConnectRequest)
    assert isinstance(moment.state, server_states.Collecting)
    message = codec.decode_request(moment.message)
    if not isinstance(message, Hello | UploadReady):
        server.step(moment.state, server_states.Received(moment.index, message))


def _participant(moment: recordings.Moment) -> None:
    assert isinstance(moment.message, federation_pb2.ConnectResponse)
    assert not isinstance(moment.state, server_states.Collecting)
    message = codec.decode_response(moment.message, recordings.COHORT)
    if not isinstance(message, codec.Welcome | codec.OpenSession | codec.UploadGrant):
        client.step(moment.state, message, now=NOW)  # type: ignore[arg-type]  # a participant's moment


# --- certificates ---------------------------------------------------------------------------------------------------


def _certificates(folder: Path) -> tuple[Target, ...]:
    return (
        Target("certificate, DER", _bytes_of(recordings.der_certificates()), _verify, (IdentityError,)),
        Target("CA file", _text(*recordings.pem_files()), _roots, (IdentityError,)),
        Target("identity files", _text(*recordings.pem_files()), partial(_identity, folder), (UserError,)),
    )


def _verify(der: bytes) -> None:
    verified = AUTHORITY.roots.verify(der, now=time.time())
    x509.load_der_x509_certificate(verified.der)


def _roots(pem: bytes) -> None:
    TrustRoots.from_pem(pem).check_validity(time.time())


def _identity(folder: Path, pem: bytes) -> None:
    """The same bytes in the place of each of the three files in turn."""
    directory = folder / "identity"
    if not directory.exists():
        ISSUED["site-a"].write(directory)
    files = IdentityFiles.in_directory(directory)
    for spoilt in (files.ca, files.cert, files.key):
        kept = spoilt.read_bytes()
        spoilt.write_bytes(pem)
        try:
            for reader in (load_certificate, load_private_key):
                _typed(partial(reader, spoilt), UserError)
            _typed(partial(check_own_files, files, now=time.time(), role=Role.PARTICIPANT), UserError)
        finally:
            spoilt.write_bytes(kept)


def _typed(read: Callable[[], object], error: type[Exception]) -> None:
    with suppress(error):
        read()


# --- what is signed, asked for and written down ---------------------------------------------------------------------


def _trust() -> tuple[Target, ...]:
    plan = recordings.session().proposal.plan
    log = recorded().coordinator
    token = b"participant:site-a:" + b"0" * 16 + b":" + b"a" * 43
    return (
        Target("revocation list", _bytes_of((recordings.revocation_list(),)), _list, (RevocationError,)),
        Target("certificate request", _text(recordings.request_pem()), _csr, (RequestError,)),
        Target("enrolment token", _text(token), lambda data: Token.parse(data.decode("latin-1")), (NotAToken,)),
        Target("audit log, a line", _bytes_of(log), decode_line, (LineError,)),
        Target("audit log, a record", _json(*(split_line(line)[0] for line in log)), _record, (LineError,)),
        Target("model signature", _text(recordings.signature_json()), _signature, (SignatureRefused, IdentityError)),
        Target("plan as JSON", _json(canonical_json(plan)), plan_of_json, (PlanJsonError,)),
    )


def _list(der: bytes) -> RevocationList:
    return RevocationList.parse(der, AUTHORITY.roots, now=time.time())


def _csr(pem: bytes) -> CertificateRequest:
    return read_request(pem, federation=AUTHORITY.federation)


def _record(data: bytes) -> object:
    """A record in a line whose head and signature have the right form: what is judged is the record."""
    line = recorded().coordinator[0]
    record, _, _ = split_line(line)
    return decode_line(line.replace(record, data))


def _signature(data: bytes) -> object:
    return verify_signed(parse_signature(data, named="input"), roots=AUTHORITY.roots, now=time.time())


# --- files ----------------------------------------------------------------------------------------------------------


def _files(folder: Path) -> tuple[Target, ...]:
    def written(read: Callable[[Path], object]) -> Callable[[bytes], object]:
        path = folder / "input"

        def check(data: bytes) -> object:
            path.write_bytes(data)
            return read(path)

        return check

    models = recordings.model_files()
    return (
        Target("job file", _text(recordings.JOB_TOML), written(_job), (UserError,)),
        Target("policy", _text(recordings.POLICY_TOML), written(read_policy), (UserError,)),
        Target("coordinator config", _text(recordings.COORDINATOR_TOML), written(_coordinator_toml), (UserError,)),
        Target("participant config", _text(recordings.PARTICIPANT_TOML), written(_participant_toml), (UserError,)),
        Target("safetensors", _bytes_of(models), written(read_finite_vector), (ModelFileError,)),
        Target("safetensors header", partial(_header, models), written(read_finite_vector), (ModelFileError,)),
    )


def _job(path: Path) -> None:
    job = read_job_file(path)
    parse_spec(job.spec().canonical_json())
    _typed(partial(_opened, job.model), UserError)


def _coordinator_toml(path: Path) -> None:
    _typed(partial(TrustRoots.from_file, read_coordinator_config(path).identity / "ca.pem"), UserError)


def _participant_toml(path: Path) -> None:
    config = read_participant_config(path)
    _typed(partial(TrustRoots.from_file, config.identity / "ca.pem"), UserError)
    if config.policy is not None:
        _typed(partial(read_policy, config.policy), UserError)


def _opened(path: Path) -> None:
    with suppress(OSError):  # documented: it cannot be read
        read_finite_vector(path)


def _header(models: Sequence[bytes], rng: random.Random) -> bytes:
    """The JSON of the header spoilt, with a length that fits it, or claims something else."""
    model = rng.choice(models)
    length = int.from_bytes(model[:8], "little")
    header = mutate_json(rng, model[8 : 8 + length].rstrip())
    claimed = rng.choice((len(header),) * 8 + (2**32, 2**63, 2**64 - 1, 0))
    return claimed.to_bytes(8, "little") + header + model[8 + length :]
