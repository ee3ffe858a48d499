"""Is this log whole, in order, unaltered, and its owner's? From the CA's certificate and the log alone. Pure.

Every line is looked at by itself and in its place, so that what is wrong is named: which record, of which kind, and
what about it. Time is what the records say; certificates are judged at the time of the record that shows them.

What this cannot find, and nobody can from one copy of a log alone: records cut off at its end, and a history that the
owner itself wrote anew and signed again. Heads in the hands of others show both: `against`.

What the records say about each other is `contents`' business.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric import ec

from maskwork.audit import chain
from maskwork.audit.chain import EMPTY_HEAD
from maskwork.audit.lines import Entry, LineError, decode_line, split_line
from maskwork.audit.records import Opened, Signer
from maskwork.net.identity import Identity, IdentityError, Role, TrustRoots

OWNERS = frozenset({Role.COORDINATOR, Role.PARTICIPANT})


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with one record.

    Attributes:
        index: the record's number, from 0; None when it is about the log as a whole.
        kind: its kind, as far as it can be told; empty if it cannot.
        what: what is wrong, for people.
        log: whose log it is about.
        by_head: whether a head that somebody else holds showed it.
    """

    index: int | None
    kind: str
    what: str
    log: str = ""
    by_head: bool = False

    def __str__(self) -> str:
        where = "" if self.index is None else f"record {self.index}{f' ({self.kind})' if self.kind else ''}: "
        return f"{f'{self.log}: ' if self.log else ''}{where}{self.what}"


@dataclass(slots=True)
class Chain:
    """A log as far as it could be read.

    Attributes:
        owner: whose log it is; None when not even that can be believed.
        owner_keys: the owner's keys with the record from which each signs.
        entries: the records, in the order of the file.
        heads: the head after each number of records, as recomputed; `heads[0]` is that of none.
        problems: what is wrong.
    """

    owner: Identity | None = None
    owner_keys: list[tuple[int, ec.EllipticCurvePublicKey]] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    heads: list[bytes] = field(default_factory=lambda: [EMPTY_HEAD])
    problems: list[Problem] = field(default_factory=list)

    @property
    def size(self) -> int:
        """How many records were read."""
        return len(self.entries)


def verify_chain(lines: Iterable[bytes], roots: TrustRoots) -> Chain:
    """Check every line: its form, its place, its head, its signature, and the certificates that sign."""
    checking = _Checking(roots)
    for line in lines:
        checking.take(line)
    if not checking.chain.entries and not checking.chain.problems:
        checking.chain.problems.append(Problem(None, "", "the log is empty: not even its first record is there"))
    return checking.chain


class _Checking:
    """One pass over a log."""

    def __init__(self, roots: TrustRoots) -> None:
        self.chain = Chain()
        self._roots = roots
        self._expected = 0
        self._head: bytes | None = EMPTY_HEAD  # as the line before states it; None: that line could not be read
        self._federation = ""

    def take(self, line: bytes) -> None:
        if not line.endswith(b"\n"):
            self._problem(self._expected, "", "the line is incomplete: cut off, or copied while it was written")
            return
        try:
            entry = decode_line(line)
        except LineError as error:
            self._problem(self._expected, "", str(error))
            self._head = _stated_head(line)
            self._expected += 1
            return
        if self._in_place(entry):
            self._follows(entry)
        self._signs(entry)
        if entry.index >= self._expected:
            self._expected = entry.index + 1
            self._head = entry.signed.head
        self.chain.entries.append(entry)
        self.chain.heads.append(chain.next_head(self.chain.heads[-1], len(self.chain.heads) - 1, entry.digest))

    def _in_place(self, entry: Entry) -> bool:
        if entry.index == self._expected:
            return True
        if entry.index > self._expected:
            last = entry.index - 1
            those = f"records {self._expected} to {last} are" if last > self._expected else f"record {last} is"
            there = f"record {entry.index} ({entry.kind}) stands"
            self._problem(self._expected, "", f"{those} not in {'their' if ' are' in those else 'its'} place: {there}")
        else:
            what = f"stands where record {self._expected} should: moved from its place, repeated or inserted"
            self._problem(entry.index, entry.kind, what)
        return False

    def _follows(self, entry: Entry) -> None:
        if self._head is not None and entry.signed.head != chain.next_head(self._head, entry.index, entry.digest):
            what = "altered, or it does not follow from the record before it: its head is not that of its contents"
            self._problem(entry.index, entry.kind, what)

    def _signs(self, entry: Entry) -> None:
        record = entry.record
        if entry.index == 0 and isinstance(record, Opened):
            self._federation = record.federation
            self._trust(entry, record.certificate)
        elif isinstance(record, Signer):
            self._trust(entry, record.certificate)
        elif isinstance(record, Opened) or entry.index == 0:
            self._problem(entry.index, entry.kind, "a log begins with one `opened` record, and has no other")
        if not self.chain.owner_keys:
            if self.chain.owner is None and not self.chain.problems:
                self._problem(entry.index, entry.kind, "nothing says whose log this is")
            return
        if not chain.is_signed_by(entry.signed, self._federation, self.chain.owner_keys[-1][1]):
            what = f"not signed by {self.chain.owner.uri if self.chain.owner else 'its owner'}: altered, or inserted"
            self._problem(entry.index, entry.kind, what)

    def _trust(self, entry: Entry, certificate: bytes) -> None:
        try:
            verified = self._roots.verify(certificate, now=entry.at, federation=self._federation)
        except IdentityError as error:
            self._problem(entry.index, entry.kind, f"the certificate that signs this log is not good: {error}")
            return
        if verified.identity.role not in OWNERS:
            what = f"{verified.identity.uri} signs this log, and keeps no audit log by its role"
            self._problem(entry.index, entry.kind, what)
            return
        if self.chain.owner is not None and verified.identity != self.chain.owner:
            what = f"the log of {self.chain.owner.uri} goes on as that of {verified.identity.uri}"
            self._problem(entry.index, entry.kind, what)
            return
        self.chain.owner = verified.identity
        self.chain.owner_keys.append((entry.index, verified.public_key))

    def _problem(self, index: int, kind: str, what: str) -> None:
        self.chain.problems.append(Problem(index, kind, what))


def _stated_head(line: bytes) -> bytes | None:
    try:
        return split_line(line)[1]
    except LineError:
        return None
