"""What a site knows of revoked certificates: the newest list that a plan named, and whether the next plan's may follow.

The coordinator shows the list; the federation's CA signed it, and the site's own records and policy say whether it will
do: its number never goes back, one number is one list, and it is not too old. Each refusal is a `PlanRefused` whose
text goes to the coordinator's operator. What is relied upon is on the disk before, so that a restart forgets nothing.

It is also the `is_revoked` container that the connection asks about the coordinator's certificate. It sends nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Protocol

import structlog
from cryptography import x509

from maskwork.net.identity import TrustRoots, VerifiedCertificate, serial_bytes
from maskwork.net.kept_list import KeptList
from maskwork.net.revocation import (
    LIST_FILE,
    NO_LIST,
    ListProblem,
    RevocationError,
    RevocationList,
    check_follows,
)
from maskwork.participant.policy import Policy
from maskwork.participant.work import Link, Work
from maskwork.secagg.errors import DeclineCode, PlanRefused
from maskwork.secagg.plan import RoundPlan

log = structlog.get_logger("maskwork.participant")


class CoordinatorRevoked(PlanRefused):
    """The plan is refused, and so is everything else that this coordinator says."""


class Numbers(Protocol):
    """The durable record of the highest list number seen; a `maskwork.participant.ledger.Ledger` in a service."""

    def highest_revocation_number(self, federation: str) -> int | None:
        """The number of the newest list seen."""
        ...

    def record_revocation_number(self, federation: str, number: int) -> None:
        """Record that a list was seen."""
        ...


class Revocations:
    """The list that this site relies upon, and the judgement of those that plans name."""

    def __init__(
        self,
        state: Path,
        roots: TrustRoots,
        *,
        federation: str,
        numbers: Numbers,
        policy: Policy,
        clock: Callable[[], float],
    ) -> None:
        self._kept = KeptList(state / LIST_FILE, roots, now=clock())
        self._roots = roots
        self._federation = federation
        self._numbers = numbers
        self._policy = policy
        self._clock = clock
        if self._kept.problem:
            log.warning("the revocation list that was kept is left aside", detail=self._kept.problem)

    @property
    def current(self) -> RevocationList:
        """The newest list relied upon."""
        return self._kept.current

    def __contains__(self, name: object) -> bool:
        return name in self._kept

    def check_named(self, plan: RoundPlan, size: int) -> None:
        """Look at the list that a plan names, before anything is fetched for it.

        Args:
            plan: as offered.
            size: what the offer says of the list's length.

        Raises:
            PlanRefused: It is older than one seen, another one of the same number, or already known not to do.
        """
        number, digest = plan.revocation_number, plan.revocation_digest
        if bool(number) != any(digest) or (number and digest != self.current.digest and not size):
            raise PlanRefused(DeclineCode.REVOCATION, "the plan names a revocation list without saying which")
        seen, kept = self._numbers.highest_revocation_number(self._federation) or 0, self.current
        try:
            check_follows(number, digest, seen, None)
            check_follows(number, digest, kept.number, kept.digest if kept.number else None)
        except RevocationError as error:
            raise _refused(error) from error
        if not number or digest == kept.digest:
            self._check_age(kept if number else NO_LIST)

    async def fetch(self, work: Work, link: Link) -> None:
        """Have the list that a plan names read into `work`, from here or from the coordinator; nothing is recorded yet.

        Raises:
            PlanRefused: It is not the plan's, not the CA's, or too old.
            TransferError: It did not come.
        """
        plan = work.plan
        if work.revocations.number == plan.revocation_number:
            return
        if plan.revocation_digest == self.current.digest:
            work.revocations = self.current
            return
        path = work.folder / LIST_FILE
        await link.download(plan.revocation_digest, work.offer.revocation_list_size, path)
        work.revocations = await asyncio.to_thread(self.read, plan, path.read_bytes())

    def read(self, plan: RoundPlan, der: bytes) -> RevocationList:
        """Read the list that was fetched for a plan; nothing is recorded yet.

        Raises:
            PlanRefused: It is not the plan's, not the CA's, or too old.
        """
        try:
            read = RevocationList.parse(der, self._roots, now=self._clock())
            if (read.number, read.digest) != (plan.revocation_number, plan.revocation_digest):
                text = f"what was sent is list {read.number}, another than the plan's list {plan.revocation_number}"
                raise RevocationError(ListProblem.EQUIVOCATION, text)
        except RevocationError as error:
            raise _refused(error) from error
        self._check_age(read)
        return read

    def rely_upon(self, revocations: RevocationList, plan: RoundPlan, certificates: Collection[bytes]) -> None:
        """Record the list that was read for a plan, and only then use it: for the plan's roster.

        Raises:
            PlanRefused: A newer one was recorded meanwhile, or somebody in the roster is on it.
            StoreError: The disk cannot take it.
        """
        if not revocations.number:
            return
        try:
            self._kept.keep(revocations)
        except RevocationError as error:
            raise _refused(error) from error
        self._numbers.record_revocation_number(self._federation, revocations.number)
        for entry, der in zip(plan.roster, certificates, strict=True):
            if _withdrawn(der, revocations):
                text = f"the certificate of {entry.participant} is on revocation list {revocations.number}"
                raise PlanRefused(DeclineCode.REVOCATION, text)

    def check_coordinator(self, coordinator: VerifiedCertificate) -> None:
        """See that the coordinator at the other end is not on the list itself.

        Raises:
            CoordinatorRevoked: It is.
        """
        if _withdrawn(coordinator.der, self.current):
            log.error("the coordinator's certificate is revoked", coordinator=coordinator.name)
            text = f"the coordinator's own certificate is on revocation list {self.current.number}"
            raise CoordinatorRevoked(DeclineCode.REVOCATION, text)

    def _check_age(self, revocations: RevocationList) -> None:
        now, known = self._clock(), revocations.number > 0
        try:
            revocations.check_dates(now)
        except RevocationError as error:
            raise _refused(error) from error
        made = revocations.this_update if known else None
        if (refusal := self._policy.revocation_refusal(revocations.number, made, now)) is not None:
            raise PlanRefused(refusal.code, refusal.detail)


def _withdrawn(der: bytes, revocations: RevocationList) -> bool:
    """Whether a certificate is on a list; one that cannot be read is on none, and refused where it is verified."""
    if not revocations.revoked:
        return False
    try:
        return serial_bytes(x509.load_der_x509_certificate(der)) in revocations
    except (ValueError, TypeError, OverflowError, x509.InvalidVersion):
        return False


def _refused(error: RevocationError) -> PlanRefused:
    return PlanRefused(DeclineCode.REVOCATION, f"{error.problem}: {error}"[:500])
