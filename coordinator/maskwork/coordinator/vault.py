"""What a coordinator seals: which of its files and columns, under which bindings. `sealed` is the format.

A `Vault` exists only where encryption is configured; without one the callers' plain code runs, untouched. It travels to
the aggregation worker through the worker's pipe, as a part of what the worker is asked; never by arguments or
environment.

NOT here: where keys come from (`at_rest_key`), and changing them (`at_rest`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from maskwork.coordinator import sealed
from maskwork.coordinator.sealed import Binding, MasterKeys, NotSealed, SealedReader

UPLOAD_CHUNK_BYTES = 1 << 16
"""Of a spooled upload, the last chunk so far is in memory, also while its site is away."""


@dataclass(frozen=True, slots=True)
class Vault:
    """The keys of one coordinator, and what it seals with them.

    Attributes:
        federation: The federation; what another one sealed does not open here.
        keys: The master keys.
        accept_plain: Whether plain files and values of before encryption was turned on may still be read.
    """

    federation: str
    keys: MasterKeys = field(repr=False)
    accept_plain: bool = False

    def model(self, digest: bytes) -> Binding:
        """A model, by the SHA-256 of its content."""
        return Binding("model", self.federation, digest)

    def accumulator(self, session: bytes) -> Binding:
        """The running sum of a session."""
        return Binding("accumulator", self.federation, session)

    def upload(self, session: bytes, member: int) -> Binding:
        """One member's upload in a session."""
        return Binding("upload", self.federation, session + member.to_bytes(4, "big"))

    def open(self, path: Path, binding: Binding) -> SealedReader:
        """Open a sealed file; raises as `sealed.open_sealed`."""
        return sealed.open_sealed(path, binding, self.keys)

    def seal_value(self, kind: str, name: bytes, plain: bytes) -> bytes:
        """A value as it goes into the database."""
        return sealed.seal_value(plain, Binding(kind, self.federation, name), self.keys.current)

    def open_value(self, kind: str, name: bytes, value: bytes, *, where: str) -> bytes:
        """A value as it was; `where` is for the error.

        Raises:
            StoreError: It does not open, or is plain and plain ones are not accepted.
        """
        if not sealed.is_sealed_value(value) and self.accept_plain:
            return value
        try:
            return sealed.open_value(value, Binding(kind, self.federation, name), self.keys, where=where)
        except NotSealed as plain:
            raise not_accepted(plain.what, where) from None


@dataclass(frozen=True, slots=True)
class UploadSeal:
    """What adding one upload to a sum takes, where both are sealed."""

    vault: Vault
    total: Binding
    upload: Binding


def not_accepted(what: str, file: str | Path) -> NotSealed:
    """The error for something plain in a state directory that is encrypted."""
    return NotSealed(
        what,
        file=file,
        remedy="This coordinator's state is encrypted. If this is from before it was, run `maskwork coordinator "
        "rotate-key`, or set accept_plain = true under [encryption] until you do; if not, somebody else put it there.",
    )
