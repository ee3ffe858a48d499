"""``maskwork pki token``, ``enrol``, ``renew``: certificates from a coordinator that holds the CA's key.

A participant's operator types ``maskwork participant enrol`` and ``renew``, which are the same; every other role has
only these, since it has no group of commands of its own. gRPC is loaded only where it is needed.
"""

import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final

import typer

from maskwork.errors import UserError
from maskwork.net.authority import Authority
from maskwork.net.identity import Identity, IdentityFiles, Role, fingerprint, to_der
from maskwork.net.installing import fingerprint_text, parse_fingerprint
from maskwork.net.names import shortened, utc_text
from maskwork.net.tokens import Token, TokenBook
from maskwork.pki_request_commands import Ca, Fingerprints, Force, Name, RoleName, tell_installed

TOKEN_VARIABLE: Final = "MASKWORK_ENROLMENT_TOKEN"  # noqa: S105  # a variable's name
LONGEST_S: Final = 30 * 86400.0
_UNITS: Final = {"m": 60.0, "h": 3600.0, "d": 86400.0}

Coordinator = Annotated[str, typer.Option("--coordinator", help="HOST:PORT of the coordinator's enrolment port.")]
TokenText = Annotated[
    str,
    typer.Option("--token", envvar=TOKEN_VARIABLE, help="What `maskwork pki token` printed; better in the variable."),
]
Out = Annotated[Path, typer.Option("--out", help="The identity directory; made if missing.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands to the group ``maskwork pki``."""
    app.command("token")(token)
    app.command("enrol")(enrol)
    app.command("renew")(renew)


def token(
    role: RoleName,
    name: Name,
    ca: Ca,
    valid: Annotated[str, typer.Option("--valid", help="How long: 30m, 24h, 7d; at most 30d.")] = "24h",
) -> None:
    """Make a token that lets one member enrol, once; prints what to hand over."""
    authority, until = Authority.load(ca), time.time() + seconds(valid)
    made = TokenBook(ca).make(Identity(authority.federation, role, name), expires=until)
    who = "participant" if role is Role.PARTICIPANT else "pki"
    typer.echo(f"a token for {role}/{name}, until {utc_text(datetime.fromtimestamp(until, UTC))}; it is shown only now")
    typer.echo("  hand it over so that nobody else reads it, and the fingerprint by another way:")
    typer.echo(f"  token        {made.text}")
    for root in authority.roots.certificates:
        typer.echo(f"  CA           {fingerprint_text(fingerprint(to_der(root)))}")
    typer.echo(f"  they run     maskwork {who} enrol --coordinator HOST:PORT --ca-fingerprint sha256:… --out DIR")


def enrol(
    coordinator: Coordinator,
    token_text: TokenText,
    out: Out,
    ca_fingerprint: Fingerprints = None,
    force: Force = False,
) -> None:
    """Make a key here, and have the coordinator certify it; the token says for whom."""
    enrol_as(None, coordinator, token_text, out, ca_fingerprint or [], force=force)


def renew(
    coordinator: Annotated[str, typer.Option("--coordinator", help="HOST:PORT that the coordinator listens on.")],
    identity: Annotated[Path, typer.Option("--identity", help="The identity directory.")],
) -> None:
    """Make a new key here, and have the coordinator certify it, with the certificate that is still good."""
    from maskwork import enrolment_client  # gRPC is loaded only where it is needed

    tell_renewed(identity, enrolment_client.renew(coordinator, identity).not_after)


def enrol_as(
    role: Role | None, coordinator: str, token_text: str, out: Path, ca_fingerprints: list[str], *, force: bool
) -> None:
    """What both ``enrol`` commands do.

    Raises:
        UserError: It did not work.
    """
    given = Token.parse(token_text)
    if role is not None and given.role is not role:
        raise UserError(f"this token is for a {given.role}: use `maskwork pki enrol`")
    if not ca_fingerprints:
        raise UserError(
            "say which CA is to be trusted with --ca-fingerprint sha256:…, as its keeper says it: without it, anybody "
            "in between could be the coordinator, and get the token"
        )
    known = frozenset(map(parse_fingerprint, ca_fingerprints))
    from maskwork import enrolment_client  # gRPC is loaded only where it is needed

    verified = enrolment_client.enrol(coordinator, given, out, known=known, overwrite=force)
    files = IdentityFiles.in_directory(out)
    tell_installed(verified)
    typer.echo(f"  {files.ca}  {files.cert}  {files.key}")


def tell_renewed(directory: Path, not_after: float) -> None:
    """Say until when, and that nothing needs to be restarted."""
    until = utc_text(datetime.fromtimestamp(not_after, UTC))
    typer.echo(f"{directory}: renewed, valid until {until}; a service that uses it takes it up by itself")


def seconds(text: str) -> float:
    """A duration as people write it: ``30m``, ``24h``, ``7d``.

    Raises:
        UserError: It is none, or longer than a token may be good for.
    """
    match = re.fullmatch(r"([1-9][0-9]{0,5})([mhd])", text.strip())
    if match is None:
        raise UserError(f"{shortened(text)} is not a duration: expected one like 30m, 24h or 7d")
    found = int(match[1]) * _UNITS[match[2]]
    if found > LONGEST_S:
        raise UserError(f"a token is good for at most {LONGEST_S / 86400:.0f} days, not {text}")
    return found
