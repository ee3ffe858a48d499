"""Every secret of a run of real services, known to the test: what they drew is recorded, the rest is derived from it.

Not a test itself. `RECORDER` runs in every process of a service before anything else (Python's `sitecustomize`) and
writes down what `os.urandom` gives, and to whom, in a folder that is not searched. From a site's session seeds and the
plans in the coordinator's database the core's own functions derive all else, as the site and its peers did.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from tests.secagg.cohort import signer

from maskwork.secagg import dealing, keys, masking
from maskwork.secagg.encoding import decode_sum
from maskwork.secagg.keys import Segment, SessionSecrets, ShareKind
from maskwork.secagg.messages import ShareKeys
from maskwork.secagg.plan import RoundPlan
from maskwork.secagg.prg import SignedKey
from maskwork.secagg.ring import UInt32Array, reduce_in_place
from maskwork.secagg.sharing import SHARE_BYTES

RECORDER = """
import json, os, sys
real, out = os.urandom, open(os.environ["MASKWORK_TEST_RECORD"], "ab", buffering=0)
def urandom(count):
    drawn, caller = real(count), sys._getframe(1).f_code
    out.write(json.dumps([caller.co_filename, caller.co_qualname, drawn.hex()]).encode() + b"\\n")
    return drawn
os.urandom = urandom
"""


def recorded(path: Path, file: str, function: str) -> list[bytes]:
    """What a service's processes drew in a function of one of our files, in order."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [bytes.fromhex(drawn) for where, who, drawn in lines if where.endswith(file) and who == function]


@dataclass(frozen=True)
class KnownSession:
    """One session, with the secrets of all its members in roster order."""

    plan: RoundPlan
    id: bytes
    seeds: Sequence[bytes]

    @property
    def secrets(self) -> list[SessionSecrets]:
        return [keys.derive_session_secrets(seed) for seed in self.seeds]

    def all(self) -> Iterator[tuple[str, bytes]]:
        """Each secret of the session, with its name."""
        for u, (seed, made) in enumerate(zip(self.seeds, self.secrets, strict=True)):
            own = {
                "session seed": seed,
                "dealing stream": keys.dealing_stream_key(seed),
                "encryption secret": made.encryption_secret.raw,
                "mask_sk": made.mask_secret.raw,
                "b_u": made.self_seed,
                "rounding key": made.rounding_key,
            }
            own |= {f"self mask {s.name}": k for s, k in zip(Segment, self.self_masks(u), strict=True)}
            for v in range(self.plan.cohort):
                if v != u:
                    own[f"AEAD key to {v}"] = self.share_key(u, v)
                    own |= {f"pair mask {s.name} {v}": k for s, k in zip(Segment, self.pair_masks(u, v), strict=True)}
            for holder, opened in self.dealt(u).items():
                own |= {f"{kind.name} share of {holder}": self._share(opened, kind) for kind in ShareKind}
            yield from (
                (f"session {self.id.hex()[:8]}, {self.plan.roster[u].participant}: {n}", s) for n, s in own.items()
            )

    @staticmethod
    def _share(opened: bytes, kind: ShareKind) -> bytes:
        at = kind * (keys.SALT_BYTES + SHARE_BYTES) + keys.SALT_BYTES
        return opened[at : at + SHARE_BYTES]

    def self_masks(self, u: int) -> tuple[bytes, bytes]:
        return keys.self_mask_keys(self.secrets[u].self_seed, index=u, session=self.id)

    def pair_masks(self, u: int, v: int) -> tuple[bytes, bytes]:
        own, peer = self.secrets[u].mask_secret, self.secrets[v].mask_secret.public()
        return keys.pair_mask_keys(own, own=own.public(), peer=peer, own_index=u, peer_index=v, session=self.id)

    def share_key(self, dealer: int, holder: int) -> bytes:
        own, peer = self.secrets[dealer].encryption_secret, self.secrets[holder].encryption_secret.public()
        return keys.share_key(
            own, own=own.public(), peer=peer, dealer=dealer, holder=holder, own_index=dealer, session=self.id
        )

    def dealing(self, u: int) -> ShareKeys:
        """What u dealt, dealt again."""
        made, everyone = self.secrets[u], range(self.plan.cohort)
        message, _ = dealing.deal(
            dealing.Dealer(
                u, self.id, self.plan.graph.threshold, made.encryption_secret.public(), made.mask_secret.public()
            ),
            made,
            holders=everyone,
            encryption_keys={v: self.secrets[v].encryption_secret.public() for v in everyone},
            stream_key=keys.dealing_stream_key(self.seeds[u]),
            signer=signer(0),  # whoever signs, the shares are these
        )
        return message

    def dealt(self, u: int) -> dict[int, bytes]:
        """U's shares and their salts as each other holder decrypts them."""
        found = {}
        for share in self.dealing(u).shares:
            if share.holder != u:
                key = self.share_key(u, share.holder)
                opened = keys.open_sealed(key, share.ciphertext, dealer=u, holder=share.holder, session=self.id)
                assert opened is not None
                found[share.holder] = opened
        return found

    def mean_of(
        self, masked: UInt32Array, members: Sequence[int], *, weight: int
    ) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        """The mean update of those whose uploads are in a masked sum; with other secrets than theirs, noise."""
        total, missing = masked.copy(), [v for v in range(self.plan.cohort) if v not in members]
        for u in members:
            added = [SignedKey(self.self_masks(u)[Segment.UPDATE], negative=False)]
            added += [SignedKey(self.pair_masks(u, v)[Segment.UPDATE], negative=u > v) for v in missing]
            masking.remove_masks(total, added)
        reduce_in_place(total, self.plan.encoding.ring_bits)
        mean = np.empty(self.plan.parameters, np.float32)
        decode_sum(
            total, self.plan.encoding, rotation_seed=keys.rotation_seed(self.id), total_weight=weight, out_f32=mean
        )
        return mean


def private_scalars(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The secret of each private key, by the name of its file; PEM. Its bytes are within every encoding of the key."""
    found = {}
    for name, pem in files.items():
        key = load_pem_private_key(pem, None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        found[f"private key {name}"] = key.private_numbers().private_value.to_bytes(32, "big")
    return found


def pieces(name: str, vector: np.ndarray[tuple[int], np.dtype[np.float32]]) -> dict[str, bytes]:
    """Some of a vector's numbers, from its beginning to its end."""
    raw = vector.astype("<f4").tobytes()
    return {f"{name} at {at}": raw[at : at + 32] for at in range(0, len(raw) - 32, len(raw) // 16)}
