"""tests/vectors/v1/numerics.json: byte for byte what the generator writes, and each case holds by itself."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from tests.secagg_numerics import slow_twins
from tests.vectors.generate_numerics import PATH, document

from maskwork.secagg import encoding as enc
from maskwork.secagg import prg, ring
from maskwork.secagg.encoding import Encoding, EncodingError, EncodingParameterError, Rotation

Case = dict[str, Any]
ERRORS = {"ValueError": ValueError, "EncodingError": EncodingError, "EncodingParameterError": EncodingParameterError}


def good_and_bad(section: str) -> tuple[list[Case], list[Case]]:
    everything: list[Case] = json.loads(PATH.read_text(encoding="utf-8"))[section]
    good, bad = [c for c in everything if "error" not in c], [c for c in everything if "error" in c]
    assert good
    return good, bad


def read_encoding(fields: Case) -> Encoding:
    return Encoding(**{**fields, "rotation": Rotation(fields["rotation"])})


def floats(text: str) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.frombuffer(bytes.fromhex(text), "<f4").astype(np.float32)


def keystream_sum(keys: list[Case], start: int, count: int, word_bytes: int) -> list[int]:
    total = [0] * count
    for key in keys:
        stream = slow_twins.keystream(bytes.fromhex(key["key"]), start * word_bytes, count * word_bytes)
        for i in range(count):
            word = int.from_bytes(stream[i * word_bytes : (i + 1) * word_bytes], "little")
            total[i] += -word if key["negative"] else word
    return [value % (1 << (8 * word_bytes)) for value in total]


def test_the_file_is_byte_for_byte_what_the_code_computes() -> None:
    assert PATH.read_bytes().decode() == document()


def test_keystreams() -> None:
    good, bad = good_and_bad("keystreams")
    for case in good:
        key = bytes.fromhex(case["key"])
        assert slow_twins.keystream(key, case["start_byte"], case["length"]).hex() == case["keystream"]
    for case in bad:
        with pytest.raises(ERRORS[case["error"]]):
            prg.keystream(bytes.fromhex(case["key"]), case["start_byte"], case["length"])


def test_mask_sums() -> None:
    for case in good_and_bad("mask_sums")[0]:
        assert keystream_sum(case["keys"], case["start"], case["count"], 4) == case["update"]
        assert [str(v) for v in keystream_sum(case["keys"], case["start"], case["count"], 8)] == case["statistics"]


def test_packings() -> None:
    good, bad = good_and_bad("packings")
    assert [case["bits"] for case in good] == list(range(8, 33))
    for case in good:
        assert slow_twins.pack(case["values"], case["bits"]).hex() == case["packed"]
    for case in bad:
        packed = np.frombuffer(bytes.fromhex(case["packed"]), np.uint8)
        with pytest.raises(ERRORS[case["error"]]):
            ring.unpack(packed, case["bits"], np.zeros(case["count"], np.uint32))


def test_parameters() -> None:
    good, bad = good_and_bad("parameters")
    for case in good:
        e = read_encoding(case["encoding"])
        assert enc.preset(case["preset"], cohort=case["cohort"], clip_norm=1.0, weight_cap=7) == e
        assert case["cohort"] * e.scale < 2 ** (e.ring_bits - 1)
    for case in bad:
        with pytest.raises(ERRORS[case["error"]]):
            enc.check_capacity(read_encoding(case["encoding"]), case["cohort"])


def test_encodings() -> None:
    good, bad = good_and_bad("encodings")
    for case in good:
        e, update = read_encoding(case["encoding"]), floats(case["update"])
        integers, count = case["integers"], len(update)
        if e.rotation is Rotation.NONE:
            key = bytes.fromhex(case["rounding_key"])
            assert slow_twins.encode_unrotated(update, case["weight"], e, key) == integers
        assert max(map(abs, integers)) <= e.scale
        masked = [x + m for x, m in zip(integers, keystream_sum(case["mask_keys"], 0, count, 4), strict=True)]
        assert slow_twins.pack(masked, e.ring_bits).hex() == case["masked"]
        quantum = e.value_range(count) / e.scale * e.weight_cap / case["weight"]
        error = np.linalg.norm(floats(case["decoded"]) - slow_twins.clipped(update, e.clip_norm))
        assert error <= quantum * count**0.5 + 1e-6
    for case in bad:
        update = floats(case["update"])
        with pytest.raises(ERRORS[case["error"]]):
            enc.encode_update(
                update,
                case["weight"],
                encoding=read_encoding(case["encoding"]),
                rotation_seed=bytes(32),
                rounding_key=bytes(16),
                out_i32=np.zeros(len(update), np.int32),
            )


def test_statistics() -> None:
    good, bad = good_and_bad("statistics")
    for case in good:
        encoded = [round(value * 2**20) % 2**64 for value in case["values"]]
        assert [str(v) for v in encoded] == case["encoded"]
        masks = keystream_sum(case["mask_keys"], 0, len(encoded), 8)
        masked = b"".join(((e + m) % 2**64).to_bytes(8, "little") for e, m in zip(encoded, masks, strict=True))
        assert masked.hex() == case["masked"]
        assert case["decoded"] == [slow_twins.centre(e, 64) / 2**20 for e in encoded]
    for case in bad:
        with pytest.raises(ERRORS[case["error"]]):
            enc.encode_statistics([float(v) for v in case["values"]], case["bounds"], case["names"])
