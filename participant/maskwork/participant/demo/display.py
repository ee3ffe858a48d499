"""How the demo speaks: on a terminal with a spinner while it works, else a plain line for each thing that it does.

It is NOT the view of the job (`maskwork.watch_view`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text


def say(console: Console, text: str) -> None:
    """One line; above the live view, if there is one."""
    console.print(Text(text, "bold" if console.is_terminal else ""), soft_wrap=True)


@contextmanager
def busy(console: Console, text: str) -> Iterator[None]:
    """Say what is being done for as long as it takes."""
    if not console.is_terminal or console.is_dumb_terminal:
        say(console, text)
        yield
        return
    with console.status(Text(text)):
        yield
