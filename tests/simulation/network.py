"""The network between a simulated coordinator and its sites: control streams and transfers, one step at a time.

It stands where gRPC does, and says and hears what `maskwork.coordinator.service` and `maskwork.participant.client` do:
Hello and Welcome, messages as bytes, what each side notices of a stream that broke, uploads in pieces. A message that
was not delivered yet can be lost, doubled or overtaken, which a real stream never does to a message inside it; what the
protocol must withstand is more than what TCP does.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeAlias

from tests.simulation.identities import Member
from tests.simulation.invariants import Watch
from tests.simulation.operations import Channel
from tests.simulation.processes import TASK, CoordinatorProcess, Fuse

from maskwork.coordinator.happenings import PeerConnected, PeerGone, PeerMisbehaved, PeerSaid, UploadBegan, UploadEnded
from maskwork.coordinator.peers import Outgoing, Peer
from maskwork.coordinator.spool import SpoolWriter, UploadRefused
from maskwork.participant.client import TransferError
from maskwork.secagg.keys import Segment
from maskwork.wire import codec
from maskwork.wire.codec import Hello, WireError
from maskwork.wire.v1 import federation_pb2


@dataclass(frozen=True, slots=True)
class Greeting:
    """Hello on its way up, Welcome on its way down."""

    active_session: bytes = b""
    audit_size: int = 0


@dataclass(frozen=True, slots=True)
class Gone:
    """What an end notices when the stream is over."""


Item: TypeAlias = bytes | Greeting | Gone


class FusedPeer(Peer):
    """A peer to which every send is an effect."""

    fuse: Fuse

    def send(self, response: Outgoing) -> None:
        """As production sends."""
        self.fuse.tick()
        super().send(response)


@dataclass(eq=False)
class Connection:
    """One control stream of a site.

    Attributes:
        channels: what is on its way, in order.
        held: until when a channel is held back, on the loop's clock.
        broken: nothing new enters it.
        peer: the coordinator's end, once Hello has arrived.
    """

    site: str
    channels: dict[Channel, deque[Item]] = field(default_factory=lambda: {c: deque() for c in Channel})
    held: dict[Channel, float] = field(default_factory=dict)
    broken: bool = False
    peer: FusedPeer | None = None
    coordinator: CoordinatorProcess | None = None
    pump: asyncio.Task[None] | None = None

    @property
    def over(self) -> bool:
        """Whether nothing can come of it any more."""
        return self.broken and not any(self.channels.values())

    def cut(self) -> None:
        """Lose what is under way; each end that knew the stream will notice."""
        if self.broken:
            return
        self.broken = True
        for channel in self.channels.values():
            channel.clear()
        self.channels[Channel.DOWN].append(Gone())
        if self.peer is not None:
            self.channels[Channel.UP].append(Gone())

    def site_is_gone(self) -> None:
        """The site's process ended: what it had sent still arrives, then the end."""
        self.broken = True
        self.channels[Channel.DOWN].clear()
        if self.peer is not None:
            self.channels[Channel.UP].append(Gone())
        else:
            self.channels[Channel.UP].clear()

    def coordinator_is_gone(self) -> None:
        """The coordinator's process ended."""
        if self.pump is not None:
            self.pump.cancel()
        self.broken = True
        self.channels[Channel.UP].clear()
        if not self.channels[Channel.DOWN] or not isinstance(self.channels[Channel.DOWN][-1], Gone):
            self.channels[Channel.DOWN].append(Gone())

    # --- the coordinator's end -----------------------------------------------------------------------------------

    def arrive(self, item: Item, member: Member, coordinator: CoordinatorProcess) -> None:
        """Something from the site reaches the coordinator."""
        match item:
            case Greeting(active, audit_size):
                self.peer = FusedPeer(member.present(frozenset({TASK})), member.certificate, active, audit_size)
                self.peer.fuse, self.coordinator = coordinator.fuse, coordinator
                self.channels[Channel.DOWN].append(Greeting())
                self.pump = asyncio.get_running_loop().create_task(self._pump(coordinator, self.peer))
            case Gone():
                if self.pump is not None:
                    self.pump.cancel()
            case bytes():
                self._hear(item, coordinator)

    async def _pump(self, coordinator: CoordinatorProcess, peer: FusedPeer) -> None:
        await coordinator.driver.post(PeerConnected(peer))
        try:
            while (response := await peer.next_response()) is not None:
                if not self.broken:
                    self.channels[Channel.DOWN].append(response.SerializeToString())
            if not self.broken:  # the coordinator ended the stream
                self.channels[Channel.DOWN].append(Gone())
                self.channels[Channel.UP].clear()
                self.broken = True
        finally:
            if not coordinator.fuse.burnt:
                coordinator.driver.post_soon(PeerGone(peer))

    def _hear(self, data: bytes, coordinator: CoordinatorProcess) -> None:
        if self.peer is None:
            return
        request = federation_pb2.ConnectRequest.FromString(data)
        try:
            message = codec.decode_request(request)
            if isinstance(message, Hello):
                raise WireError("a second Hello")
        except WireError as error:
            coordinator.driver.post_soon(PeerMisbehaved(self.peer, str(error)))
            self.peer.close()
        else:
            coordinator.driver.post_soon(PeerSaid(self.peer, request.session_id, message))


@dataclass(eq=False)
class Download:
    """A site fetches something by its digest."""

    digest: bytes
    path: Path
    done: asyncio.Future[bytes]

    def move(self, member: Member, coordinator: CoordinatorProcess, _pieces: int) -> None:
        """It arrives whole, or is refused."""
        source = coordinator.driver.download(member.present(frozenset()), self.digest)
        if source is None:
            self.fail()
            return
        self.path.write_bytes(source if isinstance(source, bytes) else source.read_bytes())
        self.done.set_result(self.digest)

    def fail(self) -> None:
        """It breaks, or is refused."""
        if not self.done.done():
            self.done.set_exception(TransferError("a download broke"))

    def abandon(self) -> None:
        """Nobody waits for it any more."""
        self.done.cancel()


@dataclass(eq=False)
class Upload:
    """A site streams both segments, from where it was told to."""

    session: bytes
    update: bytes
    statistics: bytes
    at: list[int]
    done: asyncio.Future[int]
    watch: Watch
    writer: SpoolWriter | None = None
    coordinator: CoordinatorProcess | None = None
    member: int = -1
    stack: ExitStack = field(default_factory=ExitStack)

    def move(self, member: Member, coordinator: CoordinatorProcess, pieces: int) -> None:
        """The next chunk arrives; `pieces` says in how many the rest is cut."""
        if self.writer is None and not self._begin(member, coordinator):
            self.fail()
            return
        assert self.writer is not None
        segment, source = (Segment.UPDATE, self.update) if self.at[0] < len(self.update) else self._statistics
        index = 0 if segment is Segment.UPDATE else 1
        rest = source[self.at[index] :]
        chunk = rest[: -(-len(rest) // max(1, pieces))]
        if not chunk:
            self._end()
            return
        base = 0 if index == 0 else len(self.update)
        self.watch.uploaded(self.session, member.name, base + self.at[index], chunk)
        try:
            self.writer.write(segment, self.at[index], chunk)
        except UploadRefused:
            self.fail()
            return
        self.at[index] += len(chunk)
        if self.at == [len(self.update), len(self.statistics)]:
            self._end()

    @property
    def _statistics(self) -> tuple[Segment, bytes]:
        return Segment.STATISTICS, self.statistics

    def _begin(self, member: Member, coordinator: CoordinatorProcess) -> bool:
        place = coordinator.driver.spool_for(member.present(frozenset()), self.session)
        if place is None:
            return False
        spool, self.member = place
        self.writer = self.stack.enter_context(spool.writing())
        self.coordinator = coordinator
        coordinator.driver.post_soon(UploadBegan(self.session, self.member))
        return True

    def _end(self) -> None:
        self._hang_up()
        if not self.done.done():
            self.done.set_result(sum(self.at))

    def fail(self) -> None:
        """It breaks, or is refused."""
        self._hang_up()
        if not self.done.done():
            self.done.set_exception(TransferError("an upload broke"))

    def abandon(self) -> None:
        """Nobody waits for it any more."""
        self._hang_up()
        self.done.cancel()

    def _hang_up(self) -> None:
        if self.writer is None or self.coordinator is None:
            return
        superseded = self.writer.superseded
        self.stack.close()
        if not superseded and not self.coordinator.fuse.burnt:
            self.coordinator.driver.post_soon(UploadEnded(self.session, self.member))
        self.writer = None


class SimulatedLink:
    """A site's way to the coordinator; a `maskwork.participant.work.Link`."""

    def __init__(self, watch: Watch, fuse: Fuse) -> None:
        self.connection: Connection | None = None
        self.transfer: Download | Upload | None = None
        self._watch = watch
        self._fuse = fuse

    def send(self, session: bytes, message: codec.Request) -> None:
        """Put a message on its way if the stream is up."""
        self._fuse.tick()
        self._watch.sent(session, message)
        if self.connection is not None and not self.connection.broken:
            data = codec.encode_request(session, message).SerializeToString()
            self.connection.channels[Channel.UP].append(data)
        self._fuse.tick()

    def redial(self) -> None:
        """End the stream; a new one is made when a `HEAL` says so."""
        if self.connection is not None:
            self.connection.cut()

    async def download(self, digest: bytes, size: int, path: Path) -> bytes:
        """Fetch something; raises TransferError."""
        download = Download(digest, path, asyncio.get_running_loop().create_future())
        await self._run(download)
        return download.done.result()

    async def upload(self, session: bytes, update: BinaryIO, statistics: bytes, offsets: tuple[int, int]) -> int:
        """Stream both segments; raises TransferError."""
        update.seek(0)
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        upload = Upload(session, update.read(), statistics, list(offsets), done, self._watch)
        await self._run(upload)
        return done.result()

    async def _run(self, transfer: Download | Upload) -> None:
        if self.connection is None:
            raise TransferError("not connected to the coordinator")
        self.transfer = transfer
        try:
            await asyncio.wait({transfer.done})
        finally:
            transfer.abandon()
            if self.transfer is transfer:
                self.transfer = None
