"""Draws the two state diagrams of docs/protocol.md from the transition tables of the protocol.

Every box is a state, its text the first sentence of the state's docstring, every arrow a legal transition. The states
that lead somewhere stand in the middle, in the order of their table; the one that the table names last ends on the
left, the other final one on the right. A table that this layout cannot show is an error, not a wrong picture.

The same tables give the same bytes: no clock, no fonts measured, no ids drawn.

Usage: python scripts/state_diagrams.py [--out docs]
"""

from __future__ import annotations

import argparse
import inspect
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from maskwork.secagg import client_states, server_states

ROOT = Path(__file__).resolve().parent.parent
Transitions = Mapping[type, frozenset[type]]

BOX_WIDTH, BOX_HEIGHT, GAP = 400, 68, 30
MARGIN, SIDE_WIDTH, SIDE_GAP = 20, 120, 90
LINE_HEIGHT, TEXT_COLUMNS = 16, 58
LEFT = MARGIN + SIDE_WIDTH + SIDE_GAP
RIGHT = LEFT + BOX_WIDTH + SIDE_GAP
WIDTH = RIGHT + SIDE_WIDTH + MARGIN
TOP = 62

STYLE = (
    "text{font-family:ui-sans-serif,system-ui,'DejaVu Sans',Arial,sans-serif;fill:#1f2933}"
    ".title{font-size:17px;font-weight:600}.name{font-size:14px;font-weight:600}.words{font-size:12px;fill:#52606d}"
    ".box{fill:#f5f7fa;stroke:#52606d}.good{fill:#e3f4e8;stroke:#2f7d4a}.bad{fill:#fbe9e7;stroke:#a63d2f}"
    ".arrow{stroke:#52606d;stroke-width:1.5;fill:none}"
)


class UndrawableTable(RuntimeError):
    """The table has a shape that the layout cannot show."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each state stands.

    Attributes:
        chain: the states in the middle, from top to bottom.
        left: the final state on the left.
        right: the final state on the right.
    """

    chain: tuple[type, ...]
    left: type
    right: type

    @property
    def height(self) -> int:
        """Of the whole picture."""
        return TOP + len(self.chain) * (BOX_HEIGHT + GAP) - GAP + MARGIN

    def top_of(self, state: type) -> int:
        """The upper edge of a box in the middle."""
        return TOP + self.chain.index(state) * (BOX_HEIGHT + GAP)


def layout_of(transitions: Transitions) -> Layout:
    """Order a table's states.

    Raises:
        UndrawableTable: there are not two final states, or a state leads to another than the next one and these two.
    """
    chain = tuple(state for state, following in transitions.items() if following)
    final = tuple(state for state, following in transitions.items() if not following)
    if len(final) != 2:
        raise UndrawableTable(f"{len(final)} final states where the layout shows two")
    for place, state in enumerate(chain):
        strangers = transitions[state] - {*final, *chain[place + 1 : place + 2]}
        if strangers:
            names = ", ".join(sorted(s.__name__ for s in strangers))
            raise UndrawableTable(f"{state.__name__} leads to {names}, which is not the next state: extend the layout")
    return Layout(chain, left=final[1], right=final[0])


def draw(title: str, transitions: Transitions) -> str:
    """One diagram as SVG."""
    layout = layout_of(transitions)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{layout.height}" '
        f'viewBox="0 0 {WIDTH} {layout.height}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<desc>{escape(describe(transitions))}</desc>",
        f"<style>{STYLE}</style>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" fill="#52606d"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{layout.height}" fill="#ffffff"/>',
        f'<text class="title" x="{WIDTH // 2}" y="34" text-anchor="middle">{escape(title)}</text>',
    ]
    parts += [_box(state, layout.top_of(state)) for state in layout.chain]
    parts += [_side(layout.left, layout, MARGIN, "bad"), _side(layout.right, layout, RIGHT, "good")]
    for state in layout.chain:
        parts += [_arrow(state, following, layout) for following in transitions if following in transitions[state]]
    return "\n".join([*parts, "</svg>"]) + "\n"


def describe(transitions: Transitions) -> str:
    """The same table in words, for readers that see no pictures."""
    return " ".join(
        f"{state.__name__}: {', '.join(f.__name__ for f in transitions if f in following) or 'final'}."
        for state, following in transitions.items()
    )


def _words(state: type) -> list[str]:
    documented = inspect.getdoc(state) or ""
    sentence = " ".join(documented.split("\n\n")[0].split()).split(". ")[0].rstrip(".") + "."
    return textwrap.wrap(sentence, TEXT_COLUMNS)


def _box(state: type, top: int) -> str:
    lines = _words(state)
    centre = LEFT + BOX_WIDTH // 2
    first = top + (BOX_HEIGHT - LINE_HEIGHT * len(lines)) // 2 + 4
    styled = [("name", state.__name__), *(("words", line) for line in lines)]
    texts = [
        f'<text class="{kind}" x="{centre}" y="{first + LINE_HEIGHT * number}" text-anchor="middle">'
        f"{escape(line)}</text>"
        for number, (kind, line) in enumerate(styled)
    ]
    box = f'<rect class="box" x="{LEFT}" y="{top}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6"/>'
    return box + "".join(texts)


def _side(state: type, layout: Layout, left: int, kind: str) -> str:
    """A final state as a bar beside the chain."""
    height = layout.height - TOP - MARGIN
    return (
        f'<rect class="{kind}" x="{left}" y="{TOP}" width="{SIDE_WIDTH}" height="{height}" rx="6"/>'
        f'<text class="name" x="{left + SIDE_WIDTH // 2}" y="{TOP + height // 2 + 5}" text-anchor="middle">'
        f"{escape(state.__name__)}</text>"
    )


def _arrow(state: type, following: type, layout: Layout) -> str:
    top = layout.top_of(state)
    middle = top + BOX_HEIGHT // 2
    if following is layout.left:
        path = f"M{LEFT},{middle} H{MARGIN + SIDE_WIDTH + 1}"
    elif following is layout.right:
        path = f"M{LEFT + BOX_WIDTH},{middle} H{RIGHT - 1}"
    else:
        path = f"M{LEFT + BOX_WIDTH // 2},{top + BOX_HEIGHT} V{layout.top_of(following) - 1}"
    return f'<path class="arrow" d="{path}" marker-end="url(#head)"/>'


def main() -> None:
    """Write both diagrams."""
    parser = argparse.ArgumentParser(description="draws the state diagrams of docs/protocol.md")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="directory to write to")
    out = parser.parse_args().out
    for name, title, table in (
        ("participant-states", "The participant's half of a session", client_states.TRANSITIONS),
        ("coordinator-states", "The coordinator's half of a session", server_states.TRANSITIONS),
    ):
        (out / f"{name}.svg").write_text(draw(title, table), encoding="utf-8")


if __name__ == "__main__":
    main()
