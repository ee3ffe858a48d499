"""`maskwork participant …`: what a site operator types."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from maskwork import logs
from maskwork.dumps import forbid_core_dumps
from maskwork.net.identity import Role
from maskwork.participant.audit_commands import accept_history
from maskwork.participant.config import read_config
from maskwork.participant.policy_commands import check_policy, plans
from maskwork.pki_enrol_commands import Coordinator, Out, TokenFile, TokenText, enrol_as, given_token, tell_renewed
from maskwork.pki_request_commands import Fingerprints, Force

app = typer.Typer(help="Run a site's participant.", no_args_is_help=True)
app.command("check-policy")(check_policy)
app.command("plans")(plans)
app.command("accept-history")(accept_history)


@app.callback()
def _group() -> None:
    """Run a site's participant."""


Config = Annotated[Path, typer.Option("--config", help="TOML file; see docs/configuration.md.", dir_okay=False)]


@app.command()
def run(config: Config) -> None:
    """Dial out to the coordinator and take part in jobs until SIGTERM."""
    forbid_core_dumps()
    settings = read_config(config)
    logs.configure(settings.log_level)
    from maskwork.participant.process import participate  # gRPC is loaded only where it is needed

    asyncio.run(participate(settings))


@app.command()
def enrol(
    coordinator: Coordinator,
    out: Out,
    token_text: TokenText = "",
    token_file: TokenFile = None,
    ca_fingerprint: Fingerprints = None,
    force: Force = False,
) -> None:
    """Make this site's key here, and have the coordinator certify it; the token says for whom."""
    enrol_as(
        Role.PARTICIPANT,
        coordinator,
        given_token(token_text, token_file),
        out,
        ca_fingerprint or [],
        force=force,
    )


@app.command()
def renew(config: Config) -> None:
    """Have a new key of this site certified before its certificate expires; a running agent takes it up by itself."""
    settings = read_config(config)
    from maskwork import enrolment_client  # gRPC is loaded only where it is needed

    renewed = enrolment_client.renew(settings.coordinator, settings.identity, role=Role.PARTICIPANT)
    tell_renewed(settings.identity, renewed.not_after)


@app.command()
def health(config: Config) -> None:
    """Ask this site's coordinator, with the site's identity, whether it serves; exit code 1 if not.

    It tells whether the site could take part: certificate, network and coordinator. The agent itself opens no port
    that could be asked.
    """
    settings = read_config(config)
    from maskwork.net import health as probe  # gRPC is loaded only where it is needed
    from maskwork.net.identity import IdentityFiles

    probe.ask_whether_serving(
        settings.coordinator, IdentityFiles.in_directory(settings.identity), role=Role.PARTICIPANT
    )
    typer.echo(f"the coordinator at {settings.coordinator} serves, and takes this site's certificate")
