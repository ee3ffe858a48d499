"""docs/protocol.md is exact enough: a second implementation, written from the page alone, gives the published bytes.

It takes the session seeds, plan, updates and statistics of `transcript.json` and computes everything else. Of Maskwork
it uses the message types generated from the proto files and nothing else. It is slow, it checks nothing, and it knows
the complete graph without rotation only, which is what the transcript shows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from maskwork.wire.v1 import plan_pb2

# Plain JSON: its own shape is what the assertions are about.
Json: TypeAlias = dict[str, "Json"] | list["Json"] | str | int | float | bool | None

FILE = Path(__file__).resolve().parents[1] / "vectors" / "v1" / "transcript.json"
P = 2**256 + 297


def h(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


def u32(value: int) -> bytes:
    return value.to_bytes(4, "big")


def hkdf(key: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    return HKDF(SHA256(), length, salt or bytes(32), info).derive(key)


def prg(key: bytes, length: int) -> bytes:
    return Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(length))


def public(secret: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def agree(secret: bytes, other: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(secret).exchange(X25519PublicKey.from_public_bytes(other))


def signature(scalar: int, message: bytes) -> bytes:
    key = ec.derive_private_key(scalar, ec.SECP256R1())
    r, s = decode_dss_signature(key.sign(message, ec.ECDSA(SHA256(), deterministic_signing=True)))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def root(leaves: Sequence[bytes]) -> bytes:
    if len(leaves) == 1:
        return leaves[0]
    split = 1
    while 2 * split < len(leaves):
        split *= 2
    return h(b"\1", root(leaves[:split]), root(leaves[split:]))


def bitmap(members: Sequence[int], n: int) -> bytes:
    return sum(1 << i for i in members).to_bytes((n + 7) // 8, "little")


def unhex(value: Json) -> bytes:
    assert isinstance(value, str)
    return bytes.fromhex(value)


class Member:
    """One participant, computed from its session seed."""

    def __init__(self, index: int, seed: bytes, scalar: int, session: bytes) -> None:
        self.index, self.scalar, self.session = index, scalar, session
        self.enc_sk = hkdf(seed, b"", b"maskwork/v1/secret/encryption\0", 32)
        self.mask_sk = hkdf(seed, b"", b"maskwork/v1/secret/mask\0", 32)
        self.b = hkdf(seed, b"", b"maskwork/v1/secret/self-seed\0", 32)
        self.rounding = hkdf(seed, b"", b"maskwork/v1/secret/rounding\0", 16)
        self.dealing = hkdf(seed, b"", b"maskwork/v1/secret/dealing\0", 16)
        self.enc_pk, self.mask_pk = public(self.enc_sk), public(self.mask_sk)

    def sign(self, step: bytes, fields: bytes) -> bytes:
        signed = b"maskwork/v1/sig/" + step + b"\0" + self.session + u32(self.index) + fields
        return signature(self.scalar, signed)

    def shares(self, holders: Sequence[int], t: int) -> list[tuple[bytes, bytes]]:
        """(salt ‖ share of b_u, salt ‖ share of mask_sk) of each holder."""
        half = 64 * (t - 1)
        stream = prg(self.dealing, 2 * half + 32 * len(holders))
        dealt = []
        for place, holder in enumerate(holders):
            parts = []
            for kind, secret in enumerate((self.b, self.mask_sk)):
                value = int.from_bytes(secret, "big")
                for j in range(1, t):
                    group = stream[kind * half + 64 * (j - 1) : kind * half + 64 * j]
                    value += int.from_bytes(group, "big") * (holder + 1) ** j
                at = 2 * half + 32 * place + 16 * kind
                parts.append(stream[at : at + 16] + (value % P).to_bytes(33, "big"))
            dealt.append((parts[0], parts[1]))
        return dealt

    def commitments(self, holder: int, parts: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
        label, who = b"maskwork/v1/share-commitment\0", self.session + u32(self.index) + u32(holder)
        return h(label, who, b"\0", parts[0]), h(label, who, b"\1", parts[1])

    def ciphertext(self, other: Member, plaintext: bytes) -> bytes:
        if other is self:
            return b""
        low, high = sorted((self, other), key=lambda m: m.index)
        info = b"maskwork/v1/share-encryption\0" + self.session + u32(self.index) + u32(other.index)
        key = hkdf(agree(self.enc_sk, other.enc_pk), low.enc_pk + high.enc_pk, info, 32)
        return AESGCM(key).encrypt(bytes(12), plaintext, info)

    def leaf(self, holder: int, commitments: tuple[bytes, bytes], ciphertext: bytes) -> bytes:
        body = self.session + u32(self.index) + u32(holder) + commitments[0] + commitments[1]
        return h(b"\0maskwork/v1/dealing\0", body, h(ciphertext))

    def self_mask(self, segment: int) -> bytes:
        info = b"maskwork/v1/self-mask\0" + self.session + u32(self.index) + bytes([segment])
        return hkdf(self.b, b"", info, 16)

    def pair_mask(self, other: Member, segment: int) -> bytes:
        low, high = sorted((self, other), key=lambda m: m.index)
        info = b"maskwork/v1/pair-mask\0" + self.session + u32(low.index) + u32(high.index) + bytes([segment])
        return hkdf(agree(self.mask_sk, other.mask_pk), low.mask_pk + high.mask_pk, info, 16)

    def masks(self, others: Sequence[Member], segment: int, count: int) -> list[int]:
        """The sum of all masks on this member's vector: one number for each item."""
        width = (4, 8)[segment]
        streams = [(1, self.self_mask(segment))]
        streams += [(1 if self.index < v.index else -1, self.pair_mask(v, segment)) for v in others]
        total = [0] * count
        for sign, key in streams:
            stream = prg(key, width * count)
            for i in range(count):
                total[i] += sign * int.from_bytes(stream[width * i : width * (i + 1)], "little")
        return total

    def encoded(
        self, update: np.ndarray[tuple[int], np.dtype[np.float32]], weight: int, e: plan_pb2.Encoding
    ) -> list[int]:
        scale = 2 ** (e.value_bits - 1) - 1
        norm = float(np.linalg.norm(update.astype(np.float64)))
        factor = np.float32(min(1.0, e.clip_norm / norm) * weight / e.weight_cap * scale / e.clip_norm)
        noise = np.frombuffer(prg(self.rounding, 4 * len(update)), "<u4") >> 9
        values = []
        for y, word in zip(update * factor, noise, strict=True):
            f = np.floor(y)
            q = int(f + np.floor(np.float32(y - f) + np.float32(word) * np.float32(2**-23)))
            values.append(max(-scale, min(scale, q)))
        return values


class Session:
    """The published transcript, and the same five members made anew from their seeds."""

    def __init__(self) -> None:
        self.published = json.loads(FILE.read_text())
        self.plan_bytes = unhex(self.published["coordinator"]["plan_bytes"])
        self.plan = plan_pb2.RoundPlan.FromString(self.plan_bytes)
        self.id = h(b"maskwork/v1/session", self.plan_bytes)
        self.records = self.published["members"]
        self.members = [
            Member(m["index"], unhex(m["session_seed"]), m["signing_scalar"], self.id) for m in self.records
        ]
        sets = self.published["unmasking"]["sets"]
        self.u1, self.u2, self.u3 = sets["u1"], sets["u2"], sets["u3"]


@lru_cache(maxsize=1)
def session() -> Session:
    return Session()


def test_the_session_and_the_plans_signature() -> None:
    coordinator = session().published["coordinator"]
    assert coordinator["session_id"] == session().id.hex()
    signed = b"maskwork/v1/sig/plan\0" + session().id + b"\xff\xff\xff\xff"
    assert coordinator["signature"] == signature(coordinator["signing_scalar"], signed).hex()


@pytest.mark.parametrize("u", range(5))
def test_step_0(u: int) -> None:
    member, record = session().members[u], session().records[u]
    assert (member.enc_pk.hex(), member.mask_pk.hex()) == (record["encryption_key"], record["mask_key"])
    assert member.sign(b"advertise-keys", member.enc_pk + member.mask_pk).hex() == record["step_0"]["signature"]


@pytest.mark.parametrize("u", [0, 2, 3, 4])
def test_step_1(u: int) -> None:
    member, record = session().members[u], session().records[u]["step_1"]
    dealt = member.shares(session().u1, session().plan.graph.threshold)
    leaves = []
    for holder, parts, shown in zip(session().u1, dealt, record["holders"], strict=True):
        assert parts[0].hex() == shown["self_salt"] + shown["self_share"]
        assert parts[1].hex() == shown["mask_salt"] + shown["mask_share"]
        commitments = member.commitments(holder, parts)
        assert [c.hex() for c in commitments] == [shown["self_commitment"], shown["mask_commitment"]]
        ciphertext = member.ciphertext(session().members[holder], parts[0] + parts[1])
        assert ciphertext.hex() == shown["ciphertext"]
        leaves.append(member.leaf(holder, commitments, ciphertext))
        assert leaves[-1].hex() == shown["leaf"]
    commitment = h(b"maskwork/v1/seed-commitment\0", session().id, u32(u), member.b)
    assert (commitment.hex(), root(leaves).hex()) == (record["seed_commitment"], record["root"])
    assert member.sign(b"share-keys", commitment + root(leaves) + u32(len(leaves))).hex() == record["signature"]


@pytest.mark.parametrize("u", [0, 2, 4])
def test_step_2(u: int) -> None:
    member, record, encoding = session().members[u], session().records[u]["step_2"], session().plan.encoding
    others = [session().members[v] for v in session().u2 if v != u]
    update = np.frombuffer(unhex(record["update"]), "<f4")
    encoded = member.encoded(update, record["weight"], encoding)
    assert encoded == record["encoded_update"]
    masked = [
        (x + m) % 2**encoding.ring_bits for x, m in zip(encoded, member.masks(others, 0, len(encoded)), strict=True)
    ]
    bits = sum(y << (encoding.ring_bits * i) for i, y in enumerate(masked))
    packed = bits.to_bytes((len(masked) * encoding.ring_bits + 7) // 8, "little")
    assert packed.hex() == record["masked_update"]
    fixed = [round(value * 2**20) for value in record["statistics"]]
    sums = zip(fixed, member.masks(others, 1, len(fixed)), strict=True)
    assert b"".join(((x + m) % 2**64).to_bytes(8, "little") for x, m in sums).hex() == record["masked_statistics"]


@pytest.mark.parametrize("u", [0, 2, 4])
def test_step_3(u: int) -> None:
    fields = b"".join(bitmap(members, 5) for members in (session().u1, session().u2, session().u3))
    assert session().members[u].sign(b"consistency-check", fields).hex() == session().records[u]["step_3"]["signature"]


def test_step_4_and_the_mean() -> None:
    """The dropout between steps 1 and 2 is taken out by its mask_sk, the survivors' self masks by their b_u."""
    end, plan, members = session().published["unmasking"], session().plan, session().members
    r = plan.encoding.ring_bits
    sums = list(end["masked_update"])
    statistics = [int(value) for value in end["masked_statistics"]]
    survivors = [members[u] for u in session().u3]
    for segment, vector in enumerate((sums, statistics)):
        for gone in (members[v] for v in session().u2 if v not in session().u3):
            for u in survivors:
                stream = prg(gone.pair_mask(u, segment), (4, 8)[segment] * len(vector))
                _take(vector, 1 if u.index < gone.index else -1, stream, (4, 8)[segment])
        for u in survivors:
            _take(vector, 1, prg(u.self_mask(segment), (4, 8)[segment] * len(vector)), (4, 8)[segment])
    assert [x % 2**r for x in sums] == end["update"]
    centred = [(x + 2**63) % 2**64 - 2**63 for x in statistics]
    assert [x / 2**20 for x in centred] == end["statistics"]
    step = np.float32(
        plan.encoding.clip_norm
        / (2 ** (plan.encoding.value_bits - 1) - 1)
        * plan.encoding.weight_cap
        / (centred[0] / 2**20)
    )
    mean = np.array([(x + 2 ** (r - 1)) % 2**r - 2 ** (r - 1) for x in sums], np.float32) * step
    assert mean.astype("<f4").tobytes().hex() == end["mean"]


def _take(vector: list[int], sign: int, stream: bytes, width: int) -> None:
    for i in range(len(vector)):
        vector[i] -= sign * int.from_bytes(stream[width * i : width * (i + 1)], "little")
