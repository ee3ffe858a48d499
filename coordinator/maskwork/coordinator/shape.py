"""The lengths of one session's vectors: what an upload and a sum have to be."""

from __future__ import annotations

from dataclasses import dataclass

from maskwork.secagg.ring import packed_size


@dataclass(frozen=True, slots=True)
class SessionShape:
    """The lengths of one session's vectors.

    Attributes:
        parameters: coordinates of the update (d).
        ring_bits: bits of each on the wire (r).
        statistics: how many statistics travel beside it (s).
    """

    parameters: int
    ring_bits: int
    statistics: int

    @property
    def update_bytes(self) -> int:
        """Length of the packed update: ceil(d r / 8)."""
        return packed_size(self.parameters, self.ring_bits)

    @property
    def statistics_bytes(self) -> int:
        """Length of the masked statistics: 8 s."""
        return 8 * self.statistics

    @property
    def upload_bytes(self) -> int:
        """Length of a whole upload."""
        return self.update_bytes + self.statistics_bytes
