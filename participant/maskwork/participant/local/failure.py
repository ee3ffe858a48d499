"""Why a run could not be carried through.

It is NOT a verdict on its result: that is the caller's.
"""

from __future__ import annotations

from maskwork.errors import UserError


class RunFailed(UserError):
    """The run cannot go on.

    Attributes:
        process: The process that it is about, if it is about one; its log then says more.
    """

    def __init__(self, what: str, *, process: str = "") -> None:
        super().__init__(what)
        self.process = process
