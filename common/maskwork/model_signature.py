"""What a coordinator says of a model that it hands out, signed; and how anybody checks that later, offline.

The statement says which job, round and session the file came out of, its SHA-256, when it was signed, and where the
coordinator's audit log stood. It travels with the model and lies beside it as ``FILE.sig``, one JSON object in
canonical form. The signature is over a labelled encoding in which every field has its length, never over the JSON.

It does NOT say that the model is a good one, nor that the coordinator is honest: it says which coordinator answers for
the file. Whether the round was committed is in the audit log; who took part and signed for it is there too.

Rules
1. One encoding: a file whose JSON is not byte for byte what `to_json` writes is refused.
2. The certificate is judged at the time that the signature carries, so that a model outlives the certificate. Whoever
   has the key of an expired certificate can write any time there: `Verified.expired` says when to think of that.
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from dataclasses import dataclass, fields
from typing import Final

from maskwork.errors import UserError
from maskwork.net.identity import Role, TrustRoots, VerifiedCertificate
from maskwork.secagg.keys import SIGNATURE_BYTES, Signer, verify_signature

CLOCKS_DIFFER_S: Final = 300
"""A signature may be this much from the future: clocks differ."""
MAX_FILE_BYTES: Final = 64 << 10
SUFFIX: Final = ".sig"
_FORMAT: Final = "maskwork-model-signature/v1"
_LABEL: Final = b"maskwork/model-signature/v1\0"
_DIGEST_BYTES: Final = 32


class SignatureRefused(UserError):
    """A model's signature is not one, or not by whom or of what it should be; the text says which."""


@dataclass(frozen=True, slots=True)
class ModelStatement:
    """What is said of one file.

    Attributes:
        federation: The federation.
        job_id: The job.
        round_number: The round that the model came out of; 0: the initial model, as it was submitted.
        session_id: The session of that round, 32 bytes; empty for the initial model.
        file_sha256: SHA-256 of the file.
        model_digest: The model's digest as plans and audit records name it; the same, while a model is one file.
        signed_at: Unix time in whole seconds, by the coordinator's clock.
        audit_head: Head of the coordinator's audit log then, 32 bytes; empty without one.
        audit_size: How many records that log had.
        certificate: The coordinator's, DER.

    Raises:
        ValueError: On construction, if a field cannot be so.
    """

    federation: str
    job_id: str
    round_number: int
    session_id: bytes
    file_sha256: bytes
    model_digest: bytes
    signed_at: int
    audit_head: bytes
    audit_size: int
    certificate: bytes

    def __post_init__(self) -> None:
        if len(self.file_sha256) != _DIGEST_BYTES or len(self.model_digest) != _DIGEST_BYTES:
            raise ValueError(f"a digest has {_DIGEST_BYTES} bytes")
        if len(self.session_id) not in (0, _DIGEST_BYTES) or len(self.audit_head) not in (0, _DIGEST_BYTES):
            raise ValueError(f"a session and an audit head have {_DIGEST_BYTES} bytes, or are left out")
        if bool(self.session_id) != bool(self.round_number) or (self.audit_size and not self.audit_head):
            raise ValueError("a round has a session, the initial model has none; an audit log has a head")
        if any(not 0 <= number < 1 << 63 for number in (self.round_number, self.signed_at, self.audit_size)):
            raise ValueError("a number is out of range")

    def signed_bytes(self) -> bytes:
        """What the signature covers: a label, then each field with its length."""
        parts = [
            value.to_bytes(8, "big") if isinstance(value, int) else value.encode() if isinstance(value, str) else value
            for value in (getattr(self, field.name) for field in fields(self))
        ]
        return _LABEL + b"".join(len(part).to_bytes(4, "big") + part for part in parts)


@dataclass(frozen=True, slots=True)
class SignedModel:
    """A statement with its signature: 64 bytes, r ‖ s."""

    statement: ModelStatement
    signature: bytes

    def to_json(self) -> bytes:
        """As it lies in a file: keys sorted, bytes in hexadecimal, one line."""
        values: dict[str, object] = {"format": _FORMAT, "signature": self.signature.hex()}
        for field in fields(self.statement):
            value = getattr(self.statement, field.name)
            values[field.name] = value.hex() if isinstance(value, bytes) else value
        return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode() + b"\n"


@dataclass(frozen=True, slots=True)
class Verified:
    """A signature that is good.

    Attributes:
        statement: What it says.
        signer: The coordinator.
        expired: Whether the coordinator's certificate has expired since it signed.
    """

    statement: ModelStatement
    signer: VerifiedCertificate
    expired: bool


def sign_model(statement: ModelStatement, signer: Signer) -> SignedModel:
    """Sign a statement with the key of the certificate that it names."""
    return SignedModel(statement, signer.sign(statement.signed_bytes()))


def parse_signature(data: bytes, *, named: str) -> SignedModel:
    """Read a signature's file; `named` is for errors. Proves nothing yet.

    Raises:
        SignatureRefused: It is not one.
    """
    try:
        if len(data) > MAX_FILE_BYTES:
            raise ValueError("too long")
        values = json.loads(data)
        if not isinstance(values, dict) or values.pop("format", None) != _FORMAT:
            raise ValueError("another format")
        signed = SignedModel(_statement(values), bytes.fromhex(_text(values, "signature")))
        if len(signed.signature) != SIGNATURE_BYTES or signed.to_json() != data:  # which is also without further keys
            raise ValueError("not in canonical form")
    except (ValueError, KeyError, RecursionError):
        raise SignatureRefused(
            f"{named} is not a model's signature as `maskwork model export` writes it: export the model again"
        ) from None
    return signed


def verify_signed(
    signed: SignedModel,
    *,
    roots: TrustRoots,
    now: float,
    is_revoked: Container[bytes] = frozenset(),
) -> Verified:
    """Check who signed: chain, role, federation, validity at the time of signing, revocation, signature.

    Args:
        signed: As it was received.
        roots: The federation's CA.
        now: Unix time in seconds.
        is_revoked: As in `TrustRoots.verify`.

    Raises:
        SignatureRefused: The signature is not good.
        IdentityError: The certificate is not.
    """
    said = signed.statement
    if said.signed_at > now + CLOCKS_DIFFER_S:
        raise SignatureRefused(
            f"the signature claims to be made {said.signed_at - now:.0f} s from now: check this machine's clock"
        )
    signer = roots.verify(
        said.certificate,
        now=said.signed_at,
        role=Role.COORDINATOR,
        federation=said.federation,
        is_revoked=is_revoked,
    )
    if not verify_signature(signer.public_key, signed.signature, said.signed_bytes()):
        raise SignatureRefused(f"the signature is not by {signer.identity.uri}, or what it says was changed")
    return Verified(said, signer, expired=signer.not_after < now)


def check_file(verified: Verified, file_sha256: bytes, *, named: str) -> None:
    """Check that the file is the one that was signed for.

    Raises:
        SignatureRefused: It is another one.
    """
    if verified.statement.file_sha256 != file_sha256:
        raise SignatureRefused(
            f"{named} is not the file that was signed: its SHA-256 is {file_sha256.hex()}, the signature is for "
            f"{verified.statement.file_sha256.hex()}"
        )


def _statement(values: Mapping[str, object]) -> ModelStatement:
    return ModelStatement(
        federation=_text(values, "federation"),
        job_id=_text(values, "job_id"),
        round_number=_number(values, "round_number"),
        session_id=bytes.fromhex(_text(values, "session_id")),
        file_sha256=bytes.fromhex(_text(values, "file_sha256")),
        model_digest=bytes.fromhex(_text(values, "model_digest")),
        signed_at=_number(values, "signed_at"),
        audit_head=bytes.fromhex(_text(values, "audit_head")),
        audit_size=_number(values, "audit_size"),
        certificate=bytes.fromhex(_text(values, "certificate")),
    )


def _text(values: Mapping[str, object], key: str) -> str:
    if not isinstance(value := values[key], str):
        raise ValueError(f"{key} is no text")
    value.encode()  # half of a pair of surrogates is no text either
    return value


def _number(values: Mapping[str, object], key: str) -> int:
    if type(value := values[key]) is not int:
        raise ValueError(f"{key} is no number")
    return value
