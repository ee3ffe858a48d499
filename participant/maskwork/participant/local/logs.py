"""What the processes of a run say in their logs, one JSON object on a line."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Final

_LOG_PAUSE_S: Final = 0.05


async def coordinator_ready(log: Path) -> None:
    """Wait for the line with which the coordinator says that it listens."""
    while not any(event_of(line) == "coordinator ready" for line in log.read_bytes().splitlines()):
        await asyncio.sleep(_LOG_PAUSE_S)


def event_of(line: bytes) -> str:
    """The event that a line of a JSON log tells; empty for any other line."""
    try:
        said: object = json.loads(line)
    except ValueError:
        return ""
    return str(said.get("event", "")) if isinstance(said, dict) else ""
