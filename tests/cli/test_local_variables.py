"""What goes wrong is told without the values of local variables, on a terminal too: keys are among them."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

SECRET = "hunter" + "2" * 12

FAILING_LOG = """
import structlog
from maskwork import logs
logs.configure("info")
def unseal(key):
    raise ValueError("it does not open")
try:
    unseal("hunter" + "2" * 12)
except ValueError:
    structlog.get_logger().exception("a fault")
"""

FAILING_COMMAND = """
import sys, types
from importlib.metadata import EntryPoint
import typer
from maskwork.cli import ENTRY_POINT_GROUP, run
app = typer.Typer()
@app.callback()
def group() -> None: ...
@app.command()
def unseal() -> None:
    key = "hunter" + "2" * 12
    raise ValueError("it does not open")
sys.modules["failing"] = types.ModuleType("failing")
sys.modules["failing"].app = app
run({"failing": (EntryPoint("failing", "failing:app", ENTRY_POINT_GROUP),)}, ["failing", "unseal"])
"""


def said_on_a_terminal(program: str) -> str:
    """All that a program writes to a terminal that is 200 columns wide."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "COLUMNS": "200", "TERM": "xterm"},
    )
    os.close(theirs)
    said = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        said += piece
    os.close(ours)
    process.wait(timeout=60)
    return said.decode(errors="replace")


@pytest.mark.parametrize("program", [FAILING_LOG, FAILING_COMMAND], ids=["log", "command"])
def test_a_traceback_shows_no_local_variable(program: str) -> None:
    said = said_on_a_terminal(program)
    assert "it does not open" in said
    assert "unseal" in said
    assert SECRET not in said
    said_in_a_pipe = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60
    )
    assert "it does not open" in said_in_a_pipe.stderr
    assert SECRET not in said_in_a_pipe.stderr + said_in_a_pipe.stdout
