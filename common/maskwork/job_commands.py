"""``maskwork job`` and ``maskwork model export``: what researchers and operators type.

It is NOT the connection (`maskwork.jobs_client`) nor the view (`maskwork.watch_view`): it reads arguments, words
outcomes and chooses exit codes. It imports no torch.

Rules it upholds: results go to stdout and everything else to stderr, so that `--json` and a submitted job's id can be
piped; the exit code of a watch is the job's verdict; Ctrl-C ends the watching, never the job.
"""

from __future__ import annotations

import asyncio
import io
import json
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from maskwork.errors import UserError
from maskwork.job import read_job_file
from maskwork.job_events import JobDetails, JobSummary, PastAttempt
from maskwork.jobs_client import ExportedModel, JobsClient
from maskwork.jobs_client import Progress as Moved
from maskwork.model_commands import signature_file, verify, write_signature
from maskwork.net.identity import IdentityFiles
from maskwork.net.names import utc_text
from maskwork.watch_state import bytes_text, dropped_text
from maskwork.watch_view import STATE_STYLES, follow, rounds_table

PIPE_WIDTH: Final = 240
app = typer.Typer(help="Submit jobs, watch them, end them.", no_args_is_help=True, add_completion=False)
model_app = typer.Typer(help="Take trained models home.", no_args_is_help=True, add_completion=False)

INTERRUPTED: Final = 130
"""The shell's exit code for Ctrl-C."""
_SHOWN_ROUNDS: Final = 10
_SHOWN_LINES: Final = 20

Coordinator = Annotated[
    str,
    typer.Option(
        "--coordinator", envvar="MASKWORK_COORDINATOR", metavar="HOST:PORT", help="The coordinator.", show_default=False
    ),
]
Identity = Annotated[
    Path,
    typer.Option(
        "--identity",
        envvar="MASKWORK_IDENTITY",
        metavar="DIR",
        help="Directory with your ca.pem, cert.pem and key.pem.",
        show_default=False,
    ),
]
Job = Annotated[str, typer.Argument(metavar="JOB", help="A job's id, the beginning of it, or the job's name.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("submit")
def submit(
    job_file: Annotated[Path, typer.Argument(metavar="JOB.toml", help="The job file; it names the initial model.")],
    coordinator: Coordinator,
    identity: Identity,
    watch: Annotated[bool, typer.Option("--watch", help="Stay and watch it.")] = False,
) -> None:
    """Submit a job with its initial model; prints the job's id."""
    job = read_job_file(job_file)

    async def run() -> str:
        async with _client(coordinator, identity) as client:
            with _Moving(f"sending {job.model.name}") as moved:
                return await client.submit(job.spec(), job.model, progress=moved)

    job_id = asyncio.run(run())
    typer.echo(job_id)
    if watch:
        _watch(job_id, coordinator, identity)


@app.command("list")
def list_jobs(coordinator: Coordinator, identity: Identity, as_json: AsJson = False) -> None:
    """List the coordinator's jobs."""

    async def run() -> tuple[JobSummary, ...]:
        async with _client(coordinator, identity) as client:
            return await client.list_jobs()

    jobs = asyncio.run(run())
    if as_json:
        _print_json([asdict(job) for job in jobs])
    elif jobs:
        _console().print(_jobs_table(jobs))
    else:
        typer.echo("no jobs yet: submit one with `maskwork job submit JOB.toml`", err=True)


@app.command("show")
def show(job: Job, coordinator: Coordinator, identity: Identity, as_json: AsJson = False) -> None:
    """Show a job and its history: rounds, attempts that came to nothing, participants that dropped out."""

    async def run() -> JobDetails:
        async with _client(coordinator, identity) as client:
            return await client.get((await client.find(job)).job_id)

    details = asyncio.run(run())
    if as_json:
        _print_json(asdict(details))
    else:
        _print_details(details, _console())


@app.command("watch")
def watch(job: Job, coordinator: Coordinator, identity: Identity) -> None:
    """Watch a job until it ends; exit code 0 if it completed, 1 if it failed or was aborted."""

    async def run() -> str:
        async with _client(coordinator, identity) as client:
            return (await client.find(job)).job_id

    _watch(asyncio.run(run()), coordinator, identity)


@app.command("abort")
def abort(job: Job, coordinator: Coordinator, identity: Identity) -> None:
    """End a job; the rounds that it has committed stay."""

    async def run() -> JobSummary:
        async with _client(coordinator, identity) as client:
            return await client.abort((await client.find(job)).job_id)

    ended = asyncio.run(run())
    if ended.state != "aborted":
        raise UserError(f"{ended.name} ({ended.job_id}) is {ended.state} already: there is nothing to abort")
    typer.echo(
        f"{ended.name} ({ended.job_id}) is {ended.state}, {ended.rounds_committed} of {ended.rounds_total} rounds"
    )


@model_app.command("export")
def export(
    job: Job,
    coordinator: Coordinator,
    identity: Identity,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The safetensors file to write.")],
    round_number: Annotated[
        int | None, typer.Option("--round", min=1, metavar="N", help="The model after round N; else the newest.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
) -> None:
    """Fetch a job's model as safetensors, with its coordinator's signature beside it as FILE.sig.

    The file appears only when it is whole, and its digest and signature are right; `maskwork model verify` checks both
    again, at any time and offline.
    """
    if output.exists() and not (force and output.is_file()):
        remedy = "name another, or add --force to replace it" if output.is_file() else "name a file"
        raise UserError(f"{output} is there already: {remedy}")

    async def run() -> ExportedModel:
        async with _client(coordinator, identity) as client:
            found = await client.find(job)
            with _Moving(f"fetching {output.name}") as moved:
                return await client.export(found.job_id, output, round_number=round_number or 0, progress=moved)

    model = asyncio.run(run())
    if model.signed is None:
        signature_file(output).unlink(missing_ok=True)  # of the file that was replaced
        typer.echo("not signed: the coordinator is of a version before models were signed", err=True)
    else:
        write_signature(output, model.signed)
    typer.echo(f"{model.path}  {bytes_text(model.size)}  sha256 {model.digest.hex()}")


model_app.command("verify")(verify)


def _client(coordinator: str, identity: Path) -> JobsClient:
    return JobsClient(coordinator, IdentityFiles.in_directory(identity))


def _watch(job_id: str, coordinator: str, identity: Path) -> NoReturn:
    async def run() -> bool:
        async with _client(coordinator, identity) as client:
            return (await follow(client.watch(job_id), _console())).succeeded

    try:
        succeeded = asyncio.run(run())
    except KeyboardInterrupt:
        typer.echo(f"stopped watching; the job goes on. Come back with `maskwork job watch {job_id}`", err=True)
        raise typer.Exit(INTERRUPTED) from None
    raise typer.Exit(0 if succeeded else 1)


def _console() -> Console:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a reason in words that this terminal cannot show ends no watch
    # Into a pipe or a file nothing is cut to a terminal's width: whoever reads it there wants whole words.
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return Console(highlight=False, markup=False, emoji=False, width=width)


class _Moving:
    """A progress bar on stderr, if that is a terminal; called with the bytes moved and the bytes in all."""

    def __init__(self, what: str) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task(what)

    def __enter__(self) -> Moved:
        self._progress.start()
        return lambda moved, total: self._progress.update(self._task, completed=moved, total=total)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def _jobs_table(jobs: tuple[JobSummary, ...]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("job", "name", "task", "state"):
        table.add_column(name, no_wrap=True)
    table.add_column("rounds", justify="right", no_wrap=True)
    table.add_column("submitted", no_wrap=True)
    for job in jobs:
        rounds = f"{job.rounds_committed}/{job.rounds_total}"
        style = STATE_STYLES.get(job.state, "")
        table.add_row(job.job_id, job.name, job.task, Text(job.state, style), rounds, _moment(job.submitted_at))
    return table


def _print_details(details: JobDetails, console: Console) -> None:
    job = details.job
    rows = [
        ("name", job.name),
        ("task", job.task),
        ("state", f"{job.state}: {job.reason}" if job.reason else job.state),
        ("rounds", f"{job.rounds_committed} of {job.rounds_total}"),
        ("submitted", f"{_moment(job.submitted_at)} by {job.submitted_by}"),
        ("model", f"sha256 {job.model_digest.hex()}"),
    ]
    console.print(Text(job.job_id, "bold"), soft_wrap=True)
    for what, value in rows:
        console.print(Text(f"  {what:<10} ", "dim").append(value), soft_wrap=True)
    if details.rounds:
        console.print()
        console.print(rounds_table(details.rounds[-_SHOWN_ROUNDS:], console.width))
    lines = [
        *(
            (a.opened_at, f"round {a.round_number}, attempt {a.attempt} {a.outcome}: {a.reason}")
            for a in _failed(details)
        ),
        *((d.at, f"round {d.round_number}, attempt {d.attempt}: {dropped_text(d)}") for d in details.drops),
    ]
    if lines:
        console.print()
    for _, line in lines[-_SHOWN_LINES:]:
        console.print(Text(line), soft_wrap=True)
    if len(lines) > _SHOWN_LINES:
        console.print(Text(f"… and {len(lines) - _SHOWN_LINES} more before: --json has them all", "dim"))


def _failed(details: JobDetails) -> list[PastAttempt]:
    return [attempt for attempt in details.attempts if attempt.outcome not in ("", "committed")]


def _moment(unix_s: float) -> str:
    return utc_text(datetime.fromtimestamp(unix_s, UTC))


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2, default=_plain))


def _plain(value: object) -> object:
    """Bytes are digests: in hexadecimal."""
    if isinstance(value, bytes):
        return value.hex()
    raise TypeError(f"{type(value).__name__} has no JSON form here")
