"""One's own identity as it was read at one moment, and the watch that sees when it was replaced on the disk.

A service goes by the pair that it loaded, not by what the files say at the instant: certificate and key are two files,
and between the writing of one and of the other they do not fit. `IdentityWatch` looks at the files every few seconds;
a new pair that fits, is good, and names the same member is handed over, and whoever gets it decides when it counts.
It tells in the log when the certificate will expire, a month ahead and then daily.

It asks nobody for a certificate (`maskwork.enrolment_client`, an operator) and does not follow a new ``ca.pem``.

Rules it upholds: what is not good is never taken up, and said once; the old pair stays until its own end; time and the
pause between two looks are arguments.
"""

import asyncio
from collections.abc import Awaitable, Callable, Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import structlog
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from maskwork.net.diagnosis import check_own_files
from maskwork.net.identity import (
    UNREADABLE_CERTIFICATE,
    IdentityError,
    IdentityFiles,
    IdentityProblem,
    Role,
    TrustRoots,
    VerifiedCertificate,
    read_identity_file,
    read_key_file,
    to_der,
)

log = structlog.get_logger("maskwork.identity")

LOOK_S: Final = 2.0
TELL_BEFORE_S: Final = 30 * 86400.0
TELL_EVERY_S: Final = 86400.0

Stamp = tuple[tuple[int, int, int, int], ...]


@dataclass(frozen=True, slots=True)
class LoadedIdentity:
    """A certificate with its key, both read and checked together.

    Attributes:
        certificate: Verified when it was loaded.
        cert_pem: The same in PEM.
        ca_pem: The federation's CA, PEM.
        key: The private key.
        key_pem: The same in PEM.
    """

    certificate: VerifiedCertificate
    cert_pem: bytes = field(repr=False)
    ca_pem: bytes = field(repr=False)
    key: ec.EllipticCurvePrivateKey = field(repr=False)
    key_pem: bytes = field(repr=False)

    @classmethod
    def load(
        cls,
        files: IdentityFiles,
        *,
        now: float,
        role: Role,
        roots: TrustRoots,
        is_revoked: Container[bytes] = frozenset(),
    ) -> "LoadedIdentity":
        """Read the three files and check them the way that a peer will.

        Raises:
            IdentityError: What is wrong, beginning with the file that is.
        """
        check_own_files(files, now=now, role=role, roots=roots)  # words what is wrong better than what follows
        ca_pem, cert_pem, key_pem = (
            read_identity_file(files.ca),
            read_identity_file(files.cert),
            read_key_file(files.key),
        )
        try:
            der = to_der(x509.load_pem_x509_certificate(cert_pem))
            key = load_pem_private_key(key_pem, password=None)
        except (*UNREADABLE_CERTIFICATE, ValueError, TypeError):
            raise _changing(files) from None
        certificate = roots.verify(der, now=now, role=role, is_revoked=is_revoked)
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key:
            raise _changing(files)
        return cls(certificate, cert_pem, ca_pem, key, key_pem)


class IdentityWatch:
    """Sees when the pair in an identity directory was replaced."""

    def __init__(
        self,
        files: IdentityFiles,
        current: LoadedIdentity,
        *,
        roots: TrustRoots,
        remedy: str,
        is_revoked: Container[bytes] = frozenset(),
        clock: Callable[[], float],
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Begin with the identity that the service was started with.

        Args:
            files: What is looked at.
            current: As loaded.
            roots: The federation's CAs, as the service was started with.
            remedy: How a new certificate is got here, for the log.
            is_revoked: As in `TrustRoots.verify`.
            clock: Unix time in seconds.
            pause: Waits between two looks.
        """
        self._files = files
        self._current = current
        self._roots = roots
        self._remedy = remedy
        self._is_revoked = is_revoked
        self._clock = clock
        self._pause = pause
        self._seen: Stamp = ()
        self._doubtful: Stamp = ()
        self._told_at = float("-inf")

    @property
    def current(self) -> LoadedIdentity:
        """The newest good pair."""
        return self._current

    async def run(self, taken: Callable[[LoadedIdentity], Awaitable[None]]) -> None:
        """Look until cancelled, and hand every new pair over."""
        while True:
            self._tell_expiry()
            if self._look():
                await taken(self._current)
            await self._pause(LOOK_S)

    def _look(self) -> bool:
        """Whether there is a new pair."""
        stamp = _stamp(self._files.cert, self._files.key)
        if stamp == self._seen:
            return False
        try:
            found = LoadedIdentity.load(
                self._files,
                now=self._clock(),
                role=self._current.certificate.identity.role,
                roots=self._roots,
                is_revoked=self._is_revoked,
            )
            if found.certificate.identity != self._current.certificate.identity:
                raise IdentityError(
                    IdentityProblem.WRONG_ROLE,
                    f"{self._files.cert} names {found.certificate.identity.uri}, and this service was started as "
                    f"{self._current.certificate.identity.uri}: restart it if that is meant",
                )
        except IdentityError as error:
            # Between the renaming of one file and of the other they do not fit: what stays so is a mistake.
            if stamp == self._doubtful:
                self._seen = stamp
                log.error("the new certificate is not taken up", detail=error.text)
            self._doubtful = stamp
            return False
        self._seen = stamp
        if found.certificate.fingerprint == self._current.certificate.fingerprint:
            return False
        self._current, self._told_at = found, float("-inf")
        log.info(
            "a new certificate was found",
            fingerprint=found.certificate.fingerprint.hex(),
            days=_days(found, self._clock()),
        )
        return True

    def _tell_expiry(self) -> None:
        now = self._clock()
        if now < self._told_at + TELL_EVERY_S or self._current.certificate.not_after - now > TELL_BEFORE_S:
            return
        self._told_at = now
        days = _days(self._current, now)
        said = "this certificate expires soon" if days > 0 else "this certificate has expired"
        log.warning(said, file=str(self._files.cert), days=days, remedy=self._remedy)


def _days(identity: LoadedIdentity, now: float) -> float:
    return round((identity.certificate.not_after - now) / 86400, 1)


def _stamp(*paths: Path) -> Stamp:
    found = []
    for path in paths:
        try:
            stat = path.stat()
        except OSError:
            found.append((0, 0, 0, 0))
        else:
            # The mode too: a key that others could read is looked at again once they cannot.
            found.append((stat.st_ino, stat.st_mtime_ns, stat.st_size, stat.st_mode))
    return tuple(found)


def _changing(files: IdentityFiles) -> IdentityError:
    return IdentityError(
        IdentityProblem.WRONG_KEY, f"{files.cert} and {files.key} do not fit each other: they are being replaced"
    )
