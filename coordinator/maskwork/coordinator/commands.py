"""`maskwork coordinator …`: what the operator of the service types."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from maskwork import logs
from maskwork.coordinator.config import read_config

app = typer.Typer(help="Run the coordinator.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Run the coordinator."""


Config = Annotated[Path, typer.Option("--config", help="TOML file; see docs/configuration.md.", dir_okay=False)]


@app.command()
def run(config: Config) -> None:
    """Run the coordinator until SIGTERM."""
    settings = read_config(config)
    logs.configure(settings.log_level)
    from maskwork.coordinator.server import serve  # gRPC is loaded only where it is needed

    asyncio.run(serve(settings))


@app.command()
def health(config: Config) -> None:
    """Ask the coordinator of this configuration, on this machine, whether it serves; exit code 1 if not.

    It asks the standard service grpc.health.v1 over mutual TLS, with the coordinator's own identity.
    """
    settings = read_config(config)
    from maskwork.net import health as probe  # gRPC is loaded only where it is needed
    from maskwork.net.identity import IdentityFiles, Role

    files, target = IdentityFiles.in_directory(settings.identity), probe.reachable_from_here(settings.listen)
    probe.ask_whether_serving(target, files, role=Role.COORDINATOR, server_name=probe.name_in_certificate(files))
    typer.echo(f"the coordinator at {target} serves")
