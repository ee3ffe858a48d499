"""``maskwork pki``: make a federation's CA, issue its members' certificates, look at certificates.

It is NOT the authority itself (`maskwork.net.authority`) and judges nothing (`maskwork.net.identity`): it reads
arguments and the clock, and words the outcome. It imports neither gRPC nor torch.
"""

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from rich.console import Console
from rich.text import Text

from maskwork import pki_enrol_commands, pki_request_commands
from maskwork.net.authority import (
    CA_CERTIFICATE_FILE,
    CA_DAYS,
    CA_KEY_FILE,
    LEAF_DAYS,
    Authority,
    refuse_existing,
)
from maskwork.net.diagnosis import check_own_files
from maskwork.net.identity import (
    ROOTS_EXPECTED,
    IdentityError,
    IdentityFiles,
    IdentityProblem,
    Role,
    TrustRoots,
    certificate_identity,
    check_profile,
    fingerprint,
    load_certificate,
    read_identity_file,
    read_key_file,
    serial_bytes,
    to_der,
)
from maskwork.net.names import named, utc_text
from maskwork.net.register import Register
from maskwork.net.whole_files import open_to_others
from maskwork.pki_register_commands import EXPIRES_SOON_S, add_to

app = typer.Typer(
    help="Make a federation's CA, issue certificates, look at them.", no_args_is_help=True, add_completion=False
)

add_to(app)
pki_request_commands.add_to(app)
pki_enrol_commands.add_to(app)

Force = Annotated[bool, typer.Option("--force", help="Replace files that exist.")]


@app.command("init")
def init(
    federation: Annotated[str, typer.Option("--federation", help="Name of the federation: a-z, 0-9, '-', '.', '_'.")],
    out: Annotated[Path, typer.Option("--out", help="Directory for ca.pem and ca-key.pem; made if missing.")],
    days: Annotated[int, typer.Option("--days", min=1, help="Validity.")] = CA_DAYS,
    force: Force = False,
) -> None:
    """Make a federation's certificate authority."""
    authority = Authority.create(federation, now=time.time(), days=days)
    authority.write(out, overwrite=force)
    typer.echo(f"CA of {federation}, valid until {utc_text(authority.certificate.not_valid_after_utc)}")
    typer.echo(f"  {out / CA_CERTIFICATE_FILE}  give this to every member")
    typer.echo(f"  {out / CA_KEY_FILE}  keep this offline: who holds it can name new members")


@app.command("issue")
def issue(
    role: Annotated[Role, typer.Argument(help="What the member is.")],
    name: Annotated[str, typer.Argument(help="Its name, unique per role: a-z, 0-9, '-', '.', '_'.")],
    ca: Annotated[Path, typer.Option("--ca", help="Directory that `maskwork pki init` wrote.")],
    out: Annotated[Path, typer.Option("--out", help="Directory for ca.pem, cert.pem, key.pem; made if missing.")],
    dns: Annotated[list[str] | None, typer.Option("--dns", help="Host name of a coordinator; may be repeated.")] = None,
    ip: Annotated[list[str] | None, typer.Option("--ip", help="Address of a coordinator; may be repeated.")] = None,
    days: Annotated[int, typer.Option("--days", min=1, help="Validity.")] = LEAF_DAYS,
    force: Force = False,
) -> None:
    """Make a member's key and certificate."""
    now = time.time()
    authority = Authority.load(ca)
    refuse_existing(IdentityFiles.in_directory(out), overwrite=force)
    issued = authority.issue(role, name, now=now, days=days, dns_names=dns or (), ip_addresses=ip or ())
    Register(ca).record(x509.load_pem_x509_certificate(issued.cert_pem))
    files = issued.write(out, overwrite=force)
    verified = check_own_files(files, now=now, role=role, roots=authority.roots)
    typer.echo(f"{verified.identity.uri}, valid until {_moment(verified.not_after)}")
    typer.echo(f"  {files.ca}  {files.cert}  {files.key}")


@app.command("show")
def show(
    files: Annotated[list[Path], typer.Argument(help="Certificates, keys, or directories that hold them.")],
    ca: Annotated[Path | None, typer.Option("--ca", help="ca.pem, or its directory, to verify against.")] = None,
) -> None:
    """Say who each certificate is, until when, and what is wrong with it; exit code 1 if something is."""
    now = time.time()
    reports = [_report(path, ca, now) for path in files]
    for report in reports:
        report.print(Console(highlight=False))
    if any(report.problem for report in reports):
        raise typer.Exit(1)


@dataclass(frozen=True, slots=True)
class Report:
    """What `show` says about one file or directory: rows of (what, value), and the problem if there is one."""

    path: Path
    rows: tuple[tuple[str, str], ...]
    problem: str | None
    note: str | None = None

    def print(self, console: Console) -> None:
        """Print one line per row, never wrapped: paths and fingerprints are copied from here."""
        verdict = Text(self.problem, "red") if self.problem else Text(self.note or "good", "green")
        lines = [*((what, Text(value)) for what, value in self.rows), ("verdict", verdict)]
        console.print(Text(str(self.path), "bold"), soft_wrap=True)
        for what, value in lines:
            console.print(Text(f"  {what:<12} ", "dim").append_text(value), soft_wrap=True)


def _report(path: Path, ca: Path | None, now: float) -> Report:
    rows: list[tuple[str, str]] = []
    try:
        rows = _rows(_certificate_file(path), now)
        note = _judge(path, ca, now)
    except IdentityError as error:
        return Report(path, tuple(rows), error.text)
    return Report(path, tuple(rows), None, note)


def _certificate_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    files = IdentityFiles.in_directory(path)
    return files.cert if files.cert.exists() else files.ca


def _rows(path: Path, now: float) -> list[tuple[str, str]]:
    if b"PRIVATE KEY" in read_identity_file(path):
        return [("what", "a private key"), *_mode_rows(path)]
    if _is_bundle(path):
        roots = TrustRoots.from_file(path).certificates
        until = [f"{fingerprint(to_der(root)).hex()} until {utc_text(root.not_valid_after_utc)}" for root in roots]
        return [("who", f"{len(roots)} certificate authorities"), *(("fingerprint", text) for text in until)]
    certificate = load_certificate(path)
    rows = [("subject", named(certificate.subject)), ("signed by", named(certificate.issuer))]
    try:
        identity = certificate_identity(certificate)
    except IdentityError:
        if not _is_ca(certificate):
            raise
        rows.insert(0, ("who", "a certificate authority"))
    else:
        rows[:0] = [("who", identity.uri), ("role", identity.role.value), ("name", identity.name)]
        rows.append(("hosts", ", ".join(_hosts(certificate)) or "none: it only dials out"))
    remaining_s = certificate.not_valid_after_utc.timestamp() - now
    soon = f", in {remaining_s / 86400:.0f} days" if 0 < remaining_s < EXPIRES_SOON_S else ""
    rows.append(("valid from", utc_text(certificate.not_valid_before_utc)))
    rows.append(("valid until", utc_text(certificate.not_valid_after_utc) + soon))
    rows.append(("serial", serial_bytes(certificate).hex()))
    rows.append(("fingerprint", fingerprint(to_der(certificate)).hex()))
    return rows


def _judge(path: Path, ca: Path | None, now: float) -> str | None:
    """Raise what is wrong with `path`; return what could not be checked for want of a CA."""
    files = IdentityFiles.in_directory(path)
    if path.is_dir() and files.cert.exists():
        check_own_files(files, now=now, roots=_roots(ca) if ca else None)
        return None
    file = _certificate_file(path)
    if b"PRIVATE KEY" in read_identity_file(file):
        _judge_key(file)
        return None
    if _is_bundle(file):
        roots = TrustRoots.from_file(file)
        roots.check_validity(now)
        return "; ".join(roots.out_of_date(now)) or None
    certificate = load_certificate(file)
    if _is_ca(certificate):
        _judge_ca(certificate, file, ca, now=now)
        return None
    if ca is None:
        check_profile(certificate, now=now)
        return "nothing wrong that can be seen without the CA: add --ca ca.pem"
    _roots(ca).verify(to_der(certificate), now=now)
    return None


def _is_bundle(path: Path) -> bool:
    """Whether a file holds several certificates: both CAs, while one replaces the other."""
    return read_identity_file(path).count(b"BEGIN CERTIFICATE") > 1


def _judge_ca(certificate: x509.Certificate, file: Path, ca: Path | None, *, now: float) -> None:
    TrustRoots([certificate], source=str(file)).check_validity(now)
    if ca is not None and certificate not in _roots(ca).certificates:
        raise IdentityError(IdentityProblem.WRONG_CA, f"{file} is another CA than the one in {ca}")


def _judge_key(file: Path) -> None:
    key_pem = read_key_file(file)
    try:
        load_pem_private_key(key_pem, password=None)
    except (ValueError, TypeError):
        raise IdentityError(
            IdentityProblem.MALFORMED, f"{file}: not an unencrypted PEM private key: restore it, or issue a new pair"
        ) from None


def _mode_rows(path: Path) -> list[tuple[str, str]]:
    return [("readable by", "others too" if open_to_others(path.stat()) else "its owner alone")]


def _roots(ca: Path) -> TrustRoots:
    return TrustRoots.from_file(ca / CA_CERTIFICATE_FILE if ca.is_dir() else ca, expected=ROOTS_EXPECTED)


def _is_ca(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (ValueError, x509.ExtensionNotFound):
        return False


def _hosts(certificate: x509.Certificate) -> list[str]:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]


def _moment(unix_s: float) -> str:
    return utc_text(datetime.fromtimestamp(unix_s, UTC))
