"""A short chaos run as part of the suite: real processes, the faults of one seed, every invariant."""

from pathlib import Path

import pytest
from tests.chaos.__main__ import run
from tests.chaos.plan import Kind

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("services")]
SEED, KILLS = 13, 4


@pytest.mark.timeout(400)
async def test_a_few_faults_break_nothing(tmp_path: Path) -> None:
    home = tmp_path / "run"
    home.mkdir()
    found = await run(home, seed=SEED, kills=KILLS, rounds=6, say=print)
    assert found.violations == ()
    assert found.kills == KILLS
    assert found.rounds >= 6
    kinds = {kind for kind, _ in found.faults}
    assert {Kind.KILL_COORDINATOR, Kind.KILL_PARTICIPANT} <= kinds
