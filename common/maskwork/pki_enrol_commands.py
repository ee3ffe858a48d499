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
from maskwork.net.tokens import MAX_TOKEN, Token, TokenBook
from maskwork.net.whole_files import write_whole
from maskwork.pki_request_commands import Ca, Fingerprints, Force, Name, RoleName, tell_installed

TOKEN_VARIABLE: Final = "MASKWORK_ENROLMENT_TOKEN"  # noqa: S105  # a variable's name
LONGEST_S: Final = 30 * 86400.0
_UNITS: Final = {"m": 60.0, "h": 3600.0, "d": 86400.0}

Coordinator = Annotated[str, typer.Option("--coordinator", help="HOST:PORT of the coordinator's enrolment port.")]
TokenText = Annotated[
    str,
    typer.Option("--token", envvar=TOKEN_VARIABLE, help="What `maskwork pki token` printed; others see arguments."),
]
TokenFile = Annotated[Path | None, typer.Option("--token-file", help="A file that holds it.", dir_okay=False)]
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
    out: Annotated[Path | None, typer.Option("--out", help="Write it there, for its owner alone to read.")] = None,
) -> None:
    """Make a token that lets one member enrol, once; says what to hand over."""
    if out is not None and out.exists():
        raise UserError(f"{out} already there, no token made: choose another file")
    authority, until = Authority.load(ca), time.time() + seconds(valid)
    made = TokenBook(ca).make(Identity(authority.federation, role, name), expires=until)
    who = "participant" if role is Role.PARTICIPANT else "pki"
    typer.echo(f"a token for {role}/{name}, until {utc_text(datetime.fromtimestamp(until, UTC))}; it is shown only now")
    typer.echo("  hand it over so that nobody else reads it, and the fingerprint by another way:")
    if out is not None:
        write_whole(out, f"{made.text}\n".encode(), private=True)
    typer.echo(f"  token        {made.text if out is None else out}")
    for root in authority.roots.certificates:
        typer.echo(f"  CA           {fingerprint_text(fingerprint(to_der(root)))}")
    typer.echo(f"  they run     maskwork {who} enrol --coordinator HOST:PORT --ca-fingerprint sha256:… --out DIR")


def enrol(
    coordinator: Coordinator,
    out: Out,
    token_text: TokenText = "",
    token_file: TokenFile = None,
    ca_fingerprint: Fingerprints = None,
    force: Force = False,
) -> None:
    """Make a key here, and have the coordinator certify it; the token says for whom."""
    enrol_as(None, coordinator, given_token(token_text, token_file), out, ca_fingerprint or [], force=force)


def renew(
    coordinator: Annotated[str, typer.Option("--coordinator", help="HOST:PORT that the coordinator listens on.")],
    identity: Annotated[Path, typer.Option("--identity", help="The identity directory.")],
) -> None:
    """Make a new key here, and have the coordinator certify it, with the certificate that is still good."""
    from maskwork import enrolment_client  # gRPC is loaded only where it is needed

    tell_renewed(identity, enrolment_client.renew(coordinator, identity).not_after)


def enrol_as(
    role: Role | None, coordinator: str, given: Token, out: Path, ca_fingerprints: list[str], *, force: bool
) -> None:
    """What both ``enrol`` commands do.

    Raises:
        UserError: It did not work.
    """
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


def given_token(text: str, file: Path | None) -> Token:
    """The token, from wherever it was given.

    Raises:
        UserError: It was given not at all, or is none, or its file cannot be read.
    """
    if file is not None:
        try:
            text = file.read_bytes()[: 2 * MAX_TOKEN].decode()
        except UnicodeDecodeError:
            text = ""
        except OSError as error:
            raise UserError(
                f"{file} cannot be read ({error.strerror}): expected the token that `maskwork pki token` made"
            ) from None
    if not text:
        raise UserError(f"give the enrolment token, in --token-file, in {TOKEN_VARIABLE} or with --token")
    return Token.parse(text)


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
