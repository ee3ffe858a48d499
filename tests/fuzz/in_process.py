"""The fast half of the campaign: every reader, in this process, one input after the other. Not a test itself."""

from __future__ import annotations

import os
import random
import tempfile
import time
from pathlib import Path

from tests.fuzz.tally import Gauge, Tally
from tests.fuzz.targets import Target, targets

ROUND = 50
"""Inputs to one target before the next one's turn."""
MOST_MIB = 1024


def campaign(tally: Tally, *, seconds: float, seed: int) -> None:
    """Give each target its share of the time; `seed` makes the same inputs again."""
    gauge, end = Gauge(os.getpid()), time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        turns = 0
        every = targets(Path(folder))
        while time.monotonic() < end:
            for target in every:
                for number in range(turns * ROUND, (turns + 1) * ROUND):
                    one(tally, target, f"{seed}:{target.name}:{number}")
            turns += 1
            gauge.look()
    tally.figures["in_process"] = gauge.figures()
    if gauge.peak_rss_mib > MOST_MIB:
        tally.failed(f"in process: {gauge.peak_rss_mib:.0f} MiB of memory, more than {MOST_MIB}")


def one(tally: Tally, target: Target, seed: str) -> None:
    """Draw one input and try it."""
    data = target.draw(random.Random(seed))
    try:
        target.check(data)
    except target.typed as error:
        tally.tried(target.name, type(error).__name__)
    except Exception as error:  # that is what a campaign looks for
        tally.crashed(target.name, seed, error)
    except RecursionError as error:
        tally.crashed(target.name, seed, error)
    else:
        tally.tried(target.name, "accepted")
