"""A model's signature: who signed, what, when; and every way in which it is not so."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import fields
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from maskwork.audit.committed import CommittedModels, committed_models
from maskwork.errors import UserError
from maskwork.model_commands import (
    check_audit,
    signature_file,
    verified_model,
    verify,
    write_signature,
)
from maskwork.model_signature import (
    ModelStatement,
    SignatureRefused,
    SignedModel,
    parse_signature,
    sign_model,
    verify_signed,
)
from maskwork.net.authority import Authority, IssuedIdentity
from maskwork.net.identity import IdentityError, IdentityProblem, Role, serial_bytes, to_der
from maskwork.secagg.keys import SoftwareSigner
from maskwork.wire.codec import WireError
from maskwork.wire.job_codec import decode_signature, encode_signature
from maskwork.wire.v1 import jobs_pb2

NOW = 1_800_000_000
DAY = 86_400
AUTHORITY = Authority.create("ward", now=NOW - DAY)
COORDINATOR = AUTHORITY.issue(Role.COORDINATOR, "main", now=NOW - DAY, days=30, dns_names=["localhost"])
MODEL = b"a model, as far as a signature is concerned"
DIGEST = hashlib.sha256(MODEL).digest()


def der_of(issued: IssuedIdentity) -> bytes:
    return to_der(x509.load_pem_x509_certificate(issued.cert_pem))


def signer_of(issued: IssuedIdentity) -> SoftwareSigner:
    return SoftwareSigner(load_pem_private_key(issued.key_pem, None))  # type: ignore[arg-type]  # our CA issues P-256


def statement(**changes: object) -> ModelStatement:
    values: dict[str, object] = {
        "federation": "ward",
        "job_id": "digits-1a2b",
        "round_number": 7,
        "session_id": b"\x05" * 32,
        "file_sha256": DIGEST,
        "model_digest": DIGEST,
        "signed_at": NOW,
        "audit_head": b"\x06" * 32,
        "audit_size": 99,
        "certificate": der_of(COORDINATOR),
        **changes,
    }
    return ModelStatement(**values)  # type: ignore[arg-type]  # as the caller of this test helper says


def signed(**changes: object) -> SignedModel:
    return sign_model(statement(**changes), signer_of(COORDINATOR))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "m.safetensors"
    path.write_bytes(MODEL)
    write_signature(path, signed())
    return path


def test_a_good_signature_says_who_what_and_when(model: Path) -> None:
    verified = verified_model(model, signature_file(model), roots=AUTHORITY.roots, now=NOW + 60)
    assert verified.signer.identity.uri == "spiffe://ward/coordinator/main"
    assert verified.statement == statement()
    assert not verified.expired
    assert sorted(p.name for p in model.parent.iterdir()) == ["m.safetensors", "m.safetensors.sig"]


def test_another_file_is_not_the_one_that_was_signed(model: Path) -> None:
    model.write_bytes(MODEL + b"!")
    with pytest.raises(SignatureRefused, match=f"not the file that was signed.*is for {DIGEST.hex()}"):
        verified_model(model, signature_file(model), roots=AUTHORITY.roots, now=NOW)


@pytest.mark.parametrize(
    "change",
    [
        {"job_id": "digits-1a2c"},
        {"round_number": 8},
        {"session_id": b"\x04" * 32},
        {"file_sha256": b"\x01" * 32},
        {"model_digest": b"\x01" * 32},
        {"signed_at": NOW - 1},
        {"audit_head": b"\x07" * 32},
        {"audit_head": b"", "audit_size": 0},
        {"audit_size": 98},
    ],
    ids=lambda change: next(iter(change)),
)
def test_nothing_of_what_was_signed_can_be_changed(change: dict[str, object]) -> None:
    changed = SignedModel(statement(**change), signed().signature)
    with pytest.raises(SignatureRefused, match="or what it says was changed"):
        verify_signed(changed, roots=AUTHORITY.roots, now=NOW)


def test_no_two_statements_are_signed_alike() -> None:
    """Each field has its length: what is taken from one and given to the next makes other bytes."""
    one, other = statement(federation="ward", job_id="x1"), statement(federation="wardx", job_id="1")
    assert one.signed_bytes() != other.signed_bytes()
    assert statement(round_number=99, audit_size=7).signed_bytes() != statement().signed_bytes()


@pytest.mark.parametrize("role", [Role.PARTICIPANT, Role.OPERATOR, Role.RESEARCHER, Role.AUDITOR])
def test_only_a_coordinator_signs_models(role: Role) -> None:
    other = AUTHORITY.issue(role, "site-a", now=NOW - DAY)
    forged = sign_model(statement(certificate=der_of(other)), signer_of(other))
    with pytest.raises(IdentityError, match="coordinator is needed") as caught:
        verify_signed(forged, roots=AUTHORITY.roots, now=NOW)
    assert caught.value.problem is IdentityProblem.WRONG_ROLE


def test_a_coordinator_of_another_ca_or_federation_does_not_count() -> None:
    stranger = Authority.create("ward", now=NOW - DAY)
    other = stranger.issue(Role.COORDINATOR, "main", now=NOW - DAY, dns_names=["localhost"])
    forged = sign_model(statement(certificate=der_of(other)), signer_of(other))
    with pytest.raises(IdentityError, match="was not signed by the CA"):
        verify_signed(forged, roots=AUTHORITY.roots, now=NOW)
    with pytest.raises(IdentityError, match="is of the federation 'ward', not 'clinic'"):
        verify_signed(signed(federation="clinic"), roots=AUTHORITY.roots, now=NOW)


def test_another_coordinators_key_does_not_sign_for_this_one() -> None:
    other = AUTHORITY.issue(Role.COORDINATOR, "other", now=NOW - DAY, dns_names=["localhost"])
    with pytest.raises(SignatureRefused, match="is not by spiffe://ward/coordinator/main"):
        verify_signed(sign_model(statement(), signer_of(other)), roots=AUTHORITY.roots, now=NOW)


def test_a_model_outlives_its_signers_certificate_and_that_is_told() -> None:
    later = verify_signed(signed(), roots=AUTHORITY.roots, now=NOW + 60 * DAY)
    assert later.expired
    with pytest.raises(IdentityError, match="expired"):  # signed when the certificate was good no longer
        verify_signed(signed(signed_at=NOW + 31 * DAY), roots=AUTHORITY.roots, now=NOW + 60 * DAY)
    with pytest.raises(IdentityError, match="is not valid before"):
        verify_signed(signed(signed_at=NOW - 2 * DAY), roots=AUTHORITY.roots, now=NOW)


def test_a_signature_of_the_future_is_refused_but_for_clocks_that_differ() -> None:
    verify_signed(signed(signed_at=NOW + 290), roots=AUTHORITY.roots, now=NOW)
    with pytest.raises(SignatureRefused, match="400 s from now"):
        verify_signed(signed(signed_at=NOW + 400), roots=AUTHORITY.roots, now=NOW)


def test_a_revoked_coordinator_signs_nothing() -> None:
    serial = serial_bytes(x509.load_pem_x509_certificate(COORDINATOR.cert_pem))
    with pytest.raises(IdentityError, match="revoked"):
        verify_signed(signed(), roots=AUTHORITY.roots, now=NOW, is_revoked={serial})


# --- the file -------------------------------------------------------------------------------------------------------


def test_a_signature_is_written_and_read_in_one_form() -> None:
    data = signed().to_json()
    assert parse_signature(data, named="f") == signed()
    assert json.loads(data).keys() == {f.name for f in fields(ModelStatement)} | {"format", "signature"}
    initial = signed(round_number=0, session_id=b"", audit_head=b"", audit_size=0)
    assert parse_signature(initial.to_json(), named="f") == initial


def variants() -> dict[str, bytes]:
    data = signed().to_json()
    values = json.loads(data)

    def again(**changes: object) -> bytes:
        return json.dumps({**values, **changes}, sort_keys=True, separators=(",", ":")).encode() + b"\n"

    return {
        "nothing": b"",
        "no json": b"{",
        "a list": b"[]",
        "a number": b"7",
        "no newline": data[:-1],
        "pretty": json.dumps(values, indent=1).encode() + b"\n",
        "twice": data.replace(b'{"audit', b'{"format":"x","audit', 1),
        "more": again(comment="trust me"),
        "another format": again(format="maskwork-model-signature/v2"),
        "upper case": again(model_digest=DIGEST.hex().upper()),
        "short digest": again(model_digest=DIGEST.hex()[:-2]),
        "short signature": again(signature="00" * 63),
        "text for a number": again(round_number="7"),
        "true for a number": again(audit_size=True),
        "a number for text": again(job_id=7),
        "a round without a session": again(session_id=""),
        "negative": again(signed_at=-1),
        "missing": json.dumps({k: v for k, v in values.items() if k != "job_id"}).encode(),
        "deep": b"[" * 50_000,
        "long": data + b" " * (64 << 10),
        "binary": b"\xff\xfe",
    }


@pytest.mark.parametrize("name", variants())
def test_anything_else_is_refused_with_the_files_name(name: str) -> None:
    with pytest.raises(SignatureRefused, match=r"^f is not a model's signature"):
        parse_signature(variants()[name], named="f")


@pytest.mark.parametrize("field", ["job_id", "federation"])
def test_half_of_a_pair_of_surrogates_is_no_text(field: str) -> None:
    data = signed().to_json()
    value = json.loads(data)[field]
    told = data.replace(json.dumps(value).encode(), b'"\\ud800"')
    assert told != data
    with pytest.raises(SignatureRefused, match=r"m\.sig is not a model's signature"):
        parse_signature(told, named="m.sig")


def test_a_file_that_is_not_there_is_named(model: Path, tmp_path: Path) -> None:
    for paths in ((model, tmp_path / "no.sig"), (tmp_path / "no", signature_file(model))):
        with pytest.raises(UserError, match=r"/no.*cannot be read: No such file"):
            verified_model(*paths, roots=AUTHORITY.roots, now=NOW)


# --- the wire -------------------------------------------------------------------------------------------------------


def test_a_signature_survives_the_wire() -> None:
    raw = encode_signature(signed()).SerializeToString()
    assert decode_signature(jobs_pb2.ModelSignature.FromString(raw)) == signed()
    with pytest.raises(WireError, match="cannot be one"):
        decode_signature(jobs_pb2.ModelSignature(model_digest=b"short"))


# --- the audit log --------------------------------------------------------------------------------------------------


def standing(models: dict[tuple[str, int], bytes]) -> CommittedModels:
    """A log with these commits, that stood where every signature here says."""
    said = signed().statement
    heads = [bytes(32)] * (said.audit_size + 1)
    heads[said.audit_size] = said.audit_head or bytes(32)
    return CommittedModels(models, tuple(heads))


def test_the_audit_log_has_to_have_committed_this_very_model(model: Path) -> None:
    verified = verified_model(model, signature_file(model), roots=AUTHORITY.roots, now=NOW)
    log = Path("audit.log")
    check_audit(verified, standing({("digits-1a2b", 7): DIGEST, ("digits-1a2b", 8): bytes(32)}), log=log)
    for committed, says in (
        ({}, "has no commit of job digits-1a2b, round 7"),
        ({("digits-1a2b", 8): DIGEST, ("other", 7): DIGEST}, "has no commit"),
        ({("digits-1a2b", 7): bytes(32)}, f"committed the model {bytes(32).hex()}, not {DIGEST.hex()}"),
    ):
        with pytest.raises(UserError, match=says):
            check_audit(verified, standing(committed), log=log)
    initial = verify_signed(signed(round_number=0, session_id=b""), roots=AUTHORITY.roots, now=NOW)
    with pytest.raises(UserError, match="no round committed it"):
        check_audit(initial, standing({("digits-1a2b", 0): DIGEST}), log=log)


def test_the_audit_log_has_to_have_stood_where_the_signature_says() -> None:
    head, log = hashlib.sha256(b"head").digest(), Path("audit.log")
    models = {("digits-1a2b", 7): DIGEST}
    verified = verify_signed(signed(audit_head=head, audit_size=2), roots=AUTHORITY.roots, now=NOW)
    check_audit(verified, CommittedModels(models, (bytes(32), bytes(32), head)), log=log)
    for heads in ((bytes(32), head), (bytes(32), bytes(32), bytes(32), head)):
        with pytest.raises(UserError, match="head after 2 records"):
            check_audit(verified, CommittedModels(models, heads), log=log)


def test_an_audit_log_that_cannot_be_read_is_never_a_log_that_agrees(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        committed_models(tmp_path / "no-such-log", AUTHORITY.roots)


def test_the_command_says_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a CA of today: the command takes the time from the clock."""
    authority = Authority.create("ward", now=time.time() - 60)
    issued = authority.issue(Role.COORDINATOR, "main", now=time.time() - 60, dns_names=["localhost"])
    authority.write(tmp_path / "ca")
    path = tmp_path / "m"
    path.write_bytes(MODEL)
    said = statement(certificate=der_of(issued), signed_at=int(time.time()))
    write_signature(path, sign_model(said, signer_of(issued)))
    verify(path, tmp_path / "ca")
    out = capsys.readouterr().out
    for expected in ("spiffe://ward/coordinator/main", "job digits-1a2b, round 7", DIGEST.hex(), "99 records"):
        assert expected in out
    (tmp_path / "elsewhere").write_bytes(signature_file(path).read_bytes())
    verify(path, tmp_path / "ca" / "ca.pem", tmp_path / "elsewhere")
    path.write_bytes(b"another")
    with pytest.raises(UserError, match="not the file that was signed"):
        verify(path, tmp_path / "ca")
