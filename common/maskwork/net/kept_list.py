"""The newest revocation list that a party has relied upon, on its disk, so that a restart does not forget it.

Both sides keep one in their state directory. It is the `is_revoked` container that every later check asks, and what a
list that comes later has to follow. It fetches nothing and looks at no dates: a list that is out of date is still
better than none, and whether it is good enough for something is for that something to say.
"""

from pathlib import Path

from maskwork.errors import StoreError
from maskwork.net.identity import TrustRoots
from maskwork.net.revocation import NO_LIST, ListProblem, RevocationError, RevocationList
from maskwork.net.whole_files import write_whole


class KeptList:
    """One file with the newest list, and that list.

    Attributes:
        current: The list in force; `NO_LIST` before there is one.
        problem: Why the file that was found could not be relied upon; empty if it could.
        damaged: It is no list at all any more, or a changed one: it was not put out of force by the end of its CA.
    """

    def __init__(self, path: Path, roots: TrustRoots, *, now: float) -> None:
        """Read the file at `path`, if there is one.

        One that a root signed which is not trusted any more is left aside: the replacement of a CA must not stop a
        party that was away meanwhile. Whether one that is damaged may be left aside, its owner has to know.

        Raises:
            StoreError: The file is there and cannot be read.
        """
        self._path = path
        self.current, self.problem, self.damaged = NO_LIST, "", False
        try:
            self.current = RevocationList.parse(path.read_bytes(), roots, now=now)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise StoreError.from_cause(error, file=path) from error
        except RevocationError as error:
            self.problem, self.damaged = f"{path}: {error}", error.problem is not ListProblem.WRONG_CA

    def __contains__(self, name: object) -> bool:
        return name in self.current

    def keep(self, new: RevocationList) -> None:
        """Put a newer list in force, on the disk first.

        Raises:
            RevocationError: `OLDER` or `EQUIVOCATION`; nothing has changed.
            StoreError: The disk cannot take it; nothing has changed.
        """
        self._check(new)
        if new.digest == self.current.digest:
            return
        try:
            write_whole(self._path, new.der)
        except OSError as error:
            raise StoreError.from_cause(error, file=self._path) from error
        self.current = new

    def hold(self, new: RevocationList) -> None:
        """Put a newer list in force that the disk cannot take: a restart forgets it.

        Raises:
            RevocationError: `OLDER` or `EQUIVOCATION`; nothing has changed.
        """
        self._check(new)
        self.current = new

    def _check(self, new: RevocationList) -> None:
        held = self.current
        new.check_follows(held.number, held.digest if held.number else None)
