"""`maskwork coordinator …`: what the operator of the service types."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from maskwork import logs
from maskwork.coordinator.config import read_config
from maskwork.dumps import forbid_core_dumps

app = typer.Typer(help="Run the coordinator.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Run the coordinator."""


Config = Annotated[Path, typer.Option("--config", help="TOML file; see docs/configuration.md.", dir_okay=False)]


@app.command()
def run(config: Config) -> None:
    """Run the coordinator until SIGTERM."""
    forbid_core_dumps()
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


key_app = typer.Typer(help="Make keys for encryption at rest.", no_args_is_help=True)
app.add_typer(key_app, name="encryption-key")


@key_app.callback()
def _keys() -> None:
    """Make keys for encryption at rest."""


@key_app.command("new")
def new_key(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write it there, for its owner alone to read.")
    ] = None,
) -> None:
    """Make a key that a coordinator's state can be encrypted with, and print it, or write it to a file.

    Whoever loses it loses the models: keep a copy where the state directory is not.
    """
    forbid_core_dumps()
    from maskwork.coordinator.at_rest_key import write_new_key  # cryptography is loaded only where it is needed

    key = write_new_key(output)
    if output is None:
        typer.echo(key.text)
    typer.echo(f"key {key.id}" + (f" in {output}" if output else "") + ": keep a copy elsewhere", err=True)


@app.command("rotate-key")
def rotate_key(config: Config) -> None:
    """Encrypt the state of a stopped coordinator with the key of its configuration, whatever it was encrypted with.

    The key before it is given as old_key_file, old_key_env or old_key_command; files and records that are not encrypted
    yet are encrypted. Interrupted, it can be run again.
    """
    forbid_core_dumps()
    settings = read_config(config)
    from maskwork.coordinator.at_rest import rotate_state
    from maskwork.net.identity import IdentityFiles, certificate_identity, load_certificate

    certificate = load_certificate(IdentityFiles.in_directory(settings.identity).cert)
    done = rotate_state(settings, federation=certificate_identity(certificate).federation)
    typer.echo(
        f"everything in {settings.state} opens with the key {done.key_id.hex()} alone: {done.rewrapped} files and "
        f"{done.rows} records changed over, {done.encrypted} files that were not encrypted"
    )
