"""`maskwork participant …`: what a site operator types."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from maskwork import logs
from maskwork.participant.config import read_config

app = typer.Typer(help="Run a site's participant.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Run a site's participant."""


@app.command()
def run(
    config: Annotated[Path, typer.Option("--config", help="TOML file; see docs/configuration.md.", dir_okay=False)],
) -> None:
    """Dial out to the coordinator and take part in jobs until SIGTERM."""
    settings = read_config(config)
    logs.configure(settings.log_level)
    from maskwork.participant.process import participate  # gRPC is loaded only where it is needed

    asyncio.run(participate(settings))
