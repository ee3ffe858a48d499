"""What the coordinator says of a model that it hands out: which round it came out of, signed with its own key.

NOT here: whose model it is to ask for (`guard`, `jobs`), and what the signature covers (`maskwork.model_signature`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from maskwork.coordinator.job_runner import Federation
from maskwork.coordinator.jobs import JobDesk
from maskwork.coordinator.models import ModelFile
from maskwork.model_signature import ModelStatement, SignedModel, sign_model

AuditHead = Callable[[], tuple[bytes, int] | None]
"""Head and number of records of the audit log as it stands; None without one."""


def no_audit() -> None:
    """Of a coordinator that keeps no audit log."""


@dataclass(frozen=True, slots=True)
class Exports:
    """Signs what is exported.

    Attributes:
        federation: Who this coordinator is; read anew for each signature, since certificates are renewed.
        desk: Knows the jobs.
        audit_head: Where the audit log stands.
        clock: Unix time.
    """

    federation: Callable[[], Federation]
    desk: JobDesk
    audit_head: AuditHead = no_audit
    clock: Callable[[], float] = time.time

    def of(self, job_id: str, round_number: int) -> tuple[ModelFile, SignedModel]:
        """A committed model and what is said of it; round 0 means the newest.

        Raises:
            Refused: no such job or round.
            StoreError: the file is missing.
        """
        model, number, session = self.desk.committed(job_id, round_number)
        head, size = self.audit_head() or (b"", 0)
        federation = self.federation()
        statement = ModelStatement(
            federation=federation.name,
            job_id=job_id,
            round_number=number,
            session_id=session,
            file_sha256=model.digest,
            model_digest=model.digest,
            signed_at=int(self.clock()),
            audit_head=head,
            audit_size=size,
            certificate=federation.certificate,
        )
        return model, sign_model(statement, federation.signer)
