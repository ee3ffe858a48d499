"""``maskwork model verify``: is this the file that a coordinator signed for, and did its federation commit it?

Offline: it takes the file, its signature, the federation's CA certificate, and the audit log if there is one to hand.
It judges nothing itself (`maskwork.model_signature` does, and `maskwork.audit` reads logs); it words the outcome.
"""

from __future__ import annotations

import secrets
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from maskwork.audit.committed import CommittedModels, committed_models
from maskwork.errors import StoreError, UserError
from maskwork.model_signature import (
    MAX_FILE_BYTES,
    SUFFIX,
    SignedModel,
    Verified,
    check_file,
    parse_signature,
    verify_signed,
)
from maskwork.net.authority import CA_CERTIFICATE_FILE
from maskwork.net.identity import ROOTS_EXPECTED, TrustRoots
from maskwork.net.names import utc_text
from maskwork.tensors import model_digest


def signature_file(model: Path) -> Path:
    """Where a model's signature lies: beside it."""
    return model.with_name(model.name + SUFFIX)


def write_signature(model: Path, signed: SignedModel) -> Path:
    """Write a model's signature beside it, whole or not at all.

    Raises:
        StoreError: It cannot be written.
    """
    path = signature_file(model)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        temporary.write_bytes(signed.to_json())
        temporary.replace(path)
    except OSError as error:
        raise StoreError.from_cause(error, file=path) from None
    finally:
        temporary.unlink(missing_ok=True)
    return path


def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The exported model.", dir_okay=False)],
    ca: Annotated[Path, typer.Option("--ca", help="ca.pem of the federation, or its directory.")],
    signature: Annotated[
        Path | None, typer.Option("--signature", metavar="FILE.sig", help="Its signature; else FILE.sig beside it.")
    ] = None,
    audit: Annotated[
        Path | None,
        typer.Option("--audit", metavar="LOG", help="Look for the round in the coordinator's audit log too."),
    ] = None,
) -> None:
    """Say which coordinator signed a model and which round it came out of; exit code 1 if anything is not so."""
    signature, roots = signature or signature_file(file), _roots(ca)
    verified = verified_model(file, signature, roots=roots, now=time.time())
    said = verified.statement
    typer.echo(f"{file}: signed by {verified.signer.identity.uri} at {_moment(said.signed_at)}")
    came = f"round {said.round_number}, session {said.session_id.hex()}" if said.round_number else "its initial model"
    typer.echo(f"  job {said.job_id}, {came}")
    typer.echo(f"  SHA-256 {said.file_sha256.hex()}")
    if said.audit_head:
        typer.echo(f"  audit log then: {said.audit_size} records, head {said.audit_head.hex()}")
    if verified.expired:
        typer.echo(
            f"  the signer's certificate expired at {_moment(verified.signer.not_after)}; the signature is judged at "
            "the time that it carries, which whoever holds that key could make up: see that the audit log agrees"
        )
    if audit is not None:
        check_audit(verified, committed_models(audit, roots), log=audit)
        typer.echo(f"  {audit}: that round committed this model")


def verified_model(file: Path, signature: Path, *, roots: TrustRoots, now: float) -> Verified:
    """The signature of a file, once everything about it is good.

    Raises:
        UserError: One of the two cannot be read, or is not what it should be.
    """
    try:
        with signature.open("rb") as opened:
            data = opened.read(MAX_FILE_BYTES + 1)
        digest = model_digest(file)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from None
    verified = verify_signed(parse_signature(data, named=str(signature)), roots=roots, now=now)
    check_file(verified, digest, named=str(file))
    return verified


def check_audit(verified: Verified, committed: CommittedModels, *, log: Path) -> None:
    """Check that the audit log has the round, with this very model, and stood once where the signature says.

    Raises:
        UserError: It has not.
    """
    said = verified.statement
    if not said.round_number:
        raise UserError(f"{log}: this is the initial model of job {said.job_id}; no round committed it")
    if said.audit_head and (
        said.audit_size >= len(committed.heads) or committed.heads[said.audit_size] != said.audit_head
    ):
        raise UserError(
            f"{log} is not the log that the coordinator kept when it signed: its head after {said.audit_size} records "
            "is another, or it ends before. Keep both files: together they show that history was rewritten"
        )
    found = committed.models.get((said.job_id, said.round_number))
    where = f"job {said.job_id}, round {said.round_number}"
    if found is None:
        raise UserError(f"{log} has no commit of {where}: it is another log, or ends before, or the signature lies")
    if found != said.model_digest:
        raise UserError(f"{log}: {where} committed the model {found.hex()}, not {said.model_digest.hex()}")


def _roots(ca: Path) -> TrustRoots:
    return TrustRoots.from_file(ca / CA_CERTIFICATE_FILE if ca.is_dir() else ca, expected=ROOTS_EXPECTED)


def _moment(unix_s: float) -> str:
    return utc_text(datetime.fromtimestamp(unix_s, UTC))
