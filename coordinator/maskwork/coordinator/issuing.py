"""What a coordinator that holds the CA's key signs: a first certificate by a token, a later one by the one before.

It knows no gRPC (`enrolment` does) and no clock of its own. The CA is read anew for each signature: a key that is not
held between two of them is not in a memory dump, and a CA that was replaced is noticed.

Order, each step on the disk before the next: the token is used up, the certificate is on the register, the certificate
is kept with the token, and only then it goes out. A crash anywhere in between leaves nothing that a repetition with the
same key does not mend, and never a certificate that is not on the register.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from maskwork.net.authority import Authority
from maskwork.net.identity import TrustRoots, VerifiedCertificate
from maskwork.net.register import Register, check_may_sign
from maskwork.net.requests import CertificateRequest, RequestError, read_request, sign_request
from maskwork.net.tokens import Token, TokenBook

NOT_THE_CA = "is not the CA that this coordinator trusts"


class Issuer:
    """Signs with the CA in one directory."""

    def __init__(self, ca: Path, federation: str, *, days: int, clock: Callable[[], float]) -> None:
        self._ca = ca
        self._federation = federation
        self._days = days
        self._clock = clock
        self._tokens = TokenBook(ca)

    def check(self, roots: TrustRoots) -> None:
        """Raise unless the CA can sign for a federation whose members trust `roots`.

        Raises:
            UserError: The directory holds no CA, or another one; or a CA that has been replaced.
        """
        authority = Authority.load(self._ca)
        check_may_sign(self._ca)
        if authority.certificate not in roots.certificates:
            raise RequestError(f"the CA in {self._ca} {NOT_THE_CA}: give the directory of the federation's own as "
                               "enrolment_ca")  # fmt: skip

    def enrol(self, token: Token, request_pem: bytes) -> tuple[CertificateRequest, bytes]:
        """The certificate, PEM, for the holder of a token and of the request's key.

        Raises:
            TokenRefused: The token does not authorise the request.
            UserError: The request is malformed, or the CA or the disk does not do its part.
        """
        request = read_request(request_pem, federation=self._federation)
        record = self._tokens.claim(token, request, now=self._clock())
        if record.certificate:
            return request, record.certificate.encode()
        certificate = self._sign(request)
        self._tokens.fulfil(token, record, certificate)
        return request, certificate.public_bytes(Encoding.PEM)

    def renew(self, caller: VerifiedCertificate, request_pem: bytes) -> bytes:
        """Another certificate, PEM, for the caller's identity and a new key.

        Raises:
            UserError: The request is malformed, for another identity or for the key that is to be replaced; or the CA
                or the disk does not do its part.
        """
        request = read_request(request_pem, federation=self._federation)
        if request.identity != caller.identity:
            raise RequestError(f"{caller.identity.uri} may not ask for a certificate of {request.identity.uri}")
        if request.public_key == caller.public_key:
            raise RequestError("a renewed certificate is for a new key, and this request is for the one in use")
        return self._sign(request).public_bytes(Encoding.PEM)

    def _sign(self, request: CertificateRequest) -> x509.Certificate:
        certificate = sign_request(Authority.load(self._ca), request, now=self._clock(), days=self._days)
        Register(self._ca).record(certificate)
        return certificate
