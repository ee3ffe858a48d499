"""An identity directory from the member's side: a key is made in it, and later a certificate for it is put beside it.

While a request is under way the directory holds ``request-key.pem`` and ``request.pem``; they become ``key.pem`` and
``cert.pem`` when `install` has checked the certificate against the key and against CAs that the member has the
fingerprints of, or already trusts. So a service that uses the directory goes on with the old pair until then.

It is NOT where a certificate is issued, and it asks nobody: `maskwork.enrolment_client` does.

Rules it upholds: a key is written with mode 0600 and never leaves; nothing that exists is replaced unless the caller
says so; a certificate from somewhere never brings a CA along that the member does not know by its fingerprint.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from maskwork.errors import UserError
from maskwork.net import authority
from maskwork.net.diagnosis import load_private_key
from maskwork.net.identity import (
    FINGERPRINT_BYTES,
    UNREADABLE_CERTIFICATE,
    Identity,
    IdentityFiles,
    TrustRoots,
    VerifiedCertificate,
    fingerprint,
    to_der,
)
from maskwork.net.names import shortened
from maskwork.net.whole_files import write_whole

REQUEST_KEY_FILE: Final = "request-key.pem"
REQUEST_FILE: Final = "request.pem"
_HEX: Final = re.compile(r"[0-9a-f]{64}")


class InstallError(UserError):
    """A certificate that does not belong here, or a file that must not or cannot be written."""


def parse_fingerprint(text: str) -> bytes:
    """A CA's fingerprint as people write it: ``sha256:`` and 64 hex digits, with or without colons between.

    Raises:
        UserError: It is none.
    """
    digits = text.strip().lower().removeprefix("sha256:").replace(":", "")
    if not _HEX.fullmatch(digits):
        raise UserError(
            f"{shortened(text)} is not a fingerprint: expected sha256: and {2 * FINGERPRINT_BYTES} hex digits, "
            "as `maskwork pki show` prints them for ca.pem"
        )
    return bytes.fromhex(digits)


def fingerprint_text(digest: bytes) -> str:
    """A fingerprint as people read it out and paste it: ``sha256:…``."""
    return f"sha256:{digest.hex()}"


def known_roots(certificates: Sequence[x509.Certificate], known: Collection[bytes], *, source: str) -> TrustRoots:
    """Those of `certificates` whose fingerprint somebody was told by other means; the rest is nobody's.

    Raises:
        InstallError: None of them is.
        IdentityError: One cannot be a federation's CA.
    """
    found = {fingerprint(to_der(certificate)): certificate for certificate in certificates}
    trusted = [certificate for digest, certificate in found.items() if digest in known]
    if not trusted:
        raise InstallError(
            f"{source} shows no CA with the fingerprint {', '.join(map(fingerprint_text, sorted(known)))}: "
            "compare it with what the CA's keeper says; if it is right, somebody is between you and the federation"
        )
    return TrustRoots(trusted, source=source)


@dataclass(frozen=True, slots=True)
class RequestFiles:
    """Where a request under way lies in an identity directory."""

    key: Path
    request: Path

    @classmethod
    def in_directory(cls, directory: Path) -> "RequestFiles":
        """``request-key.pem`` and ``request.pem``."""
        return cls(directory / REQUEST_KEY_FILE, directory / REQUEST_FILE)

    def own_key(self) -> ec.EllipticCurvePrivateKey:
        """The key of the request under way, or a new one: an answer that got lost can be asked for again.

        Raises:
            InstallError: It cannot be written.
            IdentityError: It cannot be read.
        """
        if self.key.exists():
            return load_private_key(self.key)
        return self.new_key()

    def new_key(self) -> ec.EllipticCurvePrivateKey:
        """A new key, on the disk before anybody hears of it.

        Raises:
            InstallError: It cannot be written.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        _write({self.key: pem})
        return key

    def write(self, pem: bytes) -> None:
        """Keep the request beside its key.

        Raises:
            InstallError: It cannot be written.
        """
        _write({self.request: pem})

    def discard(self) -> None:
        """The request is over; its key is ``key.pem`` by now, or of no use."""
        for path in (self.request, self.key):
            path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class NewIdentity:
    """A certificate that was checked against its key and its CA: what `install` writes."""

    certificate: VerifiedCertificate
    roots: TrustRoots = field(repr=False)
    key_pem: bytes = field(repr=False)

    def write(self, directory: Path, *, overwrite: bool) -> IdentityFiles:
        """Write ``key.pem``, ``cert.pem`` and ``ca.pem``, then drop the request.

        A power cut between two of them leaves the request: the same command puts everything right, since a file that
        holds already what is to be written is not in the way.

        Raises:
            AuthorityError: One exists with something else in it and `overwrite` is not set.
            InstallError: One cannot be written.
        """
        files = IdentityFiles.in_directory(directory)
        cert = x509.load_der_x509_certificate(self.certificate.der).public_bytes(Encoding.PEM)
        ca = b"".join(root.public_bytes(Encoding.PEM) for root in self.roots.certificates)
        contents = {files.ca: ca, files.key: self.key_pem, files.cert: cert}
        others = [path for path, content in contents.items() if not _holds(path, content)]
        authority.refuse_existing_files(others, overwrite=overwrite)
        _write(contents)
        RequestFiles.in_directory(directory).discard()
        return files


def refuse_existing(directory: Path, *, overwrite: bool) -> None:
    """Raise if an identity is there already and may not be replaced; the beginning of the one asked for may.

    Raises:
        AuthorityError: It is.
    """
    files, request = IdentityFiles.in_directory(directory), RequestFiles.in_directory(directory)
    if not _was_interrupted(files, request):
        authority.refuse_existing(files, overwrite=overwrite)


def _was_interrupted(files: IdentityFiles, request: RequestFiles) -> bool:
    """Whether what is there can be the beginning of an installation: `NewIdentity.write` looks at it once more."""
    if not files.key.exists():  # which comes before the certificate
        return request.key.exists() and not files.cert.exists()
    return request.key.exists() and _holds(files.key, request.key.read_bytes())


def _holds(path: Path, content: bytes) -> bool:
    return path.is_file() and not path.is_symlink() and path.read_bytes() == content


def check_new(
    pem: bytes,
    directory: Path,
    *,
    now: float,
    known: Collection[bytes],
    asked: Identity | None = None,
    source: str,
) -> NewIdentity:
    """Check a certificate that came back for the request in `directory`.

    Args:
        pem: The certificate, and beside it the CA's; only a CA that is known by fingerprint is believed.
        directory: Holds ``request-key.pem``.
        now: Unix time in seconds.
        known: Fingerprints of CAs that were heard of by other means; empty: the ``ca.pem`` of `directory` is believed.
        asked: Whom the certificate has to name, if that is known.
        source: Where `pem` came from, for error texts.

    Raises:
        InstallError: Nothing was asked for; or it is no certificate, or not for the key or the name asked for.
        IdentityError: It is not a good certificate of those CAs.
    """
    own = RequestFiles.in_directory(directory)
    if not own.key.exists():
        raise InstallError(
            f"{own.key} does not exist, so no certificate was asked for from {directory}: begin there with "
            "`maskwork pki request`, and have that request signed"
        )
    certificates = certificates_in(pem, source)
    roots = _roots(certificates[1:], directory, known, source)
    verified = roots.verify(to_der(certificates[0]), now=now)
    key = load_private_key(own.key)
    if key.public_key() != verified.public_key:
        raise InstallError(
            f"{source} is for another key than {directory / REQUEST_KEY_FILE}: it answers another request; "
            "ask for the one that answers this"
        )
    if asked is not None and verified.identity != asked:
        raise InstallError(f"{source} names {verified.identity.uri}, and {asked.uri} was asked for")
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return NewIdentity(verified, roots, pem)


def certificates_in(pem: bytes, source: str) -> list[x509.Certificate]:
    """The certificates of a PEM text.

    Raises:
        InstallError: It holds none.
    """
    try:
        return x509.load_pem_x509_certificates(pem)
    except UNREADABLE_CERTIFICATE:
        raise InstallError(f"{source} is not a PEM certificate: expected what `maskwork pki sign` wrote") from None


def _roots(beside: Sequence[x509.Certificate], directory: Path, known: Collection[bytes], source: str) -> TrustRoots:
    ca = IdentityFiles.in_directory(directory).ca
    if not known:
        if not ca.exists():
            raise InstallError(
                f"{ca} does not exist, so say which CA is to be trusted with --ca-fingerprint: ask its keeper, "
                "by another way than the one on which the certificate came"
            )
        return TrustRoots.from_file(ca)
    here = TrustRoots.from_file(ca).certificates if ca.exists() else ()
    return known_roots([*beside, *here], known, source=source)


def _write(contents: dict[Path, bytes]) -> None:
    for path, content in contents.items():
        try:
            write_whole(path, content, private=b"PRIVATE KEY" in content)
        except OSError as error:
            raise InstallError(f"{path} cannot be written ({error.strerror})") from None
