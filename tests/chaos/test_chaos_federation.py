"""What a killed service leaves behind is found by its mark, however it was started."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.chaos.federation import MARK, marked

pytestmark = pytest.mark.e2e
PATIENCE_S = 10.0

PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
print(child.pid, flush=True)
child.wait()
"""


def test_a_child_that_outlives_its_killed_parent_is_found_until_it_ends(tmp_path: Path) -> None:
    mark = f"{tmp_path}#1"
    parent = subprocess.Popen([sys.executable, "-c", PARENT], env={MARK: mark}, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    try:
        assert set(marked(mark)) == {parent.pid, child}
        parent.kill()
        parent.wait()
        assert marked(mark) == (child,)
        assert marked(f"{tmp_path}#2") == ()
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
        ending = os.pidfd_open(child)
        os.kill(child, signal.SIGKILL)
        select.select([ending], [], [], PATIENCE_S)  # readable once it has ended
        os.close(ending)
    assert marked(mark) == ()
