"""One pass over the records of a log, whoever's it is: each is given to the step for its kind, and may contradict.

What the steps look at is `contents`'s (a coordinator's log) and `site_contents`'s. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from maskwork.audit.lines import Entry
from maskwork.audit.records import Certificate
from maskwork.audit.verify import Chain, Problem
from maskwork.net.identity import IdentityError, TrustRoots, VerifiedCertificate

Steps = Mapping[type, Callable[[Entry], None]]


class Contradiction(Exception):
    """A record cannot be so; the text says why."""


class Examining:
    """What every examination keeps while it goes through a log.

    Attributes:
        chain: the log.
        federation: of its owner; empty if not even that is known.
        certificates: those that were verified so far, by fingerprint.
    """

    def __init__(self, chain: Chain, roots: TrustRoots) -> None:
        self.chain = chain
        self.federation = "" if chain.owner is None else chain.owner.federation
        self.certificates: dict[bytes, VerifiedCertificate] = {}
        self._roots = roots
        self._seen: set[tuple[str, ...]] = set()

    def go_through(self, steps: Steps, problems: list[Problem]) -> None:
        """Give every record to its step; what contradicts is added to `problems`."""
        for entry in self.chain.entries:
            try:
                self._once(entry)
                step = steps.get(type(entry.record))
                if step is not None:
                    step(entry)
            except Contradiction as found:
                problems.append(Problem(entry.index, entry.kind, str(found)))

    def _once(self, entry: Entry) -> None:
        key = entry.record.key
        if key is None:
            return
        if key in self._seen:
            raise Contradiction("there is such a record already, and there may be one only")
        self._seen.add(key)

    def verified(self, record: Certificate, at: float) -> VerifiedCertificate:
        """The certificate of a record, if the CA signed it and it was good when it was written down.

        Raises:
            Contradiction: it is not.
        """
        try:
            verified = self._roots.verify(record.certificate, now=at, federation=self.federation)
        except IdentityError as error:
            raise Contradiction(str(error)) from None
        if verified.fingerprint != record.fingerprint:
            raise Contradiction("the fingerprint is not that of the certificate")
        self.certificates[record.fingerprint] = verified
        return verified
