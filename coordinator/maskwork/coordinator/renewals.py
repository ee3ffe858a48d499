"""Certificates that are renewed while a session is open: they wait here until it has ended.

A session goes on with the certificates of its roster and with the one that signed its plan. So a participant's
connection with a new certificate stands beside the older one, and the coordinator's own new key signs nothing, until
no session is open; then both count at once, before the next attempt. The driver asks; nothing here waits, sends or
closes by itself but by `take_up`.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import replace
from functools import partial

import structlog

from maskwork.coordinator.happenings import OwnCertificateRenewed
from maskwork.coordinator.job_runner import Federation
from maskwork.coordinator.peers import Peer
from maskwork.wire import codec

log = structlog.get_logger("maskwork.coordinator")

VERSION = 1


class Renewals:
    """What counts from the next session on."""

    def __init__(self) -> None:
        self._own: OwnCertificateRenewed | None = None
        self._peers: dict[str, Peer] = {}

    def own(self, renewed: OwnCertificateRenewed) -> None:
        """The coordinator has a new certificate."""
        self._own = renewed

    def waits(self, peer: Peer, older: Peer | None) -> bool:
        """Whether a new connection stands beside an older one that is in the open session; if so, it is kept here."""
        if older is None or not peer.succeeds_another or peer.site.fingerprint == older.site.fingerprint:
            return False
        log.info("a participant has a new certificate, which counts after this session", participant=peer.name)
        before = self._peers.get(peer.name)
        if before is not None:
            before.close()
        self._peers[peer.name] = peer
        return True

    def gone(self, peer: Peer) -> None:
        """A connection ended; it may be one that waits."""
        if self._peers.get(peer.name) is peer:
            del self._peers[peer.name]

    def close(self) -> None:
        """End every connection that waits."""
        for peer in self._peers.values():
            peer.close()

    def take_up(self, federation: Federation, peers: MutableMapping[str, Peer]) -> tuple[Federation, tuple[str, ...]]:
        """No session is open: put what waits in the place of what it succeeds.

        Returns:
            Who the coordinator is from now on, and the participants whose connection is another now.
        """
        succeeded = tuple(self._peers)
        for name, peer in self._peers.items():
            if (older := peers.get(name)) is not None:
                older.close()
            peers[name] = peer
            log.info(
                "a participant's new certificate counts", participant=name, fingerprint=peer.site.fingerprint.hex()
            )
        self._peers.clear()
        if self._own is not None:
            federation = replace(federation, certificate=self._own.certificate, signer=self._own.signer)
            self._own = None
            log.info("the coordinator's new certificate counts")
            for peer in peers.values():
                self.welcome(peer, federation)
        return federation, succeeded

    def welcome(self, peer: Peer, federation: Federation) -> None:
        """Tell a participant of the certificate that signs plans, unless its connection was told."""
        if peer.welcomed_by and peer.welcomed_by != federation.certificate:
            peer.welcomed_by = federation.certificate
            peer.send(partial(codec.encode_response, b"", codec.Welcome(VERSION, federation.certificate), 0))
