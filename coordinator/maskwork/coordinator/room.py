"""Whether there is room for a round before anybody trains for it, and the files that a session begins with.

A round needs its accumulator, as many spooled uploads as are admitted at a time, and the next model. What is short is
said with the figures. Nothing but the accumulator is reserved, and not that either where the state is encrypted: a disk
that fills up later is met where it is written to.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from maskwork.coordinator import aggregation
from maskwork.coordinator.session import ActiveSession
from maskwork.errors import StorageUnavailable, StoreError

FOR_THE_DATABASE = 4 << 20
"""Left free beside what a round needs: a database that cannot be written ends the coordinator."""


def make_room(session: ActiveSession, models: Path) -> None:
    """Make a session's folder and accumulator; or leave nothing, and say what is missing.

    Raises:
        StorageUnavailable: There is no room for the round, or the disk cannot be written now.
        StoreError: The disk failed in another way.
    """
    try:
        session.folder.mkdir(parents=True)
        seal = None if session.vault is None else (session.vault, session.id)
        aggregation.create_accumulator(session.accumulator, session.shape, seal=seal)
        _check_room(session, models)
    except OSError as error:
        shutil.rmtree(session.folder, ignore_errors=True)
        raise StoreError.from_cause(error, file=session.folder) from error
    except StorageUnavailable:
        shutil.rmtree(session.folder, ignore_errors=True)
        raise


def _check_room(session: ActiveSession, models: Path) -> None:
    uploads = min(session.slots.limit, session.plan.cohort) * session.shape.upload_bytes
    needs = {session.folder: uploads + FOR_THE_DATABASE}
    if session.vault is not None:  # the encrypted sum is written anew for each upload, beside the one before
        needs[session.folder] += 2 * (8 * session.shape.statistics + 4 * session.shape.parameters)
    if os.stat(models).st_dev == os.stat(session.folder).st_dev:
        needs[session.folder] += session.model_size
    else:
        needs[models] = session.model_size
    for folder, needed in needs.items():
        free = shutil.disk_usage(folder).free
        if free < needed:
            full = OSError(errno.ENOSPC, f"a round needs {needed} bytes more, {free} are free")
            raise StorageUnavailable.from_cause(full, file=folder.parent)
