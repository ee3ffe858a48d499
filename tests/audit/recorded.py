"""Audit logs of a federation that ran: production's drivers, in the simulation, with a site that crashed on the way.

Made once for all tests of a process. `rewritten` is the liar that holds the owner's key: it changes records and signs
the whole log again, as only the coordinator itself could. Not a test itself.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from tests.simulation.identities import COORDINATOR_SIGNER, FEDERATION, ROOTS, member
from tests.simulation.operations import COORDINATOR, Kind, Op
from tests.simulation.schedules import ListedSchedule
from tests.simulation.world import Settings, World

from maskwork.audit import chain
from maskwork.audit.lines import Entry, decode_line, encode_line, record_bytes
from maskwork.audit.log import AuditLog
from maskwork.audit.reading import Judged, judge
from maskwork.audit.records import Plan, Record
from maskwork.secagg import keys
from maskwork.secagg.keys import Signer
from maskwork.secagg.plan import RoundPlan, session_id
from maskwork.wire.plan_codec import decode_plan, encode_plan

SITES = ("site-1", "site-2", "site-3", "site-4", "site-5")
LEFT_OUT = "site-5"


@dataclass(frozen=True)
class Recorded:
    """What a run left: the lines of the coordinator's log, and each site's."""

    coordinator: tuple[bytes, ...]
    sites: dict[str, tuple[bytes, ...]]

    @property
    def entries(self) -> list[Entry]:
        return [decode_line(line) for line in self.coordinator]

    def index_of(self, kind: str, *, last: bool = False) -> int:
        """The number of the first or last record of a kind."""
        found = [entry.index for entry in self.entries if entry.kind == kind]
        return found[-1 if last else 0]


@cache
def recorded(rounds: int = 3) -> Recorded:
    """Five sites, `rounds` rounds; one site is killed in the first, and comes back without its session."""
    operations = [Op(Kind.CRASH, LEFT_OUT, number=23)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # a killed process leaves files open: see tests/simulation
        world = World(Settings(sites=5, rounds=rounds), ListedSchedule(operations)).run()
        assert world.completed
        logs = {name: tuple(log.splitlines(keepends=True)) for name, log in world.logs.items()}
        del world
        gc.collect()
    return Recorded(logs.pop(COORDINATOR), logs)


def signed_anew(entries: list[tuple[Record, float]], signer: Signer, federation: str = FEDERATION) -> list[bytes]:
    """A log with these records, from the first to the last, as its owner would have written it."""
    head, lines = chain.EMPTY_HEAD, []
    for index, (record, at) in enumerate(entries):
        data = record_bytes(record, index=index, at=at)
        head = chain.next_head(head, index, chain.record_digest(data))
        lines.append(encode_line(data, chain.sign_head(signer, federation, index + 1, head)))
    return lines


def rewritten(
    lines: tuple[bytes, ...],
    change: Callable[[list[tuple[Record, float]]], None],
    signer: Signer = COORDINATOR_SIGNER,
) -> list[bytes]:
    """The log after `change`, with every head and every signature made anew."""
    records = [(entry.record, entry.at) for entry in map(decode_line, lines)]
    change(records)
    return signed_anew(records, signer)


def rewritten_with_plans(lines: tuple[bytes, ...], change: Callable[[list[tuple[Record, float]]], None]) -> list[bytes]:
    """As `rewritten`, and the liar signs every plan anew, with the head that its new history had before it.

    What it cannot make anew is what participants signed: their signatures are over the session that the old plan had.
    """
    records = [(entry.record, entry.at) for entry in map(decode_line, lines)]
    change(records)
    head, sessions = chain.EMPTY_HEAD, dict[bytes, bytes]()
    for index, (record, at) in enumerate(records):
        if isinstance(record, Plan):
            plan = replace(decode_plan(record.plan), audit_head=head)
            made = signed_plan(plan, index)
            sessions[record.session] = made.session
            records[index] = (made, at)
        elif (session := getattr(record, "session", b"")) in sessions:
            records[index] = (record.model_copy(update={"session": sessions[session]}), at)
        data = record_bytes(records[index][0], index=index, at=at)
        head = chain.next_head(head, index, chain.record_digest(data))
    return signed_anew(records, COORDINATOR_SIGNER)


def signed_plan(plan: RoundPlan, audit_size: int) -> Plan:
    """A plan that the coordinator signs, as it would."""
    data = encode_plan(plan)
    session = session_id(data)
    signed = keys.signed_message("plan", session=session, sender=keys.COORDINATOR_INDEX, fields=b"")
    return Plan(session=session, plan=data, signature=COORDINATOR_SIGNER.sign(signed), audit_size=audit_size)


def site_signer(name: str) -> Signer:
    return next(m.signer for m in map(member, range(5)) if m.name == name)


def judged(folder: Path, lines: list[bytes] | tuple[bytes, ...], **sites: list[bytes] | tuple[bytes, ...]) -> Judged:
    """As `maskwork audit verify` judges; `sites` by name, with an underscore for the hyphen."""
    log = folder / "log"
    log.write_bytes(b"".join(lines))
    others = []
    for name, site_lines in sites.items():
        other = folder / name
        other.write_bytes(b"".join(site_lines))
        others.append(other)
    return judge(log, ROOTS, others)


def reopened(folder: Path, lines: list[bytes] | tuple[bytes, ...]) -> AuditLog:
    path = folder / "audit.log"
    path.write_bytes(b"".join(lines))
    return AuditLog.open(path, FEDERATION, COORDINATOR_SIGNER, fsync=lambda _: None)
