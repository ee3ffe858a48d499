"""Two small drawings for a report, as SVG text: who was in which round, and how a statistic went.

Plain strings without scripts or references, so that a page with them needs no network. Texts are escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from maskwork.audit.report import Round

CELL = 22
LABEL = 150
WIDTH, HEIGHT, MARGIN = 640, 180, 72
_TEXT = 'font-size="11" fill="#333" font-family="system-ui, sans-serif"'


def attendance(rounds: Sequence[Round]) -> str:
    """A row for each site, a column for each round: in the sum, left out, or not asked."""
    names = sorted({name for r in rounds for name in r.roster})
    parts = []
    for row, name in enumerate(names):
        y = 24 + row * CELL
        parts.append(f'<text x="{LABEL - 8}" y="{y + 15}" text-anchor="end" {_TEXT}>{escape(name)}</text>')
        for column, r in enumerate(rounds):
            word, colour = _cell(name, r)
            x = LABEL + column * CELL
            title = escape(f"{name}, round {r.round_number}: {word}")
            parts.append(
                f'<rect x="{x}" y="{y}" width="{CELL - 3}" height="{CELL - 3}" rx="3" fill="{colour}">'
                f"<title>{title}</title></rect>"
            )
    for column, r in enumerate(rounds):
        middle = LABEL + column * CELL + (CELL - 3) / 2
        parts.append(f'<text x="{middle}" y="16" text-anchor="middle" {_TEXT}>{r.round_number}</text>')
    width, height = LABEL + len(rounds) * CELL + 10, 30 + len(names) * CELL
    return _svg(width, height, "participation by site and round", parts)


def _cell(name: str, r: Round) -> tuple[str, str]:
    if name in r.survivors:
        return "in the sum", "#2e7d4f"
    if name in r.roster:
        return "left out", "#c0392b"
    return "not asked", "#dddddd"


def course(rounds: Sequence[Round], statistic: str) -> str:
    """One statistic over the rounds that report it."""
    points = [(r.round_number, r.statistics[statistic]) for r in rounds if statistic in r.statistics]
    low, high = min(v for _, v in points), max(v for _, v in points)
    span = (high - low) or 1.0
    first, last = points[0][0], points[-1][0]

    def place(number: int, value: float) -> tuple[float, float]:
        x = MARGIN + (WIDTH - 2 * MARGIN) * ((number - first) / (last - first) if last > first else 0.5)
        return x, HEIGHT - 28 - (HEIGHT - 56) * (value - low) / span

    placed = [place(number, value) for number, value in points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
    parts = [f'<polyline points="{line}" fill="none" stroke="#1f5fa8" stroke-width="2"/>']
    for (x, y), (number, value) in zip(placed, points, strict=True):
        title = f"round {number}: {value:.6g}"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="#1f5fa8"><title>{title}</title></circle>')
    step = max(1, math.ceil(len(points) / 20))
    for (x, _), (number, _) in list(zip(placed, points, strict=True))[::step]:
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle" {_TEXT}>{number}</text>')
    for value, y in ((high, 28.0), (low, HEIGHT - 28.0)) if high > low else ((low, HEIGHT - 28.0),):
        parts.append(f'<text x="{MARGIN - 8}" y="{y + 4}" text-anchor="end" {_TEXT}>{value:.5g}</text>')
    parts.append(f'<text x="{MARGIN}" y="14" {_TEXT} font-weight="600">{escape(statistic)}</text>')
    return _svg(WIDTH, HEIGHT, f"{statistic} by round", parts)


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )
