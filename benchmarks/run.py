"""Run the benchmarks, write their figures as JSON, and a page with tables and plots.

    python benchmarks/run.py [--full] [--only NAME] [--out benchmarks/results]

Modest sizes take a few minutes; --full takes the sizes of docs/performance.md. Each benchmark is a command
that also runs alone (`maskwork bench … --json`); what stands beside a figure was measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

MASKWORK = (sys.executable, "-c", "from maskwork.cli import main; main()")
Figures = dict[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """One command, at a modest size and at full size, and how its figures are shown."""

    name: str
    modest: tuple[str, ...]
    full: tuple[str, ...]
    show: Callable[[Figures], str]

    def run(self, *, full: bool) -> Figures:
        """Its figures, with the command that gave them."""
        arguments = self.full if full else self.modest
        began = time.monotonic()
        done = subprocess.run((*MASKWORK, "bench", *arguments, "--json"), stdout=subprocess.PIPE, check=True, text=True)
        figures: Figures = json.loads(done.stdout)
        return {"command": "maskwork bench " + " ".join(arguments), "took_s": time.monotonic() - began, **figures}


def ms(seconds: float) -> str:
    """Milliseconds, three digits."""
    return f"{seconds * 1e3:,.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def secagg(figures: Figures) -> str:
    """Both sides of the mathematics."""
    site, hub = figures["participant"], figures["coordinator"]
    floor, unmask_floor = site["floor.mask_floor_s"], hub["floor.unmask_floor_s"]
    rows = [
        (label, ms(site[name]), f"{site[name] / floor:.2f}")
        for name, label in (
            ("encode_s", "participant: clip, encode"),
            ("mask_s", f"participant: {site['masks']:.0f} masks, expanded and added"),
            ("pack_s", "participant: pack"),
            ("total_s", "participant: all three, fused"),
            ("floor.mask_floor_s", f"floor: AES-CTR alone, {site['floor.aes_ctr_gb_per_s']:.1f} GB/s"),
        )
    ]
    rows += [(f"participant: {label}", ms(site[name]), "") for name, label in SHARES]
    rows += [
        (label, ms(hub[name]), f"{hub[name] / unmask_floor:.2f}")
        for name, label in (
            ("accumulate_s", "coordinator: add one upload"),
            ("reconstruct_s", "coordinator: secrets and mask keys"),
            ("reconstruct_2_processes_s", "coordinator: the same, 2 processes"),
            ("remove_masks_s", f"coordinator: {hub['masks_expanded']:,.0f} masks, taken off"),
            ("unmask_s", "coordinator: the same, decoded and added to the model"),
            ("unmask_2_processes_s", "coordinator: the same, 2 processes"),
            ("floor.unmask_floor_s", f"floor: AES-CTR alone, {hub['floor.aes_ctr_gb_per_s']:.1f} GB/s"),
        )
    ]
    shape = figures["shape"]
    said = (
        f"n = {shape['participants']}, k = {shape['neighbours']}, t = {shape['threshold']}, "
        f"d = {shape['parameters']:,}, {shape['dropouts']} dropouts, {shape['ring_bits']} bits on the wire: "
        f"{site['upload_bytes'] / 1e6:.2f} MB. Peak memory over the start of the process: participant "
        f"{site['peak_memory_bytes'] / 1e6:.0f} MB, coordinator {hub['peak_memory_bytes'] / 1e6:.0f} MB. "
        f"NMSE {site['nmse']:.1e}.\n"
    )
    return said + "\n" + table(("what", "time", "× floor"), rows)


SHARES = (("verify_keys_s", "check the neighbours' keys"), ("share_keys_s", "deal all shares"))


def rounds(figures: Figures) -> str:
    """Whole rounds, masked and plain."""
    masked, plain = figures["masked"], figures["plain"]
    names = [("from the plan to the commit", "round_s"), ("from commit to commit", "commit_to_commit_s")]
    rows = [(label, ms(masked[key]), ms(plain[key]), f"{masked[key] / plain[key]:.2f}") for label, key in names]
    for stage, seconds in masked["stage_s"].items():
        other = plain["stage_s"][stage]
        rows.append((stage, ms(seconds), ms(other), f"{seconds / other:.2f}" if other else ""))
    for name, seconds in masked["cpu_s"].items():
        other = plain["cpu_s"][name]
        rows.append((f"processor time, {name}", ms(seconds), ms(other), f"{seconds / other:.2f}" if other else ""))
    shape, wire, memory = figures["shape"], figures["wire_bytes_per_round"], figures["peak_memory_mib"]
    said = (
        f"{shape['participants']} participants, d = {shape['parameters']:,}. On the wire in a round, TLS and all: up "
        f"{wire['up'] / 1e6:.2f} MB, down {wire['down'] / 1e6:.2f} MB. Peak memory (PSS, workers included): "
        + ", ".join(f"{name} {value:.0f} MiB" for name, value in memory.items())
        + ".\n"
    )
    return said + "\n" + table(("", "masked", "plain", "masked / plain"), rows)


def scale(figures: Figures) -> str:
    """One round of very many."""
    header = ("round", "time", "survivors", *figures["rounds"][0]["stage_s"])
    rows = [
        (str(i), ms(r["round_s"]), str(r["survivors"]), *(ms(s) for s in r["stage_s"].values()))
        for i, r in enumerate(figures["rounds"], 1)
    ]
    shape = figures["shape"]
    said = (
        f"{shape['participants']:,} participants in {shape['processes']} processes, d = {shape['parameters']:,}; "
        f"the coordinator's peak memory is {figures['coordinator_peak_mib']:.0f} MiB. Processor time: "
        + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in figures["cpu_s"].items())
        + ".\n"
    )
    return said + "\n" + table(header, rows)


def _secagg(*arguments: str) -> tuple[str, ...]:
    return ("secagg", *arguments)


BENCHMARKS = (
    Benchmark("secagg-10", _secagg("--params", "1000000"), _secagg("--params", "10000000", "--repeats", "9"), secagg),
    Benchmark(
        "secagg-10-compact",
        _secagg("--params", "1000000", "--compact"),
        _secagg("--params", "10000000", "--compact", "--repeats", "9"),
        secagg,
    ),
    Benchmark(
        "secagg-100",
        _secagg("--participants", "100", "--params", "1000000", "--dropout", "0"),
        _secagg("--participants", "100", "--params", "10000000", "--dropout", "0"),
        secagg,
    ),
    Benchmark(
        "secagg-1000-complete",
        _secagg("--participants", "300", "--params", "100000", "--repeats", "3"),
        _secagg("--participants", "1000", "--params", "100000", "--repeats", "3"),
        secagg,
    ),
    Benchmark(
        "secagg-1000-sparse",
        _secagg("--participants", "1000", "--neighbours", "150", "--threshold", "90", "--params", "50000"),
        _secagg("--participants", "1000", "--neighbours", "314", "--threshold", "179", "--params", "100000"),
        secagg,
    ),
    Benchmark(
        "round-1e6",
        ("round", "--params", "1000000", "--rounds", "3", "--plain"),
        ("round", "--params", "1000000", "--rounds", "10", "--turns", "5", "--plain"),
        rounds,
    ),
    Benchmark(
        "round-1e7",
        ("round", "--params", "3000000", "--rounds", "2", "--plain"),
        ("round", "--params", "10000000", "--rounds", "5", "--turns", "5", "--plain"),
        rounds,
    ),
    Benchmark(
        "scale",
        ("scale", "--participants", "150", "--params", "100000"),
        ("scale", "--participants", "1000", "--params", "100000", "--processes", "2"),
        scale,
    ),
)


def machine() -> Mapping[str, str]:
    """What the figures depend on; nothing that names the machine."""
    model = ""
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else ""
    return {
        "processor": model or platform.machine(),
        "processors": str(len(os.sched_getaffinity(0))),
        "python": platform.python_version(),
        "when": time.strftime("%Y-%m-%d"),
    }


# --- plots ----------------------------------------------------------------------------------------------------------


def plot_stages(figures: Mapping[str, Figures], path: Path) -> bool:
    """Stages of a round, masked beside plain."""
    shown = {name: f for name, f in figures.items() if "masked" in f and "plain" in f}
    if not shown:
        return False
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.9 * len(shown)))
    labels, left = [], []
    for name, measured in shown.items():
        for kind in ("plain", "masked"):
            labels.append(f"{name}, {kind}")
            left.append(measured[kind])
    colours = plt.get_cmap("tab10")
    starts = [0.0] * len(left)
    for i, stage in enumerate(left[0]["stage_s"]):
        widths = [f["stage_s"][stage] * 1e3 for f in left]
        axes.barh(labels, widths, left=starts, label=stage, color=colours(i))
        starts = [a + b for a, b in zip(starts, widths, strict=True)]
    axes.set_xlabel("milliseconds of a round")
    axes.legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def plot_floor(figures: Mapping[str, Figures], path: Path) -> bool:
    """How far from the floor both sides are."""
    shown = {name: f for name, f in figures.items() if "participant" in f}
    if not shown:
        return False
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.6 * len(shown)))
    names = list(shown)
    at = range(len(names))
    site = [f["participant"]["total_s"] / f["participant"]["floor.mask_floor_s"] for f in shown.values()]
    hub = [f["coordinator"]["unmask_s"] / f["coordinator"]["floor.unmask_floor_s"] for f in shown.values()]
    axes.barh([y + 0.2 for y in at], site, 0.38, label="participant: clip, encode, mask, pack")
    axes.barh([y - 0.2 for y in at], hub, 0.38, label="coordinator: unmask, decode")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(list(at), names)
    axes.set_xlabel("times the floor: the same masks as bare AES-CTR keystream, one process")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the sizes of docs/performance.md")
    parser.add_argument("--only", action="append", choices=[b.name for b in BENCHMARKS], help="may be repeated")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--page", action="store_true", help="run nothing: write the page anew from the figures kept")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Figures] = {}
    for i, benchmark in enumerate(BENCHMARKS, 1):
        if options.page or (options.only and benchmark.name not in options.only):
            kept = options.out / f"{benchmark.name}.json"
            if kept.exists():
                figures[benchmark.name] = json.loads(kept.read_text())
            continue
        print(f"[{i}/{len(BENCHMARKS)}] {benchmark.name} …", flush=True)
        measured = figures[benchmark.name] = {"machine": machine(), **benchmark.run(full=options.full)}
        (options.out / f"{benchmark.name}.json").write_text(json.dumps(measured, indent=2) + "\n")
        print(benchmark.show(measured), flush=True)
    page = [
        "# Benchmarks\n",
        "Written by `make bench` (`python benchmarks/run.py`); see docs/performance.md for what the figures mean.\n",
    ]
    if plot_floor(figures, options.out / "floor.png"):
        page.append("![Times the floor](floor.png)\n")
    if plot_stages(figures, options.out / "stages.png"):
        page.append("![Stages of a round](stages.png)\n")
    for benchmark in BENCHMARKS:
        if (f := figures.get(benchmark.name)) is not None:
            m = f["machine"]
            page += [
                f"## {benchmark.name}\n",
                f"`{f['command']}`, {m['when']}, {m['processors']} × {m['processor']}, Python {m['python']}.\n",
                benchmark.show(f),
            ]
    (options.out / "README.md").write_text("\n".join(page))
    print(f"{options.out / 'README.md'}")


if __name__ == "__main__":
    main()
