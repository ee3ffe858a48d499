"""Writes tests/vectors/v1/numerics.json: cases by which another implementation can check its numerics.

``python tests/vectors/generate_numerics.py`` compares and exits 1 on a difference; ``--rewrite`` writes the file, which
changes only with the version of the protocol. Good cases state inputs and outputs. Bad ones state, under ``error``, the
exception that must come and, under ``step``, the step that must fail. Bytes are hexadecimal; float32 vectors are their
little-endian bytes; ring coordinates and integers are plain numbers.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from hashlib import shake_128
from pathlib import Path

import numpy as np

from maskwork.secagg import encoding as enc
from maskwork.secagg import masking, prg, ring
from maskwork.secagg.encoding import Encoding, Rotation
from maskwork.secagg.prg import SignedKey
from maskwork.secagg.rotation import Float32Array

Value = str | int | float | bool | Sequence["Value"] | Mapping[str, "Value"]
Case = dict[str, Value]

PATH = Path(__file__).parent / "v1" / "numerics.json"
SEED = bytes(range(32))


def _bytes(label: str, length: int) -> bytes:
    return shake_128(label.encode()).digest(length)


def _floats(label: str, length: int, scale: float) -> Float32Array:
    """Multiples of 1/1024 in [-32, 32), times ``scale``, a power of two: exact in float32."""
    words = np.frombuffer(_bytes(label, 2 * length), "<u2").astype(np.float32)
    return ((words - np.float32(32768)) / np.float32(1024) * np.float32(scale)).astype(np.float32)


def _keys(count: int) -> list[SignedKey]:
    return [SignedKey(_bytes(f"mask key {i}", 16), i % 2 == 1) for i in range(count)]


def _shown(keys: Sequence[SignedKey]) -> list[Value]:
    return [{"key": key.key.hex(), "negative": key.negative} for key in keys]


def keystreams() -> list[Case]:
    """Seeks: from the start, from inside a block, across the 32-bit border of the block counter."""
    cases: list[Case] = []
    for start, length in [(0, 64), (5, 30), (16, 16), ((1 << 36) - 32, 32)]:
        key = _bytes(f"keystream {start}", 16)
        stream = prg.keystream(key, start, length)
        cases.append({"key": key.hex(), "start_byte": start, "length": length, "keystream": stream.hex()})
    bad: list[Case] = [
        {"key": bytes(4).hex(), "start_byte": 0, "length": 1, "error": "ValueError", "step": "key of 32 bits"},
        {"key": bytes(17).hex(), "start_byte": 0, "length": 1, "error": "ValueError", "step": "key too long"},
        {
            "key": bytes(16).hex(),
            "start_byte": (1 << 36) - 8,
            "length": 9,
            "error": "ValueError",
            "step": "stream longer than 2^36 bytes",
        },
    ]
    return cases + bad


def mask_sums() -> list[Case]:
    """Sums of signed keystreams over a range of coordinates, from zero."""
    cases: list[Case] = []
    for count, start, keys in [(8, 0, _keys(1)), (8, 3, _keys(3)), (5, 70_001, _keys(4))]:
        acc, acc64 = np.zeros(count, np.uint32), np.zeros(count, np.uint64)
        prg.add_keystreams_u32(acc, keys, start)
        prg.add_keystreams_u64(acc64, keys, start)
        sums: Case = {"update": acc.tolist(), "statistics": [str(v) for v in acc64.tolist()]}
        cases.append({"keys": _shown(keys), "start": start, "count": count, **sums})
    return cases


def packings() -> list[Case]:
    """Every width, 11 coordinates with foreign high bits; then buffers of the wrong length."""
    cases: list[Case] = []
    for bits in range(ring.MIN_BITS, ring.MAX_BITS + 1):
        values = np.frombuffer(_bytes(f"packing {bits}", 44), "<u4").astype(np.uint32)
        packed = np.zeros(ring.packed_size(len(values), bits), np.uint8)
        ring.pack(values, bits, packed)
        cases.append({"bits": bits, "values": values.tolist(), "packed": packed.tobytes().hex()})
    for bits, count, size, step in [(20, 10, 24, "one byte short"), (20, 10, 26, "one byte over"), (7, 8, 7, "width")]:
        cases.append({"bits": bits, "count": count, "packed": "ff" * size, "error": "ValueError", "step": step})
    return cases


def _encoding(encoding: Encoding) -> Case:
    return {
        "clip_norm": encoding.clip_norm,
        "weight_cap": encoding.weight_cap,
        "value_bits": encoding.value_bits,
        "ring_bits": encoding.ring_bits,
        "rotation": encoding.rotation.value,
    }


def _encoded(update: Float32Array, weight: int, encoding: Encoding) -> Case:
    rounding_key, keys = _bytes("rounding key", 16), _keys(2)
    integers, mean = np.zeros(len(update), np.int32), np.zeros(len(update), np.float32)
    enc.encode_update(
        update, weight, encoding=encoding, rotation_seed=SEED, rounding_key=rounding_key, out_i32=integers
    )
    enc.decode_sum(integers.view(np.uint32), encoding, rotation_seed=SEED, total_weight=weight, out_f32=mean)
    masked = np.zeros(ring.packed_size(len(update), encoding.ring_bits), np.uint8)
    clamped = masking.mask_update(
        update,
        weight,
        encoding=encoding,
        keys=masking.MaskingKeys(tuple(keys), (), rounding_key),
        rotation_seed=SEED,
        out_u8=masked,
    )
    return {
        "encoding": _encoding(encoding),
        "update": update.astype("<f4").tobytes().hex(),
        "weight": weight,
        "rounding_key": rounding_key.hex(),
        "rotation_seed": SEED.hex(),
        "integers": integers.tolist(),
        "clamped": clamped,
        "mask_keys": _shown(keys),
        "masked": masked.tobytes().hex(),
        "decoded": mean.astype("<f4").tobytes().hex(),
    }


def encodings() -> list[Case]:
    """Both presets and one between; updates inside the clip norm and outside; the refusals."""
    exact = enc.preset("exact", cohort=10, clip_norm=4.0, weight_cap=100)
    compact = enc.preset("compact", cohort=10, clip_norm=4.0, weight_cap=100)
    between = Encoding(2.0, 1000, 11, 14, Rotation.NONE)
    cases = [
        _encoded(_floats("inside", 16, 2.0**-7), 100, exact),
        _encoded(_floats("outside", 16, 1.0), 37, exact),
        _encoded(_floats("inside", 21, 2.0**-7), 100, compact),
        _encoded(_floats("outside", 21, 1.0), 37, compact),
        _encoded(_floats("between", 9, 2.0**-6), 999, between),
        _encoded(np.array([4.0], np.float32), 100, exact),
    ]
    for position, value in [(0, math.nan), (3, math.inf), (4, -math.inf)]:
        update = _floats("bad", 5, 0.5)
        update[position] = value
        cases.append(_refused(update, 1, exact, f"non-finite coordinate at index {position}"))
    for weight in (0, -1, 101):
        cases.append(_refused(_floats("bad", 5, 0.5), weight, exact, "weight outside 1..weight_cap"))
    return cases


def _refused(update: Float32Array, weight: int, encoding: Encoding, step: str) -> Case:
    return {
        "encoding": _encoding(encoding),
        "update": update.astype("<f4").tobytes().hex(),
        "weight": weight,
        "error": "EncodingError",
        "step": step,
    }


def parameters() -> list[Case]:
    """What the presets are for a cohort, and encodings that a plan must not have."""
    cases: list[Case] = []
    for name, cohorts in (("exact", (1, 3, 4, 5, 10, 256, 257, 1000)), ("compact", (3, 10, 1000, 65536))):
        for cohort in cohorts:
            encoding = enc.preset(name, cohort=cohort, clip_norm=1.0, weight_cap=7)
            cases.append({"preset": name, "cohort": cohort, "encoding": _encoding(encoding)})
    good = _encoding(Encoding(1.0, 7, 24, 28, Rotation.NONE))
    bad: list[tuple[int, Case, str]] = [
        (17, good, "cohort * S >= 2^(r-1)"),
        (3, {**good, "clip_norm": 0.0}, "clip_norm is not positive"),
        (3, {**good, "weight_cap": 0}, "weight_cap is not positive"),
        (3, {**good, "value_bits": 29}, "value_bits > ring_bits"),
        (3, {**good, "value_bits": 1}, "S would be 0"),
        (3, {**good, "ring_bits": 33}, "ring_bits > 32"),
    ]
    error = "EncodingParameterError"
    return cases + [{"cohort": n, "encoding": encoding, "error": error, "step": step} for n, encoding, step in bad]


def statistics() -> list[Case]:
    """Encoded as decimal strings, because they do not fit a JSON number everywhere."""
    names: list[Value] = ["examples", "loss"]
    cases: list[Case] = []
    for values in ([1797.0, 0.30000001], [0.0, -2.5], [2.0**20, 3 * 2.0**-21], [1.0, -(2.0**-21)]):
        encoded = enc.encode_statistics(values, [2.0**20, 64.0], ["examples", "loss"])
        masked = masking.mask_statistics(encoded, _keys(2))
        cases.append(
            {
                "names": names,
                "bounds": [2.0**20, 64.0],
                "values": values,
                "encoded": [str(v) for v in encoded.tolist()],
                "mask_keys": _shown(_keys(2)),
                "masked": masked.hex(),
                "decoded": enc.decode_statistics(encoded),
            }
        )
    for value, step in [("nan", "NaN"), ("inf", "Inf"), ("64.5", "beyond its bound"), ("-64.5", "beyond its bound")]:
        bad: Case = {"names": names, "bounds": [2.0**20, 64.0], "values": [1.0, value]}
        cases.append({**bad, "error": "EncodingError", "step": step})
    return cases


def document() -> str:
    """The text of the file."""
    content: dict[str, Value] = {
        "keystreams": keystreams(),
        "mask_sums": mask_sums(),
        "packings": packings(),
        "parameters": parameters(),
        "encodings": encodings(),
        "statistics": statistics(),
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def main() -> int:
    """Compares, or with ``--rewrite`` writes."""
    if "--rewrite" in sys.argv[1:]:
        PATH.parent.mkdir(exist_ok=True)
        PATH.write_text(document(), encoding="utf-8")
        return 0
    if PATH.read_text(encoding="utf-8") == document():
        return 0
    print(f"{PATH} differs from what this code computes; --rewrite writes it anew")
    return 1


if __name__ == "__main__":
    sys.exit(main())
