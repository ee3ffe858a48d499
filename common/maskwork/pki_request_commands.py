"""``maskwork pki request``, ``sign``, ``install``: a certificate for a key that never leaves its machine, off-line.

It is NOT the request (`maskwork.net.requests`), the authority or the directory (`maskwork.net.installing`): it reads
arguments and the clock, asks the signer, and words the outcome. It imports neither gRPC nor torch.
"""

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from cryptography.hazmat.primitives.serialization import Encoding

from maskwork.errors import UserError
from maskwork.net.authority import LEAF_DAYS, Authority, AuthorityError
from maskwork.net.identity import Identity, Role, VerifiedCertificate, fingerprint, read_identity_file, to_der
from maskwork.net.installing import (
    RequestFiles,
    check_new,
    fingerprint_text,
    parse_fingerprint,
    refuse_existing,
)
from maskwork.net.names import utc_text
from maskwork.net.register import Register, check_may_sign
from maskwork.net.requests import CertificateRequest, key_fingerprint, new_request, read_request, sign_request
from maskwork.net.whole_files import write_whole

RoleName = Annotated[Role, typer.Argument(help="What the member is.")]
Name = Annotated[str, typer.Argument(help="Its name, unique per role: a-z, 0-9, '-', '.', '_'.")]
Ca = Annotated[Path, typer.Option("--ca", help="Directory that `maskwork pki init` wrote.")]
Dns = Annotated[list[str] | None, typer.Option("--dns", help="Host name of a coordinator; may be repeated.")]
Ip = Annotated[list[str] | None, typer.Option("--ip", help="Address of a coordinator; may be repeated.")]
Fingerprints = Annotated[
    list[str] | None,
    typer.Option("--ca-fingerprint", help="sha256:… of the CA, as its keeper says it; twice while a CA is replaced."),
]
Force = Annotated[bool, typer.Option("--force", help="Replace files that exist.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands to the group ``maskwork pki``."""
    app.command("request")(request)
    app.command("sign")(sign)
    app.command("install")(install)


def request(
    role: RoleName,
    name: Name,
    federation: Annotated[str, typer.Option("--federation", help="Name of the federation, as its operator says it.")],
    out: Annotated[Path, typer.Option("--out", help="The identity directory; made if missing.")],
    dns: Dns = None,
    ip: Ip = None,
    force: Annotated[bool, typer.Option("--force", help="Begin anew although a request is under way.")] = False,
) -> None:
    """Make a key that stays here, and a request for a certificate for it."""
    identity, files = Identity(federation, role, name), RequestFiles.in_directory(out)
    if files.key.exists() and not force:
        raise UserError(
            f"{files.key} is there already: send {files.request} to the CA's keeper, or begin anew with --force "
            "(a certificate for the key before is of no use then)"
        )
    key = files.new_key()
    files.write(new_request(key, identity, dns_names=dns or (), ip_addresses=ip or ()))
    typer.echo(f"{identity.uri} asks for a certificate")
    typer.echo(f"  {files.request}  send this to the CA's keeper")
    typer.echo(f"  {files.key}  stays here")
    typer.echo(f"key {fingerprint_text(key_fingerprint(key.public_key()))}: read it to the CA's keeper")


def sign(
    request_file: Annotated[Path, typer.Argument(metavar="REQUEST", help="What `maskwork pki request` wrote.")],
    ca: Ca,
    out: Annotated[Path, typer.Option("--out", help="File for the certificate.")],
    role: Annotated[Role | None, typer.Option("--role", help="The role that you expect.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="The name that you expect.")] = None,
    dns: Annotated[list[str] | None, typer.Option("--dns", help="Host name that you expect; may be repeated.")] = None,
    ip: Annotated[list[str] | None, typer.Option("--ip", help="Address that you expect; may be repeated.")] = None,
    days: Annotated[int, typer.Option("--days", min=1, help="Validity.")] = LEAF_DAYS,
    force: Force = False,
) -> None:
    """Sign a member's request; asks first, unless you say role, name and host names yourself."""
    now, authority = time.time(), Authority.load(ca)
    check_may_sign(ca)
    if out.exists() and not force:
        raise AuthorityError(f"{out} already there, nothing signed: choose another file, or replace with --force")
    asked = read_request(
        read_identity_file(request_file, expected="expected the request.pem that `maskwork pki request` wrote"),
        federation=authority.federation,
        source=str(request_file),
    )
    typer.echo(f"{asked.identity.uri} asks for a certificate")
    typer.echo(f"  key    {fingerprint_text(asked.key_fingerprint)}")
    typer.echo(f"  hosts  {', '.join(asked.hosts) or 'none: it only dials out'}")
    _check_expected(asked, role=role, name=name, hosts=[*(dns or ()), *(ip or ())])
    certificate = sign_request(authority, asked, now=now, days=days)
    Register(ca).record(certificate)
    bundle = [certificate, *authority.roots.certificates]
    write_whole(out, b"".join(one.public_bytes(Encoding.PEM) for one in bundle))
    typer.echo(f"signed, valid until {utc_text(certificate.not_valid_after_utc)}")
    typer.echo(f"  {out}  send this back; it is no secret")
    for root in authority.roots.certificates:
        typer.echo(f"CA {fingerprint_text(fingerprint(to_der(root)))}: tell it by another way than the file's")


def install(
    certificate: Annotated[Path, typer.Option("--certificate", help="What `maskwork pki sign` wrote.")],
    into: Annotated[Path, typer.Option("--into", help="The identity directory that holds the request.")],
    ca_fingerprint: Fingerprints = None,
    force: Force = False,
) -> None:
    """Put a signed certificate beside its key; a service that uses the directory takes it up by itself."""
    refuse_existing(into, overwrite=force)
    new = check_new(
        read_identity_file(certificate, expected="expected what `maskwork pki sign` wrote"),
        into,
        now=time.time(),
        known=frozenset(map(parse_fingerprint, ca_fingerprint or ())),
        source=str(certificate),
    )
    files = new.write(into, overwrite=force)
    tell_installed(new.certificate)
    typer.echo(f"  {files.ca}  {files.cert}  {files.key}")


def tell_installed(certificate: VerifiedCertificate) -> None:
    """Say who one is now, and until when."""
    until = datetime.fromtimestamp(certificate.not_after, UTC)
    typer.echo(f"{certificate.identity.uri}, valid until {utc_text(until)}")


def _check_expected(asked: CertificateRequest, *, role: Role | None, name: str | None, hosts: list[str]) -> None:
    """What the signer stated must be so; what it did not state, it is asked."""
    identity = asked.identity
    if role is not None and role is not identity.role:
        raise UserError(f"not signed: the request is for the role {identity.role!s}, and you expect {role!s}")
    if name is not None and name != identity.name:
        raise UserError(f"not signed: the request is for the name {identity.name!r}, and you expect {name!r}")
    if hosts and {host.lower() for host in hosts} != {host.lower() for host in asked.hosts}:
        raise UserError(
            f"not signed: the request is for the hosts {', '.join(asked.hosts)}, and you expect {', '.join(hosts)}"
        )
    if role is None or name is None or (asked.hosts and not hosts):
        question = "Is this who asked you, and did they read you this key?"
        if not typer.confirm(question):
            raise UserError("not signed")
