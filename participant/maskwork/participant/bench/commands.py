"""The commands ``maskwork bench round`` and ``maskwork bench scale``."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(no_args_is_help=True)


@app.callback()
def _bench() -> None:
    """Measure what masking costs here."""


@app.command("round")
def round_(
    participants: Annotated[int, typer.Option(min=3, max=128, help="n: a process and a worker each.")] = 4,
    params: Annotated[int, typer.Option("--params", min=1, max=1 << 31, help="d, parameters.")] = 1_000_000,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds of each job that count.")] = 5,
    turns: Annotated[int, typer.Option(min=1, max=100, help="Jobs of each kind, in turn.")] = 3,
    plain: Annotated[bool, typer.Option("--plain", help="Also the same rounds without masks.")] = False,
    compact: Annotated[bool, typer.Option("--compact", help="The preset with rotation.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    keep: Annotated[
        Path | None, typer.Option("--keep", metavar="DIR", help="Run there, and leave it.", show_default=False)
    ] = None,
) -> None:
    """Time whole rounds: a coordinator and participants, real processes over mutual TLS on loopback, no training."""
    from maskwork.participant.bench import round as bench  # torch is loaded only where it is needed

    options = bench.Options(participants, params, rounds, turns, plain, "compact" if compact else "exact")
    measured = _in_a_folder(keep, lambda folder: asyncio.run(bench.measure(folder, options)))
    if as_json:
        typer.echo(json.dumps(measured, indent=2))
    else:
        _show_round(measured)


@app.command()
def scale(
    participants: Annotated[int, typer.Option(min=3, max=20_000, help="n: a connection each.")] = 200,
    params: Annotated[int, typer.Option("--params", min=1, max=1 << 31, help="d, parameters.")] = 100_000,
    processes: Annotated[int, typer.Option(min=1, max=64, help="Processes that the participants share.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Rounds.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    keep: Annotated[
        Path | None, typer.Option("--keep", metavar="DIR", help="Run there, and leave it.", show_default=False)
    ] = None,
) -> None:
    """Time a masked round with very many live participants, some hundreds in a process; sparse graph above 128."""
    from maskwork.participant.bench import scale as bench

    options = bench.Options(participants, params, processes, rounds)
    measured = _in_a_folder(keep, lambda folder: asyncio.run(bench.measure(folder, options)))
    if as_json:
        typer.echo(json.dumps(measured, indent=2))
    else:
        _show_scale(measured)


def _in_a_folder(keep: Path | None, work: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="maskwork-bench-")) if keep is None else keep
    try:
        measured = work(folder)
    except BaseException:
        typer.echo(f"the logs of what went wrong are in {folder / 'logs'}", err=True)
        raise
    if keep is None:
        shutil.rmtree(folder, ignore_errors=True)
    return measured


def _show_round(measured: dict[str, Any]) -> None:
    console = Console(highlight=False, markup=False, emoji=False)
    shape = measured["shape"]
    kinds = [kind for kind in ("masked", "plain") if kind in measured]
    console.print(f"{shape['participants']} participants, d = {shape['parameters']:,}, preset {shape['preset']}")
    table = Table("one round", *kinds, *(["masked / plain"] if len(kinds) == 2 else []))
    names = ["round_s", "commit_to_commit_s"]
    names += [f"{group}/{name}" for group in ("stage_s", "cpu_s") for name in measured["masked"][group]]
    for name in names:
        key, _, stage = name.partition("/")
        values = [measured[kind][key][stage] if stage else measured[kind][key] for kind in kinds]
        ratio = [f"{values[0] / values[1]:.2f}"] if len(values) == 2 and values[1] else []
        label = f"processor time, {stage}" if key == "cpu_s" else stage or key.removesuffix("_s")
        table.add_row(label, *(f"{value * 1e3:.1f} ms" for value in values), *ratio)
    console.print(table)
    wire, memory = measured["wire_bytes_per_round"], measured["peak_memory_mib"]
    uploaded = measured["masked"]["upload_bytes_per_participant"] / 1e6
    console.print(
        f"on the wire, TLS and all, in a round: up {wire['up'] / 1e6:.2f} MB, down {wire['down'] / 1e6:.2f} MB; "
        f"the upload of one participant: {uploaded:.2f} MB"
    )
    console.print("peak memory: " + ", ".join(f"{name} {value:.0f} MiB" for name, value in memory.items()))


def _show_scale(measured: dict[str, Any]) -> None:
    console = Console(highlight=False, markup=False, emoji=False)
    table = Table("round", "time", "survivors", *measured["rounds"][0]["stage_s"], "uploads")
    for number, done in enumerate(measured["rounds"], 1):
        stages = (f"{seconds:.2f} s" for seconds in done["stage_s"].values())
        uploads = f"{done['uplink_bytes'] / 1e6:.1f} MB"
        table.add_row(str(number), f"{done['round_s']:.2f} s", str(done["survivors"]), *stages, uploads)
    console.print(table)
    used = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in measured["cpu_s"].items())
    console.print(f"the coordinator's peak memory: {measured['coordinator_peak_mib']:.0f} MiB; processor time: {used}")
