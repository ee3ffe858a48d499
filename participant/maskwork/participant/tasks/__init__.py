"""Tasks that come ready-made. A site's own tasks live in the site's own package."""

from collections.abc import Mapping
from typing import Final

READY_MADE: Final[Mapping[str, str]] = {"digits": "maskwork.participant.tasks.digits:Digits"}
"""Import paths by the short names that `maskwork model init --task` and a site's configuration take."""


def import_path_of(task: str) -> str:
    """The import path of a ready-made task's short name; anything else is one already."""
    return READY_MADE.get(task, task)
