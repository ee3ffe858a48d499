"""The mathematics of one masked round, without a network: what a participant and what the coordinator computes.

The functions timed are production's own (`maskwork.secagg`): the participant's fused encode-mask-pack and its dealing
of shares; the coordinator's addition of one upload, its reconstruction of secrets, its removal of masks and decoding.
Each side runs in a process of its own, so that the peaks of memory are its own.

It is NOT a protocol run: keys, shares and ciphertexts are made for the occasion, at the sizes that a round of that many
participants has, and nothing is sent.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec

from maskwork.bench.clock import medians, seconds
from maskwork.bench.floor import expand
from maskwork.bench.memory import peak_rss_bytes
from maskwork.coordinator.forks import shared_vector
from maskwork.coordinator.unmasking import derive_masks, unmask
from maskwork.errors import UserError
from maskwork.privacy.mechanisms import Mechanism, NoisyRelease, Wanted, private_release
from maskwork.privacy.noise import NOISE_KEY_BYTES, IntegerNoise
from maskwork.secagg import keys, masking
from maskwork.secagg.dealing import Dealer, deal
from maskwork.secagg.encoding import Encoding, EncodingParameterError, Rotation, TileEncoder, checked_norm, decode_sum
from maskwork.secagg.graph import complete_threshold
from maskwork.secagg.keys import PublicKey, SecretKey, SoftwareSigner
from maskwork.secagg.masking import MaskingKeys
from maskwork.secagg.prg import MaskStreams, SignedKey
from maskwork.secagg.ring import TILE, BitPacker, packed_size, scratch
from maskwork.secagg.rotation import BlockRotation, Float32Array, pieces
from maskwork.secagg.sharing import PRIME, SHARE_BYTES, combine_with, lagrange_at_zero
from maskwork.secagg.unmasking import MaskSecretShares, SelfSeedShares, UnmaskingJob

SESSION = bytes(range(32))
SEED = bytes(range(32))
CLIP_NORM = 1.0
WEIGHT_CAP = 1000
NOISE_MULTIPLIER = 1.0
PRIVATE_RING_BITS = 20
_ACCUMULATED = 1 << 20


@dataclass(frozen=True, slots=True)
class Shape:
    """What is measured.

    Attributes:
        participants: n.
        neighbours: k; n - 1 on the complete graph.
        threshold: t.
        parameters: d.
        dropouts: Participants that are gone after step 1.
        ring_bits: r.
        value_bits: b.
        rotated: Whether updates are rotated first (the preset `compact`).
        repeats: Runs of everything that is timed more than once.
        privacy: Name of the mechanism whose noise participants add; empty for none.
    """

    participants: int
    neighbours: int
    threshold: int
    parameters: int
    dropouts: int
    ring_bits: int
    value_bits: int
    rotated: bool
    repeats: int
    privacy: str = ""

    @property
    def survivors(self) -> int:
        """|U3|."""
        return self.participants - self.dropouts

    @property
    def complete(self) -> bool:
        """Whether everybody is everybody's neighbour."""
        return self.neighbours == self.participants - 1

    @property
    def encoding(self) -> Encoding:
        """As a plan would have it."""
        rotation = Rotation.HADAMARD if self.rotated else Rotation.NONE
        return Encoding(CLIP_NORM, self.weight, self.value_bits, self.ring_bits, rotation)

    @property
    def weight(self) -> int:
        """Of the update that is measured; with noise every participant has the same."""
        return 1 if self.privacy else WEIGHT_CAP

    @property
    def noisy(self) -> NoisyRelease:
        """What is released with noise, divided for two thirds of the participants."""
        return NoisyRelease(
            Mechanism(self.privacy), self.encoding, self.parameters, NOISE_MULTIPLIER, _provisioned(self.participants)
        )


def shape_of(
    *,
    participants: int,
    neighbours: int | None,
    threshold: int | None,
    parameters: int,
    dropout: float,
    ring_bits: int | None,
    rotated: bool,
    repeats: int,
    privacy: str = "",
) -> Shape:
    """The shape that the command line asks for, checked.

    Raises:
        UserError: The figures do not make a round.
    """
    k = participants - 1 if neighbours is None else neighbours
    if not 2 <= k <= participants - 1:
        raise UserError(f"--neighbours {k}: with {participants} participants it is 2 to {participants - 1}")
    if k < participants - 1 and k % 2:
        raise UserError(f"--neighbours {k}: the sparse graph has an even degree")
    holders = participants if k == participants - 1 else k
    t = (complete_threshold(holders) if k == participants - 1 else holders // 2 + 1) if threshold is None else threshold
    if not 1 <= t <= holders:
        raise UserError(f"--threshold {t}: there are {holders} holders of a secret")
    dropouts = math.floor(dropout * participants + 0.5)
    left = participants - dropouts if k == participants - 1 else k - math.ceil(dropout * k)
    if left < t:
        raise UserError(f"--dropout {dropout}: {left} holders are left of the {t} that it takes: the round is lost")
    growth = math.ceil(math.log2(participants))
    value_bits = 16 if rotated else min(24, 32 - growth)
    bits = value_bits + growth if ring_bits is None else ring_bits
    value_bits = min(value_bits, bits - growth)
    shape = Shape(participants, k, t, parameters, dropouts, bits, value_bits, rotated, repeats)
    if privacy:
        return _private(shape, privacy, PRIVATE_RING_BITS if ring_bits is None else ring_bits)
    try:
        _ = shape.encoding
    except EncodingParameterError as error:
        raise UserError(f"--ring-bits {bits} for {participants} participants: {error}") from None
    return shape


def _private(shape: Shape, privacy: str, ring_bits: int) -> Shape:
    try:
        mechanism = Mechanism(privacy)
        if not mechanism.distributed:
            raise ValueError("participants add no noise there")
        wanted = Wanted(
            mechanism,
            shape.participants,
            _provisioned(shape.participants),
            shape.parameters,
            CLIP_NORM,
            NOISE_MULTIPLIER,
        )
        encoding = private_release(wanted, ring_bits=ring_bits).encoding
    except ValueError as error:
        names = " or ".join(m.value for m in Mechanism if m.distributed)
        raise UserError(f"--privacy {privacy} (it is {names}): {error}") from None
    return replace(shape, privacy=privacy, rotated=True, ring_bits=ring_bits, value_bits=encoding.value_bits)


def _provisioned(participants: int) -> int:
    return math.ceil(2 * participants / 3)


def measure(shape: Shape) -> dict[str, Any]:
    """Measure both sides, each in a process of its own; what the command prints as JSON."""
    return {
        "shape": asdict(shape),
        "participant": _in_a_process(measure_participant, shape),
        "coordinator": _in_a_process(measure_coordinator, shape),
    }


def _in_a_process(side: Callable[[Shape], Mapping[str, float]], shape: Shape) -> dict[str, float]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return dict(pool.submit(side, shape).result())


def measure_participant(shape: Shape) -> dict[str, float]:
    """Seconds of a participant's work on one update, the floor of its masks, bytes, memory and error."""
    before = peak_rss_bytes()
    d, encoding = shape.parameters, shape.encoding
    update = _update(d)
    own = MaskingKeys(
        tuple(SignedKey(os.urandom(16), i % 2 == 1) for i in range(shape.neighbours + 1)),
        (),
        os.urandom(16),
    )
    packed = np.zeros(packed_size(d, shape.ring_bits), np.uint8)
    ring = scratch(min(2 * TILE, d), np.uint32)
    raw_keys = [key.key for key in own.update]

    contribution = shape.noisy.contribution(os.urandom(NOISE_KEY_BYTES)) if shape.privacy else None

    def whole() -> None:
        masking.mask_update(
            update,
            shape.weight,
            encoding=encoding,
            keys=own,
            rotation_seed=SEED,
            out_u8=packed,
            contribution=contribution,
        )

    def encode() -> None:
        encoder = TileEncoder(
            encoding,
            length=d,
            norm=checked_norm(update),
            weight=shape.weight,
            rotation_seed=SEED,
            rounding_key=own.rounding_key,
        )
        for start, stop in encoder.tiles():
            encoder.encode(update[start:stop], start, ring[: stop - start].view(np.int32))

    def mask() -> None:
        streams = MaskStreams(own.update, item_bytes=4)
        for start in range(0, d, TILE):
            streams.add_to(ring[: min(TILE, d - start)])

    def pack() -> None:
        packer = BitPacker(shape.ring_bits)
        for start in range(0, d, TILE):
            stop = min(start + TILE, d)
            at = start * shape.ring_bits // 8
            part = packed[at : at + packed_size(stop - start, shape.ring_bits)]
            packer.pack(ring[: stop - start], part)

    turned = scratch(min(2 * TILE, d), np.float32)

    def rotate() -> None:
        rotation = BlockRotation(d, SEED)
        for start, stop in pieces(d):
            rotation.rotate(turned[: stop - start], start)

    def draw() -> None:
        noise = IntegerNoise(shape.noisy.table(), bytes(NOISE_KEY_BYTES))
        for start in range(0, d, TILE):
            noise.add_to(ring[: min(TILE, d - start)].view(np.int32))

    private = {"rotate": rotate, "noise": draw} if shape.privacy else {}
    times = medians(
        {"floor": lambda: expand(raw_keys, d), "total": whole, "encode": encode, "mask": mask, "pack": pack, **private},
        repeats=shape.repeats,
    )
    peak = peak_rss_bytes() - before
    return {
        "encode_s": times["encode"],
        "mask_s": times["mask"],
        "pack_s": times["pack"],
        "total_s": times["total"],
        **{f"{name}_s": times[name] for name in private},
        "upload_bytes": float(packed.nbytes),
        "masks": float(len(raw_keys)),
        **_share_keys(shape),
        "floor.mask_floor_s": times["floor"],
        "floor.aes_ctr_gb_per_s": 4e-9 * d * len(raw_keys) / times["floor"],
        "peak_memory_bytes": float(peak),
        "update_bytes": float(update.nbytes),
        "nmse": _nmse(shape, update),
    }


def _update(d: int) -> Float32Array:
    """An update just within the clip norm."""
    update = np.random.default_rng(1).standard_normal(d, np.float32)
    update *= np.float32(CLIP_NORM * 0.99 / float(np.linalg.norm(update)))
    return update


def _share_keys(shape: Shape) -> dict[str, float]:
    """What step 1 costs: checking the neighbours' keys, and dealing both secrets to all holders, signed."""
    k = shape.neighbours
    certificate_key = ec.generate_private_key(ec.SECP256R1())
    signer = SoftwareSigner(certificate_key)
    secrets = keys.derive_session_secrets(os.urandom(32))
    peers = {i: SecretKey(os.urandom(32)).public() for i in range(1, k + 1)}
    holders = list(range(k + 1)) if shape.complete else list(range(1, k + 1))
    dealer = Dealer(0, SESSION, shape.threshold, secrets.encryption_secret.public(), secrets.mask_secret.public())
    message = os.urandom(140)
    signature = signer.sign(message)

    def verify() -> None:
        for peer in peers.values():
            keys.verify_signature(certificate_key.public_key(), signature, message)
            keys.is_degenerate(peer)
            keys.is_degenerate(peer)

    def share() -> None:
        deal(
            dealer,
            secrets,
            holders=holders,
            encryption_keys=peers,
            stream_key=os.urandom(16),
            signer=signer,
        )

    times = medians({"verify": verify, "share": share}, repeats=shape.repeats)
    return {"share_keys_s": times["share"], "verify_keys_s": times["verify"]}


def _nmse(shape: Shape, update: Float32Array) -> float:
    """The mean of all participants' updates (all the same here) as decoded, against what went in: |error|²/|truth|².

    Every participant rounds with a key of its own; of large cohorts as many are encoded as matter for the figure.
    """
    encoding, d = shape.encoding, shape.parameters
    encoders = min(shape.participants, 4)
    norm, total = checked_norm(update), np.zeros(d, np.uint32)
    ring = scratch(min(2 * TILE, d), np.int32)
    for _ in range(encoders):
        encoder = TileEncoder(
            encoding, length=d, norm=norm, weight=shape.weight, rotation_seed=SEED, rounding_key=os.urandom(16)
        )
        for start, stop in encoder.tiles():
            tile = ring[: stop - start]
            encoder.encode(update[start:stop], start, tile)
            total[start:stop] += tile.view(np.uint32)
    mean = np.empty(d, np.float32)
    decode_sum(total, encoding, rotation_seed=SEED, total_weight=encoders * shape.weight, out_f32=mean)
    mean -= update
    return float(np.dot(mean, mean) / np.dot(update, update))


# --- the coordinator ------------------------------------------------------------------------------------------------


def measure_coordinator(shape: Shape) -> dict[str, float]:
    """Seconds of the coordinator's work on one round, and the floor of the masks that it takes off."""
    before = peak_rss_bytes()
    d, encoding = shape.parameters, shape.encoding
    accumulator = np.zeros(d, np.uint32)
    upload = np.frombuffer(os.urandom(min(packed_size(d, shape.ring_bits), _ACCUMULATED)), np.uint8)
    upload = np.resize(upload, packed_size(d, shape.ring_bits))
    job = unmasking_job(shape)
    found: list[Any] = []
    rebuild_s = _rebuild_s(shape)
    reconstruct_s = seconds(lambda: found.append(derive_masks(job, processes=1)))
    reconstruct_2_s = seconds(lambda: derive_masks(job, processes=2))
    removed = found[0].update
    model = shared_vector(d)
    total_weight = shape.weight * shape.survivors
    raw_keys = [key.key for key in removed]
    large = 4e-9 * d * len(removed) > 10  # seconds rather than milliseconds: one run of each says enough

    def unmask_with(processes: int) -> Callable[[], None]:
        def work() -> None:
            unmask(
                lambda start, stop: accumulator[start:stop].copy(),
                removed,
                encoding,
                rotation_seed=SEED,
                total_weight=total_weight,
                model=model,
                processes=processes,
            )

        return work

    works: dict[str, Callable[[], object]] = {
        "accumulate": lambda: masking.accumulate(accumulator, upload, shape.ring_bits),
        "floor": lambda: expand(raw_keys, d),
        "remove": lambda: masking.remove_masks(accumulator, removed),
        "unmask": unmask_with(1),
        "unmask_2": unmask_with(2),
    }
    times = {n: seconds(w) for n, w in works.items()} if large else medians(works, repeats=shape.repeats)
    return {
        "accumulate_s": times["accumulate"],
        "reconstruct_s": reconstruct_s,
        "reconstruct_2_processes_s": reconstruct_2_s,
        "rebuild_secret_s": rebuild_s,
        "remove_masks_s": times["remove"],
        "unmask_s": times["unmask"],
        "unmask_2_processes_s": times["unmask_2"],
        "masks_expanded": float(len(removed)),
        "floor.unmask_floor_s": times["floor"],
        "floor.aes_ctr_gb_per_s": 4e-9 * d * len(raw_keys) / times["floor"],
        "peak_memory_bytes": float(peak_rss_bytes() - before),
    }


def unmasking_job(shape: Shape) -> UnmaskingJob:
    """Shares as step 4 gathers them. Random points make a polynomial too: its value at 0 is then the secret."""
    survivors = range(shape.dropouts, shape.participants)
    xs = [u + 1 for u in survivors][: shape.threshold]
    coefficients = lagrange_at_zero(xs)

    def secret() -> tuple[dict[int, bytes], bytes]:
        while True:
            shares = [(int.from_bytes(os.urandom(64), "big") % PRIME).to_bytes(SHARE_BYTES, "big") for _ in xs]
            try:
                return dict(zip(xs, shares, strict=True)), combine_with(coefficients, shares)
            except ValueError:  # one in 2^247 has no 32-byte secret
                continue

    seeds = []
    for owner in survivors:
        shares, self_seed = secret()
        seeds.append(SelfSeedShares(owner, keys.seed_commitment(self_seed, owner=owner, session=SESSION), shares))
    public: dict[int, PublicKey] = {u: SecretKey(os.urandom(32)).public() for u in survivors}
    dropped = []
    for owner in range(shape.dropouts):
        shares, mask_secret = secret()
        dropped.append(
            MaskSecretShares(owner, SecretKey(mask_secret).public(), shares, _neighbours(shape, owner, public))
        )
    return UnmaskingJob(SESSION, tuple(seeds), tuple(dropped))


def _neighbours(shape: Shape, owner: int, public: Mapping[int, PublicKey]) -> tuple[tuple[int, PublicKey], ...]:
    """A dropout's surviving neighbours: all survivors, or on the sparse graph the share of k that survives."""
    if shape.complete:
        return tuple(public.items())
    order = np.random.default_rng(owner).permutation(list(public))
    chosen = sorted(order[: round(shape.neighbours * shape.survivors / shape.participants)].tolist())
    return tuple((u, public[u]) for u in chosen)


def _rebuild_s(shape: Shape) -> float:
    """One secret from t shares once the Lagrange coefficients are there, as on the complete graph."""
    xs = list(range(1, shape.threshold + 1))
    coefficients = lagrange_at_zero(xs)
    shares = [os.urandom(32).rjust(SHARE_BYTES, b"\0") for _ in xs]
    many = 100

    def work() -> None:
        for _ in range(many):
            try:
                combine_with(coefficients, shares)
            except ValueError:
                continue

    return medians({"work": work}, repeats=shape.repeats)["work"] / many
