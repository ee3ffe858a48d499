"""The columns of the database that are encrypted where there is a vault: what a session needs to go on, and evidence.

Both hold transcripts: everything that the coordinator knows of a session, in evidence also the shares that were
revealed in it. The other columns name who took part, when and with what result; docs/at-rest.md says which, and that
they are not encrypted.

NOT here: when rows are written and read; that is `store`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from maskwork.coordinator import sealed
from maskwork.coordinator.migrations import tables
from maskwork.coordinator.records import EvidenceRecord, ResumeRecord
from maskwork.coordinator.sealed import WrongKey
from maskwork.coordinator.vault import Vault

_RESUME = "resume"
_EVIDENCE = "evidence"


@dataclass(frozen=True, slots=True)
class RowSeal:
    """Seals and opens records of one database; without a vault they stay as they are."""

    vault: Vault | None
    file: str

    def resume(self, record: ResumeRecord) -> ResumeRecord:
        """As it goes into its row."""
        return replace(record, blob=self._sealed(_RESUME, record.session_id, record.blob))

    def resume_of(self, row: tables.Resume) -> ResumeRecord:
        """The record of a row. Raises `StoreError` if it does not open."""
        record = row.record()
        return replace(record, blob=self._opened(_RESUME, record.session_id, record.blob))

    def evidence(self, record: EvidenceRecord) -> EvidenceRecord:
        """As it goes into its row."""
        return replace(record, transcript=self._sealed(_EVIDENCE, _name_of(record), record.transcript))

    def evidence_of(self, row: tables.Evidence) -> EvidenceRecord:
        """The record of a row. Raises `StoreError` if it does not open."""
        record = row.record()
        return replace(record, transcript=self._opened(_EVIDENCE, _name_of(record), record.transcript))

    def reseal(self, engine: Engine) -> int:
        """Seal every row with the current key, in one transaction; returns how many were not.

        Raises:
            StoreError: One does not open; nothing was changed.
        """
        assert self.vault is not None
        changed = 0
        with Session(engine) as session, session.begin():
            for resume in session.scalars(select(tables.Resume)):
                if not self._current(resume.blob):
                    resume.blob = self.resume(self.resume_of(resume)).blob
                    changed += 1
            for evidence in session.scalars(select(tables.Evidence)):
                if not self._current(evidence.transcript):
                    evidence.transcript = self.evidence(self.evidence_of(evidence)).transcript
                    changed += 1
        return changed

    def _current(self, value: bytes) -> bool:
        assert self.vault is not None
        return sealed.is_sealed_value(value) and sealed.value_key_id(value) == self.vault.keys.current.id

    def _sealed(self, kind: str, name: bytes, plain: bytes) -> bytes:
        return plain if self.vault is None else self.vault.seal_value(kind, name, plain)

    def _opened(self, kind: str, name: bytes, value: bytes) -> bytes:
        if self.vault is not None:
            return self.vault.open_value(kind, name, value, where=self.file)
        if sealed.is_sealed_value(value):
            what = f"holds a record that is encrypted with the key {sealed.value_key_id(value).hex()}"
            raise WrongKey(what, file=self.file, remedy="Configure [encryption] with the key that it was written with.")
        return value


def forget_old_pages(engine: Engine) -> None:
    """Write a SQLite database anew, so that nothing of what was replaced is left in it or in its -wal file."""
    if engine.url.get_backend_name() != "sqlite":
        return
    connection = engine.raw_connection()
    try:
        cursor = connection.cursor()
        cursor.execute("VACUUM")
        cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        cursor.close()
    finally:
        connection.close()


def _name_of(record: EvidenceRecord) -> bytes:
    return b"\0".join((record.session_id, record.kind.encode(), record.accused.encode()))
