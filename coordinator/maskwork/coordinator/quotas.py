"""How much one identity may ask for at a time: calls in progress by method, calls a second, lines in our log.

Counts alone, and the time is an argument: it reads no clock and refuses nothing by itself but by raising `Refused`. An
identity is the URI of a certificate, so that a second certificate for the same name gives no second allowance. What is
held per identity is forgotten once it is idle, and only certificates of the federation's CA ever get as far as here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from maskwork.net.status import Refusal, Refused

AT_A_TIME: Final[Mapping[str, int]] = MappingProxyType(
    {
        # A site has one control stream; the others are those that its reconnecting left behind.
        "/maskwork.wire.v1.FederationService/Connect": 4,
        "/maskwork.wire.v1.FederationService/Upload": 3,
        "/maskwork.wire.v1.FederationService/Download": 3,
        "/maskwork.wire.v1.RenewalService/Renew": 1,
        "/maskwork.wire.v1.JobService/SubmitJob": 2,
        "/maskwork.wire.v1.JobService/ExportModel": 4,
        "/maskwork.wire.v1.JobService/WatchJob": 16,
        "/maskwork.wire.v1.AuditService/ReadAudit": 2,
    }
)
"""Most calls of a method that one identity may have in progress."""
AT_A_TIME_OF_OTHERS: Final = 8
CALLS_BURST: Final = 400
CALLS_PER_S: Final = 50.0
LINES_BURST: Final = 50
LINES_PER_S: Final = 2.0


@dataclass(slots=True)
class Bucket:
    """A token bucket: `burst` at once, and `per_s` more each second."""

    burst: float
    per_s: float
    _left: float = field(init=False)
    _at: float | None = None

    def __post_init__(self) -> None:
        self._left = self.burst

    def take(self, now: float) -> bool:
        """Whether there was one left to take."""
        self._refill(now)
        if self._left < 1:
            return False
        self._left -= 1
        return True

    def full(self, now: float) -> bool:
        """Whether it is as if nobody had ever taken anything."""
        self._refill(now)
        return self._left >= self.burst

    def _refill(self, now: float) -> None:
        passed = 0.0 if self._at is None else max(0.0, now - self._at)
        self._at = now
        self._left = min(self.burst, self._left + passed * self.per_s)


@dataclass(slots=True)
class _Account:
    calls: Counter[str] = field(default_factory=Counter)
    rate: Bucket = field(default_factory=lambda: Bucket(CALLS_BURST, CALLS_PER_S))
    lines: Bucket = field(default_factory=lambda: Bucket(LINES_BURST, LINES_PER_S))
    unlogged: int = 0

    def idle(self, now: float) -> bool:
        return not self.calls.total() and not self.unlogged and self.rate.full(now) and self.lines.full(now)


class Quotas:
    """What every identity has in progress."""

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}

    def enter(self, identity: str, method: str, *, now: float) -> None:
        """Count a call that begins; `leave` must follow.

        Raises:
            Refused: the identity has too many of these calls in progress, or begins too many; nothing was counted.
        """
        account = self._account(identity)
        if not account.rate.take(now):
            raise Refused(Refusal.TOO_MUCH, "too many calls of this certificate in a short time")
        most = AT_A_TIME.get(method, AT_A_TIME_OF_OTHERS)
        if account.calls[method] >= most:
            raise Refused(Refusal.TOO_MUCH, f"this certificate has {most} of these calls in progress")
        account.calls[method] += 1

    def leave(self, identity: str, method: str, *, now: float) -> None:
        """A counted call has ended."""
        account = self._account(identity)
        account.calls[method] -= 1
        account.calls += Counter()  # forget zeros
        if account.idle(now):
            del self._accounts[identity]

    def may_log(self, identity: str, *, now: float) -> int | None:
        """How many lines about an identity were left out before the one that may be written now; None: not now."""
        account = self._account(identity)
        if not account.lines.take(now):
            account.unlogged += 1
            return None
        left_out, account.unlogged = account.unlogged, 0
        return left_out

    def _account(self, identity: str) -> _Account:
        return self._accounts.setdefault(identity, _Account())
