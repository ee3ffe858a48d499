"""The CA's side of revocation: makes the next list, and hands a federation over from one CA to the next.

The newest list lies beside the CA's key, ``revoked.crl``; the next one is made from it, with the number that follows,
so numbers are 1, 2, 3 whoever signs. It is NOT where lists are judged (`maskwork.net.revocation`, which reads back what
is made here) and puts nothing anywhere but into the CA's directory. Time is an argument.
"""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

from maskwork.errors import UserError
from maskwork.net.authority import CA_CERTIFICATE_FILE, CA_EXPECTED, ROOTS_FILE, Authority
from maskwork.net.identity import TrustRoots, load_certificate
from maskwork.net.register import PREDECESSOR_FILE, SUCCESSOR_FILE, Register, check_may_sign
from maskwork.net.revocation import FLAGS, LIST_FILE, NO_LIST, Reason, Revocation, RevocationError, RevocationList
from maskwork.net.whole_files import locked, write_whole

LIST_DAYS: Final = 7
"""How long a list is good unless another time is asked for; also the greatest age that sites accept by default."""
MAX_NUMBER: Final = 1 << 62
"""Highest number that is given to a list; what readers accept goes further."""
LOCK_FILE: Final = ".revoked.lock"


class RevokingError(UserError):
    """A list cannot be made or written, or a CA cannot be replaced."""


def current_list(ca: Path, roots: TrustRoots, *, now: float) -> RevocationList:
    """The newest list of the CA in a directory; `NO_LIST` when there is none yet.

    Raises:
        RevokingError: The file is not a list of this federation.
    """
    path = ca / LIST_FILE
    try:
        der = path.read_bytes()
    except FileNotFoundError:
        return NO_LIST
    except OSError as error:
        raise RevokingError(f"{path} cannot be read ({error.strerror})") from None
    try:
        return RevocationList.parse(der, roots, now=now)
    except RevocationError as error:
        raise RevokingError(
            f"{path} is not this CA's list: {error}. Restore it from a backup: the next list needs its number"
        ) from None


def next_list(
    authority: Authority,
    ca: Path,
    *,
    now: float,
    days: int = LIST_DAYS,
    withdrawn: Mapping[bytes, Reason] | None = None,
    number_above: int = 0,
) -> RevocationList:
    """Make, write and return the list that follows the newest one.

    Args:
        authority: Signs it.
        ca: Its directory.
        now: Unix time in seconds.
        days: When the one after is due.
        withdrawn: Serial numbers that are new on it, each with why.
        number_above: A number that it must exceed, should the directory have lost its own newest list.

    Raises:
        RevokingError: The list cannot be made or written.
        RegisterError: It is not this CA's turn to sign.
    """
    with _alone(ca):
        check_may_sign(ca)
        before = current_list(ca, authority.roots, now=now)
        new = {serial: Revocation(now, reason) for serial, reason in (withdrawn or {}).items()}
        number = max(before.number, number_above) + 1
        return _write(authority, ca, number, {**new, **before.revoked}, now=now, days=days)


def begin_rollover(authority: Authority, old: Path, new: Path, *, now: float, overwrite: bool = False) -> Authority:
    """Make a CA that will replace `authority`, and tell both directories that members trust both from now on.

    The old CA goes on signing until `take_over`. It gets one successor: members that it issued in the meantime trust
    that one, and nobody would tell them of another.

    Raises:
        RevokingError, AuthorityError, RegisterError: A file exists or cannot be written, or the old CA was replaced.
    """
    with _alone(old):
        check_may_sign(old)
        _refuse_second_successor(old)
        successor = Authority.create(authority.federation, now=now)
        successor.write(new, overwrite=overwrite)
        both = _pem(authority.certificate, successor.certificate)
        _put(new / PREDECESSOR_FILE, _pem(authority.certificate))
        _put(new / ROOTS_FILE, both)
        _put(old / ROOTS_FILE, both)
    return Authority.load(new)


def take_over(authority: Authority, old: Path, new: Path, *, now: float, days: int = LIST_DAYS) -> RevocationList:
    """From now on the CA in `new` signs, certificates and lists; it begins with all that is known of the CA in `old`.

    Can be repeated when it was interrupted.

    Raises:
        RevokingError: `old` is not the CA that `new` was made to replace, or a file cannot be written.
    """
    waits = new / PREDECESSOR_FILE
    if not waits.exists():
        raise RevokingError(f"the CA in {new} does not wait to take over: it has done so, or replaces none")
    if load_certificate(old / CA_CERTIFICATE_FILE, expected=CA_EXPECTED) != load_certificate(waits):
        raise RevokingError(f"the CA in {old} is not the one that the CA in {new} was made to replace")
    with _alone(old):  # a list that the old CA made meanwhile would be lost
        has = old / SUCCESSOR_FILE
        if has.is_file() and load_certificate(has) != authority.certificate:
            raise RevokingError(
                f"the CA in {old} has been replaced by another than the CA in {new}: its certificate is {has}. "
                "Use that one; two that sign at a time would have two registers and two lists of each number"
            )
        Register(new).take_in(line.certificate for line in Register(old).certificates())
        before = [current_list(directory, authority.roots, now=now) for directory in (old, new)]
        revoked = {serial: entry for known in before for serial, entry in known.revoked.items()}
        made = _write(authority, new, max(known.number for known in before) + 1, revoked, now=now, days=days)
        _put(old / SUCCESSOR_FILE, _pem(authority.certificate))  # only now: it must not sign where the other begins
    waits.unlink()
    return made


def _refuse_second_successor(ca: Path) -> None:
    both = ca / ROOTS_FILE
    if both.exists():
        raise RevokingError(
            f"{both} is there, so members trust two CAs already: nothing was made. If a successor of the CA in {ca} "
            "waits, let it take over with `maskwork pki take-over`. If that is done, or to begin anew with another "
            f"successor, remove {both}, and the directory of a successor that is given up, and give everybody who "
            "trusts that one another ca.pem"
        )


def _alone(ca: Path) -> AbstractContextManager[None]:
    """One list at a time: two that are made from the same one have the same number, and one loses its entries."""
    return locked(ca / LOCK_FILE, RevokingError)


def _write(
    authority: Authority, ca: Path, number: int, revoked: Mapping[bytes, Revocation], *, now: float, days: int
) -> RevocationList:
    if not 1 <= days <= 3650:
        raise RevokingError(f"a list cannot be good for {days} days: choose 1 to 3650")
    if number > MAX_NUMBER:
        raise RevokingError(
            f"a list cannot have the number {number}: sites take no lower one ever after, so at most {MAX_NUMBER}"
        )
    der = _signed(authority, number, revoked, now=now, days=days)
    # What is handed out has been read the way that everybody will read it.
    made = RevocationList.parse(der, authority.roots, now=now)
    _put(ca / LIST_FILE, der)
    return made


def _signed(authority: Authority, number: int, revoked: Mapping[bytes, Revocation], *, now: float, days: int) -> bytes:
    made = datetime.fromtimestamp(int(now), UTC)
    authority_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    # By the constructor: the builder's own method copies all entries for each one that is added.
    builder = x509.CertificateRevocationListBuilder(
        issuer_name=authority.certificate.subject,
        last_update=made.replace(tzinfo=None),
        next_update=(made + timedelta(days=days)).replace(tzinfo=None),
        extensions=[],
        revoked_certificates=list(_entries(revoked)),
    )
    signed = (
        builder.add_extension(x509.CRLNumber(number), critical=False)
        .add_extension(authority_id, critical=False)
        .sign(authority.key, SHA256())
    )
    return signed.public_bytes(Encoding.DER)


def _entries(revoked: Mapping[bytes, Revocation]) -> Iterable[x509.RevokedCertificate]:
    for serial, entry in sorted(revoked.items(), key=lambda item: (item[1].at, item[0])):
        builder = (
            x509.RevokedCertificateBuilder()
            .serial_number(int.from_bytes(serial, "big"))
            .revocation_date(datetime.fromtimestamp(int(entry.at), UTC))
        )
        if entry.reason is not Reason.UNSPECIFIED:  # which RFC 5280 section 5.3.1 asks to leave out
            builder = builder.add_extension(x509.CRLReason(FLAGS[entry.reason]), critical=False)
        yield builder.build()


def _pem(*certificates: x509.Certificate) -> bytes:
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)


def _put(path: Path, content: bytes) -> None:
    try:
        write_whole(path, content)
    except OSError as error:
        raise RevokingError(f"{path} cannot be written ({error.strerror})") from None
