"""How the cost of masking grows with the cohort, the neighbours, the parameters and the dropouts; and a model of it.

    python benchmarks/growth.py [--out benchmarks/results]

Each point is `maskwork bench secagg`. The model has one constant for each thing that is done: a coordinate encoded and
packed, a mask coordinate expanded and added, a neighbour's key checked and share dealt, a share combined, a key agreed,
a coordinate added or decoded. The constants are fitted to the points (least squares of relative errors), the lines in
the plots are the model's, and so is what it says of cohorts that nobody measured.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from scipy.optimize import nnls

mpl.use("Agg")
from matplotlib import pyplot as plt

MASKWORK = (sys.executable, "-c", "from maskwork.cli import main; main()")
BASE = {"participants": 100, "neighbours": 99, "params": 1_000_000, "dropout": 0.1}
SWEEPS: Mapping[str, tuple[Mapping[str, float], ...]] = {
    "parameters d": tuple({**BASE, "params": d} for d in (10_000, 100_000, 1_000_000, 10_000_000)),
    "neighbours k": tuple(
        {**BASE, "participants": 400, "neighbours": k, "dropout": 0.05} for k in (10, 30, 100, 200, 300)
    ),
    "participants n (complete graph)": tuple(
        {"participants": n, "neighbours": n - 1, "params": 100_000, "dropout": 0.1} for n in (10, 30, 100, 300, 600)
    ),
    "dropout": tuple({**BASE, "dropout": f} for f in (0.0, 0.03, 0.1, 0.2, 0.33)),
}


@dataclass(frozen=True)
class Point:
    """One measurement."""

    n: int
    k: int
    t: int
    d: int
    dropouts: int
    masks: int
    participant: Mapping[str, float]
    coordinator: Mapping[str, float]


def measure(sizes: Mapping[str, float]) -> Point:
    """One run of the command."""
    asked = [part for key, value in sizes.items() for part in (f"--{key}", str(value))]
    command = (*MASKWORK, "bench", "secagg", *asked, "--repeats", "3", "--json")
    done = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    shape, hub = done["shape"], done["coordinator"]
    return Point(
        n=shape["participants"],
        k=shape["neighbours"],
        t=shape["threshold"],
        d=shape["parameters"],
        dropouts=shape["dropouts"],
        masks=int(hub["masks_expanded"]),
        participant=done["participant"],
        coordinator=hub,
    )


@dataclass(frozen=True)
class Term:
    """One thing that is done, and how often."""

    what: str
    count: Callable[[Point], float]


def agreements(p: Point) -> float:
    """The coordinator's: one for each mask of a dropout."""
    return p.masks - (p.n - p.dropouts)


@dataclass(frozen=True)
class Cost:
    """A measured figure and what it is made of."""

    name: str
    of: Callable[[Point], float]
    terms: tuple[Term, ...]

    def fit(self, points: Sequence[Point]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """Seconds of each thing, never negative, that fit best in relative error."""
        seconds = np.array([self.of(p) for p in points])
        counts = np.array([[term.count(p) for term in self.terms] for p in points]) / seconds[:, None]
        scale = counts.max(axis=0)
        return nnls(counts / scale, np.ones(len(points)))[0] / scale

    def says(self, constants: np.ndarray[tuple[int], np.dtype[np.float64]], p: Point) -> float:
        """The model's figure for a point."""
        return float(sum(c * term.count(p) for c, term in zip(constants, self.terms, strict=True)))


COSTS = (
    Cost(
        "participant, one update",
        lambda p: p.participant["total_s"],
        (
            Term("start", lambda _: 1.0),
            Term("a coordinate encoded and packed", lambda p: p.d),
            Term("a mask coordinate", lambda p: p.d * (p.k + 1)),
        ),
    ),
    Cost(
        "participant, keys and shares",
        lambda p: p.participant["share_keys_s"] + p.participant["verify_keys_s"],
        (
            Term("start", lambda _: 1.0),
            Term("a neighbour", lambda p: p.k),
            Term("a coefficient of a share", lambda p: p.k * p.t),
        ),
    ),
    Cost(
        "coordinator, all uploads added",
        lambda p: p.coordinator["accumulate_s"] * p.n,
        (Term("an upload", lambda p: p.n), Term("a coordinate added", lambda p: p.n * p.d)),
    ),
    Cost(
        "coordinator, secrets and mask keys",
        lambda p: p.coordinator["reconstruct_s"],
        (
            Term("start", lambda _: 1.0),
            Term("a secret", lambda p: p.n),
            Term("a share combined", lambda p: p.n * p.t),
            Term("a factor of a Lagrange coefficient", lambda p: p.t**2),
            Term("a key agreed and derived", agreements),
        ),
    ),
    Cost(
        "coordinator, unmask and decode",
        lambda p: p.coordinator["unmask_s"],
        (
            Term("a mask set up", lambda p: p.masks),
            Term("a coordinate decoded", lambda p: p.d),
            Term("a mask coordinate", lambda p: p.d * p.masks),
        ),
    ),
)


def plot(sweeps: Mapping[str, Sequence[Point]], fitted: Mapping[str, Any], path: Path) -> None:
    """Measured points and the model's lines, a panel for each sweep."""
    axis: Mapping[str, Callable[[Point], float]] = {
        "parameters d": lambda p: p.d,
        "neighbours k": lambda p: p.k,
        "participants n (complete graph)": lambda p: p.n,
        "dropout": lambda p: max(p.dropouts / p.n, 0.01),
    }
    figure, panels = plt.subplots(2, 2, figsize=(12, 9))
    for panel, (name, points) in zip(panels.flat, sweeps.items(), strict=True):
        xs = [axis[name](p) for p in points]
        for cost in COSTS:
            (dots,) = panel.plot(xs, [cost.of(p) for p in points], "o", label=cost.name, markersize=5)
            panel.plot(xs, [cost.says(fitted[cost.name], p) for p in points], "-", color=dots.get_color(), linewidth=1)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xlabel(name + (" (0 is drawn at 0.01)" if name == "dropout" else ""))
        panel.set_ylabel("seconds, one core")
        panel.grid(True, which="major", alpha=0.3)
    panels.flat[0].legend(fontsize=8)
    figure.suptitle("Measured (dots) and modelled (lines)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def prophecies(fitted: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the model says of cohorts and models beyond any machine here."""
    cases = (
        ("10 sites, 10 M parameters", 10, 9, 7, 10_000_000, 0.3),
        ("100 sites, 100 M parameters", 100, 99, 67, 100_000_000, 0.1),
        ("1,000 sites, 1 M parameters, sparse", 1000, 100, 70, 1_000_000, 0.1),
        ("10,000 sites, 1 M parameters, sparse", 10_000, 132, 93, 1_000_000, 0.1),
        ("1,000,000 sites, 100,000 parameters, sparse", 1_000_000, 180, 127, 100_000, 0.1),
        ("10 sites, an adapter of 10 G parameters", 10, 9, 7, 10_000_000_000, 0.1),
    )
    said = []
    for name, n, k, t, d, dropout in cases:
        dropouts = round(dropout * n)
        masks = (n - dropouts) + dropouts * round(k * (n - dropouts) / (n - 1))
        point = Point(n, k, t, d, dropouts, masks, {}, {})
        bits = 24 if n <= 256 else max(16, 32 - math.ceil(math.log2(n)))
        said.append(
            {
                "case": name,
                "seconds": {cost.name: cost.says(fitted[cost.name], point) for cost in COSTS},
                "upload_bytes": d * min(32, bits + math.ceil(math.log2(n))) / 8,
            }
        )
    return said


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    sweeps: dict[str, list[Point]] = {}
    for name, sizes in SWEEPS.items():
        print(f"{name} …", flush=True)
        sweeps[name] = [measure(s) for s in sizes]
    points = [p for several in sweeps.values() for p in several]
    fitted = {cost.name: cost.fit(points) for cost in COSTS}
    report: dict[str, Any] = {"constants": {}, "error": {}, "model": prophecies(fitted)}
    for cost in COSTS:
        print(f"\n{cost.name}:")
        for constant, term in zip(fitted[cost.name], cost.terms, strict=True):
            report["constants"].setdefault(cost.name, {})[term.what] = constant
            print(f"  {term.what:40} {constant * 1e9:12.3f} ns")
        errors = sorted(abs(cost.says(fitted[cost.name], p) / cost.of(p) - 1) for p in points)
        report["error"][cost.name] = {"median": errors[len(errors) // 2], "worst": errors[-1]}
        print(f"  off by {errors[len(errors) // 2]:.0%} in the median, {errors[-1]:.0%} at worst")
    for case in report["model"]:
        print(f"\n{case['case']}: upload {case['upload_bytes'] / 1e6:,.1f} MB")
        for name, seconds in case["seconds"].items():
            print(f"  {name:40} {seconds:12.3f} s")
    (out / "growth.json").write_text(json.dumps(report, indent=2) + "\n")
    plot(sweeps, fitted, out / "growth.png")
    print(f"\n{out / 'growth.png'}")


if __name__ == "__main__":
    main()
