"""Enrolment tokens: each lets one member, of one role and name, have one key certified, once, until it expires.

A token is text that the operator hands to a member, ``ROLE:NAME:ID:SECRET``. What is kept of it, in
``tokens/<ID>.json`` beside the CA's key, is a hash of the secret (256 bits from the operating system, so a plain hash
is enough), what the token is for, and what became of it. Role and name in the text tell the member what to ask for;
what binds is the record.

It is NOT a service and limits no rate (`maskwork.coordinator.enrolment` does), and it signs nothing.

Rules it upholds:

1. A token is used up on the disk, by one key, before anything is signed for it. The same key may ask again until the
   token expires, and gets the certificate that it got: an answer may be lost. Another key gets nothing any more.
2. All refusals are one error with one text for whoever asks; the reason, which names no part of the token, is for our
   log.
3. The secret is in no error and no representation, and is compared in constant time, also when there is no such token.
"""

import hashlib
import json
import re
import secrets
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from hmac import compare_digest
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from maskwork.errors import UserError
from maskwork.net.identity import Identity, IdentityError, Role
from maskwork.net.names import malformed
from maskwork.net.requests import CertificateRequest
from maskwork.net.whole_files import locked, write_whole

TOKENS_DIRECTORY: Final = "tokens"
MAX_TOKEN: Final = 512
SECRET_BYTES: Final = 32
_ID: Final = re.compile(r"[0-9a-f]{16}", re.ASCII)
_SECRET: Final = re.compile(r"[A-Za-z0-9_-]{43}", re.ASCII)
_LABEL: Final = b"maskwork/v1/enrolment-token\x00"
_FORM: Final = "expected ROLE:NAME:ID:SECRET, all of what `maskwork pki token` printed"


class TokenError(UserError):
    """A token that cannot be made, read or kept."""


class NotAToken(TokenError):
    """Text that is no token; it is not repeated."""


class TokenRefused(Exception):
    """A token does not authorise this request; the text is for our log alone and names no part of the token."""


@dataclass(frozen=True, slots=True)
class Token:
    """A token as its holder has it.

    Attributes:
        role: What the holder is to ask for.
        name: Likewise.
        id: Finds the record; no secret.
        secret: The rest.
    """

    role: Role
    name: str
    id: str
    secret: str = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> "Token":
        """Read a token.

        Raises:
            NotAToken: It is none.
        """
        parts = text.strip().split(":") if len(text) <= MAX_TOKEN else []
        if len(parts) != 4 or not _ID.fullmatch(parts[2]) or not _SECRET.fullmatch(parts[3]):
            raise NotAToken(f"that is not an enrolment token: {_FORM}")
        try:
            identity = Identity("any", Role(parts[0]), parts[1])
        except (ValueError, IdentityError):
            raise NotAToken(f"that is not an enrolment token: {_FORM}") from None
        return cls(identity.role, identity.name, parts[2], parts[3])

    @property
    def text(self) -> str:
        """What the holder is given."""
        return f"{self.role}:{self.name}:{self.id}:{self.secret}"


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """What is kept of a token.

    Attributes:
        identity: Whom it is for.
        hash: Of the secret.
        expires: Last second at which it is good, Unix time.
        used_by: Fingerprint of the key that it was used for, hex; empty: not used.
        certificate: What was signed for that key, PEM; empty until it was.
    """

    identity: Identity
    hash: str
    expires: float
    used_by: str = ""
    certificate: str = ""

    def to_json(self) -> bytes:
        """As it lies in its file."""
        kept = {"identity": self.identity.uri, "hash": self.hash, "expires": self.expires}
        return json.dumps({**kept, "used_by": self.used_by, "certificate": self.certificate}, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "TokenRecord":
        """Read what `to_json` wrote.

        Raises:
            ValueError: Anything else.
        """
        kept = json.loads(data)
        texts = [kept[key] for key in ("identity", "hash", "used_by", "certificate")]
        if not all(isinstance(text, str) for text in texts) or not isinstance(kept["expires"], float):
            raise malformed("a token's record of other types")
        return cls(Identity.parse(texts[0]), texts[1], kept["expires"], texts[2], texts[3])


class TokenBook:
    """The tokens of one CA directory."""

    def __init__(self, ca: Path) -> None:
        self._directory = ca / TOKENS_DIRECTORY

    def make(self, identity: Identity, *, expires: float) -> Token:
        """Make a token.

        Raises:
            TokenError: It is for a coordinator, or cannot be kept.
        """
        if identity.role is Role.COORDINATOR:
            raise TokenError(
                "a coordinator does not enrol by a token: its certificate carries host names, which somebody has to "
                "look at; use `maskwork pki request`, `sign` and `install`"
            )
        secret = secrets.token_urlsafe(SECRET_BYTES)
        token = Token(identity.role, identity.name, secrets.token_hex(8), secret)
        self._keep(token.id, TokenRecord(identity, _hash(secret), float(expires)))
        return token

    def claim(self, token: Token, request: CertificateRequest, *, now: float) -> TokenRecord:
        """Use a token up for the key of `request`, or find that this key has done so already.

        Args:
            token: As it came over the wire.
            request: What it came with.
            now: Unix time in seconds.

        Returns:
            The record; its certificate is there if one was signed before.

        Raises:
            TokenRefused: It does not authorise this request.
            TokenError: The record cannot be read or written.
        """
        with self._locked():
            record = self._find(token.id)
            _check(record, token, request, now=now)
            assert record is not None
            if record.used_by:
                return record
            used = replace(record, used_by=request.key_fingerprint.hex())
            self._keep(token.id, used)
            return used

    def fulfil(self, token: Token, record: TokenRecord, certificate: x509.Certificate) -> None:
        """Keep the certificate that was signed for a claimed token, before it goes out.

        Raises:
            TokenError: The record cannot be written.
        """
        with self._locked():
            pem = certificate.public_bytes(Encoding.PEM).decode()
            self._keep(token.id, replace(record, certificate=pem))

    def _find(self, token_id: str) -> TokenRecord | None:
        path = self._directory / f"{token_id}.json"
        try:
            return TokenRecord.from_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise TokenError(f"{path} cannot be read ({error.strerror})") from None
        except (ValueError, KeyError, TypeError):
            raise TokenError(f"{path} is damaged: delete it, and make the member another token") from None

    def _keep(self, token_id: str, record: TokenRecord) -> None:
        path = self._directory / f"{token_id}.json"
        try:
            write_whole(path, record.to_json(), private=True)
        except OSError as error:
            raise TokenError(f"{path} cannot be written ({error.strerror})") from None

    def _locked(self) -> AbstractContextManager[None]:
        """One claim at a time, whichever process it comes from: a token must not be used up twice."""
        return locked(self._directory / ".lock", TokenError)


def _check(record: TokenRecord | None, token: Token, request: CertificateRequest, *, now: float) -> None:
    # The comparison comes first and always, so that the time says nothing about which tokens there are.
    is_right = compare_digest(_hash(token.secret), _hash("") if record is None else record.hash)
    if record is None or not is_right:
        raise TokenRefused("there is no such token")
    if not now <= record.expires:
        raise TokenRefused("the token has expired")
    if request.identity != record.identity:
        raise TokenRefused(f"the token is for {record.identity.uri}")
    if record.used_by and not compare_digest(record.used_by, request.key_fingerprint.hex()):
        raise TokenRefused("the token was used for another key")


def _hash(secret: str) -> str:
    return hashlib.sha256(_LABEL + secret.encode()).hexdigest()
