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


@app.command()
def run(
    config: Annotated[Path, typer.Option("--config", help="TOML file; see docs/configuration.md.", dir_okay=False)],
) -> None:
    """Run the coordinator until SIGTERM."""
    settings = read_config(config)
    logs.configure(settings.log_level)
    from maskwork.coordinator.server import serve  # gRPC is loaded only where it is needed

    asyncio.run(serve(settings))
