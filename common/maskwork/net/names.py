"""What the members of a federation are called, and how a refusal of one is worded.

An `Identity` is a SPIFFE-style name ``spiffe://<federation>/<role>/<name>`` (DESIGN section 7); one that exists
is well-formed. It is NOT evidence of anything: only `maskwork.net.identity.TrustRoots.verify` turns a
certificate into a name that may be relied upon.

Rule: a name has one spelling. What `Identity.uri` would not have written, `Identity.parse` refuses.

Source: SPIFFE-ID section 2 (trust domain and path; ours is the stricter subset).
"""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Final

from cryptography import x509

from maskwork.errors import UserError

MAX_LABEL_LENGTH: Final = 63
"""Longest federation or name, in characters."""
_LABEL: Final = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?", re.ASCII)
_LABEL_RULE: Final = (
    f"1 to {MAX_LABEL_LENGTH} characters out of a-z, 0-9, '-', '.' and '_', beginning and ending with a letter or digit"
)
_SCHEME: Final = "spiffe://"


class Role(StrEnum):
    """What a certificate's holder is; `maskwork.net.permissions` says what each may call."""

    COORDINATOR = "coordinator"
    PARTICIPANT = "participant"
    OPERATOR = "operator"
    RESEARCHER = "researcher"
    AUDITOR = "auditor"


class IdentityProblem(StrEnum):
    """Why a name, a certificate or a set of identity files was refused."""

    MALFORMED = "malformed"
    WRONG_CA = "wrong_ca"
    EXPIRED = "expired"
    NOT_YET_VALID = "not_yet_valid"
    WEAK_KEY = "weak_key"
    WRONG_USAGE = "wrong_usage"
    WRONG_ROLE = "wrong_role"
    WRONG_FEDERATION = "wrong_federation"
    REVOKED = "revoked"
    WRONG_KEY = "wrong_key"
    UNREADABLE = "unreadable"
    TLS_TOO_OLD = "tls_too_old"


class IdentityError(UserError, ValueError):
    """A name, certificate or identity file that is refused.

    A `ValueError` too: that is what the protocol core, which knows no certificates, expects of a verifier.

    Attributes:
        problem: The kind of fault, for code.
        text: What is wrong, with which file or subject, and what to do; for people.
    """

    def __init__(self, problem: IdentityProblem, text: str) -> None:
        super().__init__(text)
        self.problem = problem
        self.text = text


@dataclass(frozen=True, slots=True)
class Identity:
    """A named member of a federation.

    Attributes:
        federation: The federation's name, the SPIFFE trust domain.
        role: What the member is.
        name: The member's name, unique per role in the federation.

    Raises:
        IdentityError: `MALFORMED` when the federation or the name has other characters or lengths than allowed.
    """

    federation: str
    role: Role
    name: str

    def __post_init__(self) -> None:
        for what, value in (("federation", self.federation), ("name", self.name)):
            if not _LABEL.fullmatch(value):
                raise malformed(f"the {what} {shortened(value)} is not allowed: use {_LABEL_RULE}")

    @property
    def uri(self) -> str:
        """The identity as it stands in a certificate: ``spiffe://<federation>/<role>/<name>``."""
        return f"{_SCHEME}{self.federation}/{self.role}/{self.name}"

    @classmethod
    def parse(cls, uri: str) -> "Identity":
        """Read ``spiffe://<federation>/<role>/<name>``.

        Raises:
            IdentityError: `MALFORMED` for anything that `uri` would not have written.
        """
        parts = uri.removeprefix(_SCHEME).split("/")
        if not uri.startswith(_SCHEME) or len(parts) != 3:
            raise malformed(f"{shortened(uri)} is not an identity: expected spiffe://<federation>/<role>/<name>")
        federation, role, name = parts
        try:
            known_role = Role(role)
        except ValueError:
            raise malformed(f"{shortened(uri)} has no role of ours: expected one of {', '.join(Role)}") from None
        return cls(federation, known_role, name)


def named(name: x509.Name) -> str:
    """An X.509 name for error texts, shortened: it may be a stranger's."""
    return shortened(name.rfc4514_string())


def shortened(text: str) -> str:
    """A text that may be a stranger's, quoted, escaped and of bounded length."""
    return ascii(text if len(text) <= 100 else text[:99] + "…")


def utc_text(when: datetime) -> str:
    """A moment for people: ``2026-11-21 08:07 UTC``."""
    return when.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")


def malformed(text: str) -> IdentityError:
    """A refusal of something that is not what it should be, in whatever way."""
    return IdentityError(IdentityProblem.MALFORMED, text)
