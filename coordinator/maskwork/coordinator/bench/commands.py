"""The command ``maskwork bench secagg``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from maskwork.coordinator.bench.secagg import Shape

app = typer.Typer(no_args_is_help=True)


@app.callback()
def _bench() -> None:
    """Measure what masking costs here."""


@app.command()
def secagg(
    participants: Annotated[int, typer.Option(min=3, max=100_000, help="n.")] = 10,
    neighbours: Annotated[int | None, typer.Option(help="k; everybody else if not given.", show_default=False)] = None,
    threshold: Annotated[
        int | None, typer.Option(help="t; the complete graph's, or more than half of k.", show_default=False)
    ] = None,
    params: Annotated[int, typer.Option("--params", min=1, max=1 << 31, help="d, parameters.")] = 1_000_000,
    dropout: Annotated[float, typer.Option(min=0, max=1, help="Share of the participants that is lost.")] = 0.3,
    ring_bits: Annotated[int | None, typer.Option(help="r; the preset's if not given.", show_default=False)] = None,
    compact: Annotated[bool, typer.Option("--compact", help="The preset with rotation.")] = False,
    privacy: Annotated[
        str,
        typer.Option(metavar="MECHANISM", help="Add skellam or discrete-gaussian noise.", show_default=False),
    ] = "",
    repeats: Annotated[int, typer.Option(min=1, max=1000, help="Runs of each; the median counts.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time what a participant and the coordinator compute for one masked update, beside the floor: AES-CTR alone.

    Each side runs in a process of its own. Nothing is sent, and no file is written.
    """
    from maskwork.coordinator.bench import secagg as bench  # numpy and OpenSSL are loaded only where they are needed

    shape = bench.shape_of(
        participants=participants,
        neighbours=neighbours,
        threshold=threshold,
        parameters=params,
        dropout=dropout,
        ring_bits=ring_bits,
        rotated=compact,
        repeats=repeats,
        privacy=privacy,
    )
    measured = bench.measure(shape)
    if as_json:
        typer.echo(json.dumps(measured, indent=2))
    else:
        _show(shape, measured)


def _show(shape: Shape, measured: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, emoji=False)
    console.print(
        f"n = {shape.participants}, k = {shape.neighbours}, t = {shape.threshold}, d = {shape.parameters:,}, "
        f"{shape.dropouts} dropouts, {shape.value_bits} of {shape.ring_bits} bits"
        + (", rotated" if shape.rotated else "")
    )
    site, hub = measured["participant"], measured["coordinator"]
    floor = site["floor.mask_floor_s"]
    table = Table("participant, one update", "time", "× floor")
    for name, label in (
        ("encode_s", "clip, encode"),
        ("mask_s", f"{site['masks']:.0f} masks, expanded and added"),
        ("pack_s", "pack"),
        ("rotate_s", "of the encoding: rotation"),
        ("noise_s", f"{shape.privacy} noise"),
        ("total_s", "all of it, fused"),
        ("floor.mask_floor_s", f"floor: AES-CTR at {site['floor.aes_ctr_gb_per_s']:.1f} GB/s"),
    ):
        if name in site:
            table.add_row(label, _time(site[name]), f"{site[name] / floor:.2f}")
    for name, label in (("verify_keys_s", "check the neighbours' keys"), ("share_keys_s", "deal all shares")):
        table.add_row(label, _time(site[name]), "")
    console.print(table)
    console.print(
        f"upload {site['upload_bytes'] / 1e6:.2f} MB, peak memory {site['peak_memory_bytes'] / 1e6:.0f} MB over the "
        f"start of the process ({site['update_bytes'] / 1e6:.0f} MB of it are the update), NMSE {site['nmse']:.2g}"
    )
    if "noise_s" in site:
        both = 1e9 * (site["noise_s"] + site["rotate_s"]) / shape.parameters
        console.print(f"noise and rotation together: {both:.1f} ns per parameter")
    floor = hub["floor.unmask_floor_s"]
    table = Table("coordinator, one round", "time", "× floor")
    for name, label in (
        ("accumulate_s", "add one upload"),
        ("reconstruct_s", "secrets and mask keys"),
        ("reconstruct_2_processes_s", "the same in 2 processes"),
        ("remove_masks_s", f"{hub['masks_expanded']:.0f} masks, expanded and taken off"),
        ("unmask_s", "the same, decoded and added to the model"),
        ("unmask_2_processes_s", "the same in 2 processes"),
        ("floor.unmask_floor_s", f"floor: AES-CTR at {hub['floor.aes_ctr_gb_per_s']:.1f} GB/s"),
    ):
        table.add_row(label, _time(hub[name]), f"{hub[name] / floor:.2f}")
    table.add_row("one secret from t shares", _time(hub["rebuild_secret_s"]), "")
    console.print(table)
    console.print(f"peak memory {hub['peak_memory_bytes'] / 1e6:.0f} MB over the start of the process")


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"
