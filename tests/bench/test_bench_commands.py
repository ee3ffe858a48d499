"""The benchmarks as people run them: real processes, tiny sizes, and the page that is made of the figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc"),
]

ROOT = Path(__file__).resolve().parents[2]
MASKWORK = [sys.executable, "-c", "from maskwork.cli import main; main()"]


def bench(*arguments: str) -> dict[str, Any]:
    done = subprocess.run([*MASKWORK, "bench", *arguments, "--json"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def test_masked_and_plain_rounds_take_turns(tmp_path: Path) -> None:
    run = tmp_path / "run"
    measured = bench(
        "round",
        "--participants",
        "3",
        "--params",
        "2000",
        "--rounds",
        "1",
        "--turns",
        "1",
        "--plain",
        "--keep",
        str(run),
    )
    for kind in ("masked", "plain"):
        assert measured[kind]["round_s"] > 0
        assert len(measured[kind]["all_rounds_s"]) == 1
        assert measured[kind]["upload_bytes_per_participant"] == 2000 * 26 // 8 + 8 * 2
    assert measured["wire_bytes_per_round"]["up"] > 3 * 2000 * 26 // 8
    assert measured["wire_bytes_per_round"]["down"] > 3 * 4 * 2000
    assert measured["peak_memory_mib"]["coordinator"] > 20
    assert measured["peak_memory_mib"]["participant"] > measured["peak_memory_mib"]["participant, imports alone"] - 50
    assert (run / "logs" / "masked-coordinator.log").exists()


def test_a_crowd_takes_part_in_one_round() -> None:
    measured = bench("scale", "--participants", "8", "--processes", "2", "--params", "1000")
    (done,) = measured["rounds"]
    assert done["survivors"] == 8
    assert done["uplink_bytes"] == 8 * (1000 * 27 // 8 + 8 * 2)
    assert measured["coordinator_peak_mib"] > 20


def test_a_run_that_fails_says_where_its_logs_are(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "masked").mkdir()
    done = subprocess.run(
        [*MASKWORK, "bench", "round", "--params", "1", "--keep", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert str(tmp_path) in done.stderr
    assert "Traceback" not in done.stderr


def test_the_page_is_made_of_one_run(tmp_path: Path) -> None:
    """`make bench` runs all of them; here one, whose figures, tables and plot are written."""
    command = [sys.executable, "benchmarks/run.py", "--only", "secagg-10", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "README.md").read_text()
    assert "| participant: all three, fused |" in page
    assert "maskwork bench secagg --params 1000000" in page
    assert (tmp_path / "floor.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "secagg-10.json").read_text())["coordinator"]["masks_expanded"] == 28
