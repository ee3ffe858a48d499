"""Whether a site can take a session: its disk, asked before anything is fetched, and asked again when it could not.

A session needs the model, the certificates, the revocation list and the masked update in `scratch`. It reserves nothing
and decides nothing: the driver declines, and connects anew when there is room: that is how a coordinator learns that it
may ask again.
"""

from __future__ import annotations

import asyncio
import errno
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog

from maskwork.errors import StorageUnavailable, storage_unavailable
from maskwork.secagg.ring import packed_size
from maskwork.wire.codec import OpenSession

log = structlog.get_logger("maskwork.participant")

FIRST_LOOK_S = 1.0
LONGEST_LOOK_S = 30.0
"""Also how late a site may be when its hours begin; short, because its clock may jump."""
FOR_THE_LEDGER = 1 << 20
"""Left free beside what a session needs: a ledger that cannot be written ends the agent."""

Pause = Callable[[float], Awaitable[None]]


def needed_for(offer: OpenSession) -> int:
    """Bytes that a session takes in `scratch`."""
    plan = offer.proposal.plan
    update = packed_size(plan.parameters, plan.encoding.ring_bits)
    history = offer.history.tail_bytes if offer.history.digests_digest else 0
    fetched = offer.model_size + offer.certificates_size + history + 2 * offer.revocation_list_size
    return fetched + update + FOR_THE_LEDGER


def make_room(folder: Path, needed: int) -> None:
    """Make a session's folder, see that it can be written, and that so many bytes are free.

    Raises:
        StorageUnavailable: It cannot take the session now; the text says what to do.
        OSError: The disk fails in another way.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        probe = folder / "probe"
        probe.write_bytes(b".")
        probe.unlink()
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"a session needs {needed} bytes, {free} are free")
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        unavailable = storage_unavailable(error, file=folder)
        if unavailable is None:
            raise
        raise unavailable from error


async def wait_for_room(folder: Path, needed: int, *, pause: Pause = asyncio.sleep) -> None:
    """Return when `make_room` would succeed; looks seldom, and leaves nothing behind."""
    seconds = FIRST_LOOK_S
    while True:
        await pause(seconds)
        try:
            make_room(folder, needed)
        except (StorageUnavailable, OSError):
            seconds = min(2 * seconds, LONGEST_LOOK_S)
        else:
            shutil.rmtree(folder, ignore_errors=True)
            log.info("there is room again", folder=str(folder.parent))
            return


async def wait_for_hours(
    open_at: Callable[[float], bool], *, clock: Callable[[], float], pause: Pause = asyncio.sleep
) -> None:
    """Return when the policy's hours let a session begin."""
    while not open_at(clock()):
        await pause(LONGEST_LOOK_S)
