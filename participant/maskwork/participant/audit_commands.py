"""`maskwork participant accept-history`, and the opening of a site's trail with what the ledger knows of it.

To go on from another history of the coordinator's is an act of the site's operator, never of the agent.
"""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from maskwork.errors import StoreError, UserError
from maskwork.net.diagnosis import check_own_files, load_private_key
from maskwork.net.identity import IdentityFiles, Role, VerifiedCertificate
from maskwork.participant.audit import LOG_NAME, SiteTrail, is_held, lacking
from maskwork.participant.config import ParticipantConfig, read_config
from maskwork.participant.ledger import DATABASE_NAME, Ledger
from maskwork.secagg.keys import SoftwareSigner


def open_trail(config: ParticipantConfig, ledger: Ledger) -> SiteTrail:
    """The site's audit log, which must hold the head that the ledger says was kept last, and tell nothing it lacks.

    Raises:
        UserError: identity files or the log are not usable; the log or the ledger was cut off, lost or replaced.
    """
    own, trail = _open(config, ledger)
    if not is_held(trail, ledger.last_audit_head(own.identity.federation)):
        trail.close()
        raise StoreError(
            "does not hold the head of the coordinator's log that the ledger says was kept last: it was cut off or "
            "replaced",
            file=config.state / LOG_NAME,
            remedy="Restore it. If it is lost, `maskwork participant accept-history` begins from a head that you name.",
        )
    return trail


def accept_history(
    config: Annotated[Path, typer.Option("--config", help="TOML file; see docs/configuration.md.", dir_okay=False)],
    size: Annotated[int, typer.Option("--size", min=0, help="Records of the coordinator's log under that head.")],
    head: Annotated[str, typer.Option("--head", metavar="HEX", help="The head, as this site's log says it.")],
    reason: Annotated[str, typer.Option("--reason", help="Why; it is written into this site's audit log.")],
) -> None:
    """Go on from another history of the coordinator's audit log than the one that this site holds.

    The agent must be stopped. Do it only when you know why the history changed, for instance because the coordinator
    was restored from a backup, and after asking another site what head it holds.
    """
    settings = read_config(config)
    try:
        accepted = bytes.fromhex(head)
    except ValueError:
        accepted = b""
    if len(accepted) != 32:
        raise UserError(f"--head {head[:80]} is not a head: 64 hexadecimal digits, as this site's log says them")
    with Ledger.open(settings.state) as ledger:
        own, trail = _open(settings, ledger)
        with closing(trail):
            before = trail.known.kept
            trail.accept_history(size, accepted, reason)
            ledger.record_audit_head(own.identity.federation, accepted)
    typer.echo(f"held until now: {before.head.hex()} of {before.size} records")
    typer.echo(f"accepted:       {accepted.hex()} of {size} records")


def _open(config: ParticipantConfig, ledger: Ledger) -> tuple[VerifiedCertificate, SiteTrail]:
    files = IdentityFiles.in_directory(config.identity)
    own = check_own_files(files, now=time.time(), role=Role.PARTICIPANT)
    signer = SoftwareSigner(load_private_key(files.key))
    path, federation = config.state / LOG_NAME, own.identity.federation
    trail = SiteTrail.open(path, federation=federation, certificate=own.der, signer=signer)
    try:
        _check_ledger(config, ledger, trail)
    except BaseException:
        trail.close()
        raise
    return own, trail


def _check_ledger(config: ParticipantConfig, ledger: Ledger, trail: SiteTrail) -> None:
    """Refuse a ledger that is not the one this log belongs to: it would answer a second time on the same model."""
    missing = lacking(trail, taken_up=ledger.sessions_taken_up(), released=ledger.sessions_released())
    if missing:
        raise StoreError(
            f"lacks {missing} that {LOG_NAME} beside it tells of: it was lost, or another or older one is in its place",
            file=config.state / DATABASE_NAME,
            remedy=f"Restore it from a backup that has them. If it is lost for good, move {LOG_NAME} away too, and "
            "keep it for auditors: this site then begins anew, and knows nothing of what it released until then.",
        )
