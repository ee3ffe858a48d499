"""``maskwork pki list``, ``revoke``, ``refresh-list``, ``successor``, ``take-over``: what a CA's keeper does.

It is NOT the register (`maskwork.net.register`) nor the maker of lists (`maskwork.net.revoking`): it reads arguments
and the clock, and words the outcome. It imports neither gRPC nor torch.
"""

import json
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from maskwork.errors import UserError
from maskwork.net.authority import CA_CERTIFICATE_FILE, CA_EXPECTED, ROOTS_FILE, Authority
from maskwork.net.identity import Role, TrustRoots, fingerprint, to_der
from maskwork.net.names import shortened, utc_text
from maskwork.net.register import IssuedCertificate, Register
from maskwork.net.revocation import LIST_FILE, SERIAL_BYTES, Reason, RevocationList
from maskwork.net.revoking import LIST_DAYS, begin_rollover, current_list, next_list, take_over

EXPIRES_SOON_S: Final = 30 * 86400
PIPE_WIDTH: Final = 240
_HEX: Final = re.compile(r"[0-9a-f]{1,40}", re.ASCII)
_STYLES: Final = {"good": "green", "soon": "yellow", "expired": "dim", "revoked": "red"}

Ca = Annotated[Path, typer.Option("--ca", help="Directory that `maskwork pki init` wrote.")]
Days = Annotated[int, typer.Option("--days", min=1, help="Until when the list after this one is due.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands to the group ``maskwork pki``."""
    app.command("list")(list_issued)
    app.command("revoke")(revoke)
    app.command("refresh-list")(refresh_list)
    app.command("successor")(successor)
    app.command("take-over")(take_over_from)


def list_issued(ca: Ca, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Who has a certificate of this CA, until when, and which are revoked."""
    now, roots = time.time(), _roots(ca)
    withdrawn = current_list(ca, roots, now=now)
    lines = _lines(Register(ca).certificates(), withdrawn, roots, now=now)
    if as_json:
        typer.echo(
            json.dumps({"list": _list_json(withdrawn), "certificates": [line.json() for line in lines]}, indent=2)
        )
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PIPE_WIDTH)
    console.print(_table(lines, several=len(roots.certificates) > 1))
    console.print(_list_text(withdrawn, now=now), soft_wrap=True)


def revoke(
    ca: Ca,
    name: Annotated[str, typer.Argument(help="The member's name: every unexpired certificate of it is revoked.")] = "",
    role: Annotated[Role | None, typer.Option("--role", help="Its role, if several roles have the name.")] = None,
    serial: Annotated[str, typer.Option("--serial", help="One certificate, by its serial number in hex.")] = "",
    reason: Annotated[Reason, typer.Option("--reason", help="Why; everybody can read it.")] = Reason.UNSPECIFIED,
    days: Days = LIST_DAYS,
) -> None:
    """Withdraw a member's certificates: writes the next revocation list."""
    now, authority = time.time(), Authority.load(ca)
    if bool(name) == bool(serial):
        raise UserError("say whose certificates are to be revoked: a NAME, or --serial, not both")
    chosen = {_serial(serial)} if serial else _serials_of(ca, name, role, now=now)
    known = {line.serial for line in Register(ca).certificates()}
    already = current_list(ca, authority.roots, now=now)
    if fresh := sorted(chosen - already.serials):
        made = next_list(authority, ca, now=now, days=days, withdrawn=dict.fromkeys(fresh, reason))
        typer.echo(f"revoked: {len(fresh)} certificate{'s' if len(fresh) > 1 else ''}, {reason}")
        for one in fresh:
            doubt = "" if one in known else "  not on the register: compare it with the certificate"
            typer.echo(f"  {one.hex()}{doubt}")
        _tell(made, ca)
        return
    raise UserError(
        f"nothing to revoke: every certificate meant is on list {already.number} already. "
        "If it does not take effect, put that list where the coordinator reads it"
    )


def refresh_list(
    ca: Ca,
    days: Days = LIST_DAYS,
    number_above: Annotated[
        int, typer.Option("--number-above", min=0, help="Exceed this number too, if the newest list here was lost.")
    ] = 0,
) -> None:
    """Write the next revocation list with nothing new on it: sites refuse lists that are too old."""
    _tell(next_list(Authority.load(ca), ca, now=time.time(), days=days, number_above=number_above), ca)


def successor(
    ca: Annotated[Path, typer.Option("--ca", help="Directory of the CA to be replaced.")],
    out: Annotated[Path, typer.Option("--out", help="Directory of the new one; made if missing.")],
) -> None:
    """Make the CA that will replace another; the old one goes on signing until `take-over`."""
    made = begin_rollover(Authority.load(ca), ca, out, now=time.time())
    typer.echo(f"CA of {made.federation}, valid until {utc_text(made.certificate.not_valid_after_utc)}")
    typer.echo(f"  {out / ROOTS_FILE}  both CA certificates: give this to everybody, in place of ca.pem")
    typer.echo(f"  then, when everybody has it: maskwork pki take-over --ca {out} --old {ca}")


def take_over_from(
    ca: Annotated[Path, typer.Option("--ca", help="Directory of the new CA.")],
    old: Annotated[Path, typer.Option("--old", help="Directory of the CA that it replaces.")],
    days: Days = LIST_DAYS,
) -> None:
    """Let the new CA sign from now on: it takes over the register and the list, whose numbers go on."""
    made = take_over(Authority.load(ca), old, ca, now=time.time(), days=days)
    typer.echo(f"{ca} signs from now on; {old} does not any more")
    _tell(made, ca)


@dataclass(frozen=True, slots=True)
class Line:
    """One certificate as `list` shows it; `issued` is None for one that is revoked and not on the register."""

    serial: bytes
    issued: IssuedCertificate | None
    status: str
    revoked: str
    reason: str
    root: str

    def json(self) -> dict[str, str | None]:
        """For ``--json``."""
        issued = self.issued
        return {
            "identity": None if issued is None else issued.identity.uri,
            "role": None if issued is None else issued.identity.role.value,
            "name": None if issued is None else issued.identity.name,
            "serial": self.serial.hex(),
            "fingerprint": None if issued is None else issued.fingerprint.hex(),
            "valid_from": None if issued is None else _iso(issued.not_before),
            "valid_until": None if issued is None else _iso(issued.not_after),
            "status": self.status,
            "revoked_at": self.revoked or None,
            "reason": self.reason or None,
            "ca": self.root or None,
        }

    def row(self) -> tuple[str, str, str, str, Text, str]:
        """For the table."""
        said = Text(self.status, _STYLES[self.status])
        why = f"{self.revoked}, {self.reason}" if self.revoked else ""
        if self.issued is None:
            return "not on the register", "", self.serial.hex(), "", said, why
        who = self.issued.identity
        return who.name, who.role.value, self.issued.fingerprint.hex(), _moment(self.issued.not_after), said, why


def _lines(
    issued: Iterable[IssuedCertificate], withdrawn: RevocationList, roots: TrustRoots, *, now: float
) -> list[Line]:
    lines, known = [], set()
    for one in issued:
        entry = withdrawn.revoked.get(one.serial)
        known.add(one.serial)
        root = roots.issuer_of(one.certificate)
        lines.append(
            Line(
                one.serial,
                one,
                "revoked" if entry is not None else _status(one, now),
                "" if entry is None else _iso(entry.at),
                "" if entry is None else entry.reason.value,
                "" if root is None else fingerprint(to_der(root)).hex(),
            )
        )
    for serial, entry in withdrawn.revoked.items():
        if serial not in known:
            lines.append(Line(serial, None, "revoked", _iso(entry.at), entry.reason.value, ""))
    return lines


def _status(one: IssuedCertificate, now: float) -> str:
    if one.not_after < now:
        return "expired"
    return "soon" if one.not_after < now + EXPIRES_SOON_S else "good"


def _table(lines: Iterable[Line], *, several: bool) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("name", "role", "fingerprint", "valid until", "", "revoked"):
        table.add_column(heading, no_wrap=True)
    if several:
        table.add_column("signed by", no_wrap=True)
    for line in lines:
        table.add_row(*line.row(), *([f"CA {line.root[:8]}"] if several and line.root else []))
    return table


def _list_text(withdrawn: RevocationList, *, now: float) -> Text:
    if not withdrawn.number:
        return Text("no revocation list yet: `maskwork pki refresh-list` makes the first", "dim")
    due = f"revocation list {withdrawn.number} of {_moment(withdrawn.this_update)}, the next due by "
    late = now > withdrawn.next_update
    remedy = ": overdue, run `maskwork pki refresh-list`" if late else ""
    return Text(f"{due}{_moment(withdrawn.next_update)}{remedy}", "red" if late else "dim")


def _list_json(withdrawn: RevocationList) -> dict[str, str | int] | None:
    if not withdrawn.number:
        return None
    return {
        "number": withdrawn.number,
        "digest": withdrawn.digest.hex(),
        "this_update": _iso(withdrawn.this_update),
        "next_update": _iso(withdrawn.next_update),
    }


def _tell(made: RevocationList, ca: Path) -> None:
    typer.echo(f"revocation list {made.number}, the next due by {_moment(made.next_update)}")
    typer.echo(f"  {ca / LIST_FILE}  put this where the coordinator reads it: it takes effect within seconds")


def _serials_of(ca: Path, name: str, role: Role | None, *, now: float) -> set[bytes]:
    found = [line for line in Register(ca).of_name(name, role) if line.not_after >= now]
    roles = sorted({line.identity.role.value for line in found})
    if len(roles) > 1:
        raise UserError(f"{shortened(name)} is the name of several members ({', '.join(roles)}): choose with --role")
    if not found:
        raise UserError(
            f"the register of {ca} has no unexpired certificate of {shortened(name)}: see `maskwork pki list`; one of "
            "before there was a register is revoked by --serial, which `maskwork pki show` prints"
        )
    return {line.serial for line in found}


def _serial(text: str) -> bytes:
    digits = text.replace(":", "").lower()
    # RFC 5280 section 4.1.2.2: positive, and within 20 bytes with a sign.
    if not _HEX.fullmatch(digits) or not 0 < (number := int(digits, 16)) < 1 << 8 * SERIAL_BYTES - 1:
        raise UserError(
            f"{shortened(text)} is no serial number: expected up to {2 * SERIAL_BYTES} hex digits, "
            "as `maskwork pki list --json` and `maskwork pki show` print them"
        )
    return number.to_bytes(SERIAL_BYTES, "big")


def _roots(ca: Path) -> TrustRoots:
    both = ca / ROOTS_FILE
    return TrustRoots.from_file(both if both.exists() else ca / CA_CERTIFICATE_FILE, expected=CA_EXPECTED)


def _moment(unix_s: float) -> str:
    return utc_text(datetime.fromtimestamp(unix_s, UTC))


def _iso(unix_s: float) -> str:
    return datetime.fromtimestamp(int(unix_s), UTC).isoformat().replace("+00:00", "Z")
