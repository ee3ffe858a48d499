"""The federation's revocation list: which certificates are withdrawn, read from a list that the CA signed.

A list is an X.509 CRL (RFC 5280 section 5) in DER with a number, a date and a next update. `RevocationList.parse` is
the only way from bytes to a list that may be relied upon. A list is also the `is_revoked` container that
`maskwork.net.identity.TrustRoots.verify` asks.

It is NOT where lists are made (`maskwork.net.revoking`) or kept (`maskwork.net.kept_list`). It fetches nothing, and
time is an argument.

Rules it upholds:

1. A list has one accepted encoding, so its SHA-256 names it: no byte of it can change and leave it accepted.
2. Lists are complete: no delta lists, no lists of part of a federation, no entries on behalf of another issuer. Each of
   those announces itself by a critical extension, and critical extensions are refused.
3. Numbers never go back, and one number is one list (`check_follows`). While a CA is replaced either root may sign; the
   numbers go on, and serial numbers are random enough (160 bits) to need no issuer beside them.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from maskwork.errors import UserError
from maskwork.net.identity import TrustRoots
from maskwork.net.names import named, shortened, utc_text
from maskwork.net.signed_der import signed_der

LIST_FILE: Final = "revoked.crl"
"""What the newest list is called, in a CA's directory, an identity's and a state directory."""
MAX_LIST_BYTES: Final = 4 << 20
"""Longest list that is looked at; one of 20,000 entries takes about 1.2 MB."""
SERIAL_BYTES: Final = 20
CLOCKS_DIFFER_S: Final = 300.0
"""A list may be this much ahead of the clock of who reads it."""
_UNREADABLE: Final = (ValueError, TypeError, OverflowError, x509.InvalidVersion, x509.DuplicateExtension)


class Reason(StrEnum):
    """Why a certificate was withdrawn (RFC 5280 section 5.3.1), in the words of the command line."""

    UNSPECIFIED = "unspecified"
    KEY_COMPROMISE = "key-compromise"
    AFFILIATION_CHANGED = "affiliation-changed"
    SUPERSEDED = "superseded"
    CESSATION_OF_OPERATION = "cessation-of-operation"
    PRIVILEGE_WITHDRAWN = "privilege-withdrawn"


FLAGS: Final[Mapping[Reason, x509.ReasonFlags]] = MappingProxyType(
    {
        Reason.UNSPECIFIED: x509.ReasonFlags.unspecified,
        Reason.KEY_COMPROMISE: x509.ReasonFlags.key_compromise,
        Reason.AFFILIATION_CHANGED: x509.ReasonFlags.affiliation_changed,
        Reason.SUPERSEDED: x509.ReasonFlags.superseded,
        Reason.CESSATION_OF_OPERATION: x509.ReasonFlags.cessation_of_operation,
        Reason.PRIVILEGE_WITHDRAWN: x509.ReasonFlags.privilege_withdrawn,
    }
)
_REASONS: Final = MappingProxyType({flag: reason for reason, flag in FLAGS.items()})


class ListProblem(StrEnum):
    """Why a list was refused."""

    MALFORMED = "malformed"
    TOO_LONG = "too-long"
    WRONG_CA = "wrong-ca"
    NOT_YET = "not-yet"
    EXPIRED = "expired"
    OLDER = "older"
    EQUIVOCATION = "equivocation"


class RevocationError(UserError, ValueError):
    """A revocation list that is refused.

    Attributes:
        problem: The kind of fault, for code.
    """

    def __init__(self, problem: ListProblem, text: str) -> None:
        super().__init__(text)
        self.problem = problem


@dataclass(frozen=True, slots=True)
class Revocation:
    """When a certificate was withdrawn, Unix time, and why."""

    at: float
    reason: Reason


@dataclass(frozen=True, slots=True)
class RevocationList:
    """A list as a trust root signed it. `serial_bytes(certificate) in list` says whether a certificate is withdrawn.

    Attributes:
        number: Its CRL number, at least 1; 0 stands for no list.
        digest: SHA-256 of its DER; zeros for no list.
        this_update: When it was made, Unix time.
        next_update: When there is a newer one at the latest, Unix time.
        revoked: Withdrawn certificates by serial number, 20 bytes big-endian.
        der: As it was read.
    """

    number: int
    digest: bytes
    this_update: float
    next_update: float
    revoked: Mapping[bytes, Revocation] = field(repr=False)
    der: bytes = field(repr=False)

    def __contains__(self, name: object) -> bool:
        return name in self.revoked

    @property
    def serials(self) -> frozenset[bytes]:
        """The serial numbers of all withdrawn certificates."""
        return frozenset(self.revoked)

    @classmethod
    def parse(cls, der: bytes, roots: TrustRoots, *, now: float) -> "RevocationList":
        """Read a list and see that one of `roots`, valid at `now` (Unix seconds), signed it.

        Its dates are not looked at (`check_dates`): a list that is out of date still says who is withdrawn.

        Raises:
            RevocationError: `TOO_LONG`, `MALFORMED` or `WRONG_CA`.
        """
        if len(der) > MAX_LIST_BYTES:
            raise RevocationError(
                ListProblem.TOO_LONG, f"a revocation list of {len(der)} bytes: at most {MAX_LIST_BYTES} are read"
            )
        try:
            crl = x509.load_der_x509_crl(der)
            canonical = signed_der(crl.tbs_certlist_bytes, crl.signature)
            begins, ends = crl.last_update_utc, crl.next_update_utc
            named(crl.issuer)  # names are parsed when first looked at
        except _UNREADABLE as error:
            raise _malformed(f"not an X.509 revocation list: {shortened(str(error))}") from None
        if canonical != der:
            raise _malformed("it is not signed with ECDSA and SHA-256 in the one valid encoding")
        _check_signed(crl, roots, now)
        if ends is None or not begins < ends:
            raise _malformed("it does not say when the next list is due")
        try:
            number, revoked = _number(crl), _entries(crl)
        except _UNREADABLE as error:
            raise _malformed(shortened(str(error))) from None
        return cls(number, hashlib.sha256(der).digest(), begins.timestamp(), ends.timestamp(), revoked, der)

    def check_dates(self, now: float) -> None:
        """Raise unless the list is the current one by its own dates at `now` (Unix seconds).

        Raises:
            RevocationError: `EXPIRED` or `NOT_YET`.
        """
        if now > self.next_update:
            raise RevocationError(
                ListProblem.EXPIRED,
                f"revocation list {self.number} was to be followed by another until {_moment(self.next_update)}: "
                "make a new one with `maskwork pki refresh-list`",
            )
        if now < self.this_update - CLOCKS_DIFFER_S:
            raise RevocationError(
                ListProblem.NOT_YET,
                f"revocation list {self.number} is dated {_moment(self.this_update)}, which is in the future: "
                "check the clock of this machine and of the CA's",
            )

    def check_follows(self, seen_number: int, seen_digest: bytes | None) -> None:
        """Raise if this list is older than one that was seen, or another one under the same number.

        Args:
            seen_number: The highest number seen; 0 for none.
            seen_digest: The digest of that list; None when it is not known any more.

        Raises:
            RevocationError: `OLDER` or `EQUIVOCATION`.
        """
        check_follows(self.number, self.digest, seen_number, seen_digest)


NO_LIST: Final = RevocationList(0, bytes(32), 0.0, float("inf"), MappingProxyType({}), b"")
"""What is in force before there is a list: nobody is withdrawn."""


def check_follows(number: int, digest: bytes, seen_number: int, seen_digest: bytes | None) -> None:
    """As `RevocationList.check_follows`, for a list of which only number and digest are known yet.

    Raises:
        RevocationError: `OLDER` or `EQUIVOCATION`.
    """
    if number < seen_number:
        said = f"revocation list {number}" if number else "no revocation list"
        raise RevocationError(ListProblem.OLDER, f"{said}, where list {seen_number} was seen before")
    if number == seen_number and seen_digest is not None and digest != seen_digest:
        raise RevocationError(
            ListProblem.EQUIVOCATION,
            f"revocation list {number} is {digest.hex()[:16]}…, where another list of that number was seen before, "
            f"{seen_digest.hex()[:16]}…: one of them must not exist; ask the CA's keeper",
        )


def _check_signed(crl: x509.CertificateRevocationList, roots: TrustRoots, now: float) -> None:
    for root in roots.certificates:
        key = root.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey), "TrustRoots holds no other keys"
        if crl.issuer == root.subject and crl.is_signature_valid(key):
            if not root.not_valid_before_utc.timestamp() <= now <= root.not_valid_after_utc.timestamp():
                raise RevocationError(
                    ListProblem.WRONG_CA,
                    f"the CA that signed it is not valid now (until {utc_text(root.not_valid_after_utc)}): "
                    "sign with its successor",
                )
            return
    if _names(crl, roots):
        raise _malformed("it names a CA that is trusted here, whose signature does not fit: it was changed")
    raise RevocationError(
        ListProblem.WRONG_CA,
        f"it was not signed by a CA that is trusted here, but claims to be by {named(crl.issuer)}: "
        "use the list of the federation's own CA; while a CA is replaced, give everybody both CA certificates first",
    )


def _names(crl: x509.CertificateRevocationList, roots: TrustRoots) -> bool:
    """Whether a list says that it was signed with the key of one of `roots`; anybody can write so."""
    try:
        said = crl.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
    except (*_UNREADABLE, x509.ExtensionNotFound):
        return False
    keys = (root.public_key() for root in roots.certificates)
    return said in {x509.SubjectKeyIdentifier.from_public_key(key).digest for key in keys}


def _number(crl: x509.CertificateRevocationList) -> int:
    numbers = []
    for extension in crl.extensions:
        if extension.critical:  # delta lists and lists of a part announce themselves so (sections 5.2.4 and 5.2.5)
            raise ValueError(f"critical extension {extension.oid.dotted_string} is not understood")
        if isinstance(extension.value, x509.CRLNumber):
            numbers.append(extension.value.crl_number)
    if len(numbers) != 1 or not 1 <= numbers[0] < 1 << 63:
        raise ValueError("it has no number between 1 and 2^63")
    return numbers[0]


def _entries(crl: x509.CertificateRevocationList) -> Mapping[bytes, Revocation]:
    revoked: dict[bytes, Revocation] = {}
    for entry in crl:
        serial = entry.serial_number.to_bytes(SERIAL_BYTES, "big")
        if serial in revoked:
            raise ValueError(f"serial number {serial.hex()} is on it twice")
        reason = Reason.UNSPECIFIED
        for extension in entry.extensions:
            if extension.critical:
                raise ValueError(f"critical extension {extension.oid.dotted_string} of an entry is not understood")
            if isinstance(extension.value, x509.CRLReason):
                reason = _REASONS.get(extension.value.reason, Reason.UNSPECIFIED)
        revoked[serial] = Revocation(entry.revocation_date_utc.timestamp(), reason)
    return MappingProxyType(revoked)


def _malformed(text: str) -> RevocationError:
    return RevocationError(ListProblem.MALFORMED, text)


def _moment(unix_s: float) -> str:
    return utc_text(datetime.fromtimestamp(unix_s, UTC))
