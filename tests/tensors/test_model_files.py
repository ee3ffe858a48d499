"""Model files: round trips, the safetensors package as the slow twin, and what hostile files are told."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maskwork.errors import UserError
from maskwork.tensors import (
    MAX_HEADER_BYTES,
    Float32Array,
    ModelFileError,
    Schema,
    TensorSpec,
    first_non_finite,
    model_digest,
    read_finite_vector,
    read_header,
    read_schema,
    read_vector,
    write_model,
)

MIXED = Schema(
    (
        TensorSpec("head.weight", "F32", (3, 5)),
        TensorSpec("a", "F16", (7,)),
        TensorSpec("scale", "F64", ()),
        TensorSpec("body", "BF16", (2, 2, 2)),
        TensorSpec("nothing", "F32", (0, 4)),
    )
)
TORCH = {"F32": torch.float32, "F64": torch.float64, "F16": torch.float16, "BF16": torch.bfloat16}


def vector_of(schema: Schema, seed: int = 1) -> Float32Array:
    return np.random.default_rng(seed).standard_normal(schema.size).astype(np.float32)


def file_with(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def test_a_schema_is_ordered_by_name_and_counts_its_elements() -> None:
    assert [spec.name for spec in MIXED.tensors] == ["a", "body", "head.weight", "nothing", "scale"]
    assert MIXED.size == 7 + 8 + 15 + 0 + 1
    assert Schema(tuple(reversed(MIXED.tensors))) == MIXED
    assert [MIXED.tensor_at(i).name for i in (0, 6, 7, 15, 29, 30)] == [
        "a",
        "a",
        "body",
        "head.weight",
        *["head.weight", "scale"],
    ]
    with pytest.raises(IndexError):
        MIXED.tensor_at(31)


def test_a_difference_names_the_first_tensor() -> None:
    def schema(*specs: TensorSpec) -> Schema:
        return Schema(specs)

    a, b = TensorSpec("a", "F32", (2,)), TensorSpec("b", "F32", (2,))
    assert schema(a, b).difference(schema(b, a)) is None
    assert schema(a, b).difference(schema(a)) == "tensor 'b' F32[2] is here but not there"
    assert schema(b).difference(schema(a, b)) == "tensor 'a' F32[2] is there but not here"
    assert schema(TensorSpec("a", "F32", (2, 1))).difference(schema(a)) == "tensor 'a' F32[2, 1] here is F32[2] there"
    assert schema(TensorSpec("a", "F16", (2,))).difference(schema(a)) == "tensor 'a' F16[2] here is F32[2] there"


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "said"),
    [
        ("n", "I64", (1,), "integers are not averaged"),
        ("n", "F8_E4M3", (1,), "expected one of"),
        ("n", "F32", (-1,), "impossible shape"),
        ("n", "F32", (1 << 48,), "impossible shape"),
        ("n", "F32", (1,) * 17, "impossible shape"),
        ("", "F32", (1,), "cannot be named"),
        ("x" * 1025, "F32", (1,), "cannot be named"),
        ("__metadata__", "F32", (1,), "cannot be named"),
    ],
)
def test_a_tensor_that_cannot_be(name: str, dtype: str, shape: tuple[int, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TensorSpec(name, dtype, shape)


def test_a_schema_does_not_repeat_names() -> None:
    with pytest.raises(ValueError, match="'n' appears twice"):
        Schema((TensorSpec("n", "F32", (1,)), TensorSpec("n", "F16", (1,))))


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path, vector = tmp_path / "m.safetensors", vector_of(MIXED)
    write_model(path, MIXED, vector, {"job": "j", "round": "3"})
    header = read_header(path)
    assert header.schema == read_schema(path) == MIXED
    assert header.metadata == {"job": "j", "round": "3"}
    schema, back = read_vector(path)
    assert schema == MIXED
    exact = {spec.name: (start, stop) for spec, start, stop in MIXED.spans()}
    for name in ("head.weight", "scale"):
        start, stop = exact[name]
        np.testing.assert_array_equal(back[start:stop], vector[start:stop])
    np.testing.assert_allclose(back, vector, rtol=2**-8)


def test_the_package_reads_the_same_numbers(tmp_path: Path) -> None:
    path, vector = tmp_path / "m.safetensors", vector_of(MIXED)
    write_model(path, MIXED, vector, {"b": "1", "a": 'quote " and ü'})
    loaded = safetensors.torch.load_file(path)
    assert loaded.keys() == {spec.name for spec in MIXED.tensors}
    for spec, start, stop in MIXED.spans():
        expected = torch.from_numpy(vector[start:stop]).view(spec.shape).to(TORCH[spec.dtype])
        assert torch.equal(loaded[spec.name], expected), spec  # bf16 and f16 rounded exactly as torch does
    with safetensors.safe_open(path, "np") as opened:
        assert opened.metadata() == {"b": "1", "a": 'quote " and ü'}


def test_what_the_package_writes_is_read(tmp_path: Path) -> None:
    tensors = {
        spec.name: torch.from_numpy(vector_of(MIXED)[start:stop]).view(spec.shape).to(TORCH[spec.dtype])
        for spec, start, stop in MIXED.spans()
    }
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    schema, vector = read_vector(path)
    assert schema == MIXED
    for spec, start, stop in schema.spans():
        np.testing.assert_array_equal(vector[start:stop], tensors[spec.name].float().numpy().ravel())


def test_the_bytes_are_those_of_the_package(tmp_path: Path) -> None:
    vector = vector_of(MIXED)
    write_model(tmp_path / "ours", MIXED, vector, {"format": "pt"})
    tensors = {
        spec.name: torch.from_numpy(vector[start:stop]).view(spec.shape).to(TORCH[spec.dtype])
        for spec, start, stop in MIXED.spans()
    }
    assert (tmp_path / "ours").read_bytes() == safetensors.torch.save(tensors, {"format": "pt"})


def test_equal_inputs_give_equal_bytes(tmp_path: Path) -> None:
    vector = vector_of(MIXED)
    metadata = {f"key{i}": str(i) for i in range(20)}
    write_model(tmp_path / "a", MIXED, vector, metadata)
    write_model(tmp_path / "b", Schema(tuple(reversed(MIXED.tensors))), vector, dict(reversed(metadata.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert model_digest(tmp_path / "a") == model_digest(tmp_path / "b")
    write_model(tmp_path / "b", MIXED, vector, metadata | {"key0": "1"})
    assert model_digest(tmp_path / "a") != model_digest(tmp_path / "b")


@pytest.mark.parametrize("dtype", ["F32", "F64", "F16", "BF16"])
def test_tensors_longer_than_a_tile(tmp_path: Path, dtype: str) -> None:
    schema = Schema((TensorSpec("long", dtype, (3, 100_003)), TensorSpec("z", "F32", (1,))))
    vector = vector_of(schema)
    write_model(tmp_path / "m", schema, vector, {})
    assert torch.equal(
        safetensors.torch.load_file(tmp_path / "m")["long"],
        torch.from_numpy(vector[:-1]).view(3, -1).to(TORCH[dtype]),
    )
    np.testing.assert_allclose(read_vector(tmp_path / "m")[1], vector, rtol=2**-8, atol=1e-7)


@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bf16_rounds_as_torch_does(tmp_path: Path, bits: list[int]) -> None:
    values = np.array(bits, np.uint32).view(np.float32)
    schema = Schema((TensorSpec("x", "BF16", (len(values),)),))
    expected = torch.from_numpy(values).bfloat16()
    if not torch.isfinite(expected).all():
        with pytest.raises(ModelFileError, match="'x'"):
            write_model(tmp_path / "m", schema, values, {})
        return
    write_model(tmp_path / "m", schema, values, {})
    assert torch.equal(safetensors.torch.load_file(tmp_path / "m")["x"], expected)


# --- numbers that are none ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 1, 300_000])
def test_a_number_that_is_not_finite_is_found(bad: float, at: int) -> None:
    vector = np.zeros(300_001, np.float32)
    assert first_non_finite(vector) is None
    vector[at] = bad
    assert first_non_finite(vector) == at


def test_reading_refuses_what_is_not_finite_on_request(tmp_path: Path) -> None:
    path = tmp_path / "m"
    safetensors.numpy.save_file({"a": np.zeros(3, np.float32), "b": np.array([1, np.nan], np.float32)}, path)
    assert np.isnan(read_vector(path)[1][4])
    with pytest.raises(ModelFileError, match="tensor 'b' holds NaN or infinity"):
        read_finite_vector(path)
    safetensors.numpy.save_file({"a": np.zeros(3, np.float32), "c": np.array([1e300])}, path)
    with pytest.raises(ModelFileError, match="tensor 'c'"):
        read_finite_vector(path)
    safetensors.numpy.save_file({"a": np.zeros(3, np.float32)}, path)
    assert read_finite_vector(path)[1].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("dtype", "value", "said"),
    [("F32", np.nan, "NaN"), ("F16", np.inf, "NaN"), ("F16", 70000.0, "beyond F16"), ("BF16", 3.4e38, "beyond BF16")],
)
def test_writing_refuses_and_keeps_what_was_there(tmp_path: Path, dtype: str, value: float, said: str) -> None:
    schema = Schema((TensorSpec("fine", "F32", (1,)), TensorSpec("x", dtype, (2,))))
    path = tmp_path / "m"
    write_model(path, schema, np.zeros(3, np.float32), {})
    before = path.read_bytes()
    with pytest.raises(ModelFileError, match=rf"tensor 'x' .*{said}"):
        write_model(path, schema, np.array([0, 0, value], np.float32), {})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize("vector", [np.zeros(2, np.float32), np.zeros(3), np.zeros((3, 1), np.float32)])
def test_writing_refuses_a_vector_that_does_not_fit(tmp_path: Path, vector: Float32Array) -> None:
    with pytest.raises(ValueError, match=r"the schema takes float32\[3\]"):
        write_model(tmp_path / "m", Schema((TensorSpec("x", "F32", (3,)),)), vector, {})
    assert os.listdir(tmp_path) == []


def test_writing_refuses_an_empty_schema_and_a_huge_header(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one tensor"):
        write_model(tmp_path / "m", Schema(()), np.zeros(0, np.float32), {})
    one = Schema((TensorSpec("x", "F32", (1,)),))
    with pytest.raises(ValueError, match="the header would take"):
        write_model(tmp_path / "m", one, np.zeros(1, np.float32), {"x": "y" * MAX_HEADER_BYTES})


# --- hostile files --------------------------------------------------------------------------------------------------


def entry(begin: int = 0, end: int = 8, *, dtype: object = "F32", shape: object = (2,)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HOSTILE: dict[str, tuple[object, bytes, str]] = {
    "not JSON": (b"{]", b"", "not JSON"),
    "not UTF-8": (b'{"\xff": 1}', b"", "not UTF-8"),
    "not an object": ([], b"", "not a JSON object"),
    "a leading blank": (b' {"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8), "not a JSON object"),
    "deep nesting": (b"[" * 100_000, b"", "not JSON"),
    "an endless number": (b'{"a":' + b"9" * 5000 + b"}", b"", "not JSON"),
    "a NaN": (b'{"a": NaN}', b"", "NaN"),
    "nothing": ({}, b"", "holds no tensors"),
    "metadata alone": ({"__metadata__": {"a": "b"}}, b"", "holds no tensors"),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "a": entry()}, bytes(8), "metadata"),
    "metadata a list": ({"__metadata__": [], "a": entry()}, bytes(8), "metadata"),
    "metadata no Unicode": (
        b'{"__metadata__":{"k":"\\ud800"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        bytes(8),
        "not Unicode",
    ),
    "a name no Unicode": (b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8), "not Unicode"),
    "a duplicate name": (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{}}', bytes(8), "'a' twice"),
    "a duplicate field": (
        b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        bytes(8),
        "'dtype' twice",
    ),
    "integers": ({"n": entry(dtype="I32")}, bytes(8), "'n' is I32: integers are not averaged"),
    "an unknown dtype": ({"n": entry(dtype="F4096")}, bytes(8), "'F4096'"),
    "a dtype of another type": ({"n": entry(dtype=1)}, bytes(8), "malformed"),
    "a field too many": ({"n": entry() | {"x": 1}}, bytes(8), "not described by"),
    "no field": ({"n": {}}, bytes(8), "not described by"),
    "no description": ({"n": 3}, bytes(8), "not described by"),
    "a fractional shape": ({"n": entry(shape=[2.0])}, bytes(8), "malformed"),
    "a negative shape": ({"n": entry(shape=[-2])}, bytes(8), "malformed"),
    "a boolean shape": ({"n": entry(shape=[True, 2])}, bytes(8), "malformed"),
    "a huge shape": ({"n": entry(shape=[1 << 47] * 16)}, bytes(8), "impossible shape"),
    "a shape of many axes": ({"n": entry(shape=[1] * 99)}, bytes(8), "impossible shape"),
    "three offsets": ({"n": entry() | {"data_offsets": [0, 8, 8]}}, bytes(8), "malformed"),
    "offsets out of range": ({"n": entry(0, 8)}, bytes(7), "take 8 bytes, the file has 7"),
    "bytes left over": ({"n": entry(0, 8)}, bytes(9), "take 8 bytes, the file has 9"),
    "a wrong length": ({"n": entry(0, 4)}, bytes(4), "takes 8 bytes, its data_offsets span 4"),
    "backwards": ({"n": entry(8, 0)}, bytes(8), "span -8"),
    "an overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12), "'b' begins at byte 4 instead of 8"),
    "the same place twice": ({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8), "begins at byte 0 instead of 8"),
    "a gap": ({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20), "'b' begins at byte 12 instead of 8"),
    "a gap in front": ({"a": entry(4, 12)}, bytes(12), "begins at byte 4 instead of 0"),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("read", [read_schema, read_vector, read_finite_vector])
def test_a_hostile_file_is_refused_by_name(tmp_path: Path, case: str, read: Callable[[Path], object]) -> None:
    header, data, said = HOSTILE[case]
    path = file_with(tmp_path / "hostile.safetensors", header, data)
    with pytest.raises(ModelFileError, match=r"hostile\.safetensors: not a usable model file") as caught:
        read(path)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path))
    assert isinstance(caught.value, UserError)


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1])
def test_a_huge_header_is_not_read(tmp_path: Path, length: int) -> None:
    path = file_with(tmp_path / "m", b"{}", length=length)
    os.truncate(path, 1 << 40)  # sparse: reading it would take all memory
    with pytest.raises(ModelFileError, match="its header claims"):
        read_schema(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it has 0 bytes, too few"),
        (bytes(7), "it has 7 bytes, too few"),
        (b"\x03" + bytes(7) + b"{}", "claims 3 bytes, the file has 2 after the length: cut short?"),
    ],
)
def test_a_file_cut_short_says_so(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(ModelFileError) as caught:
        read_schema(tmp_path / "m")
    assert said in str(caught.value)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m"
    write_model(path, MIXED, vector_of(MIXED), {"a": "b"})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelFileError):
            read_schema(path)


def test_a_missing_file_is_an_os_error_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        read_vector(tmp_path / "absent")
    assert caught.value.filename == str(tmp_path / "absent")


@given(data=st.data())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_accepted_the_package_accepts_and_reads_alike(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "m"
    write_model(path, MIXED, vector_of(MIXED), {"a": "b"})
    damaged = bytearray(path.read_bytes())
    header_end = 8 + int.from_bytes(damaged[:8], "little")
    replacements = st.sampled_from(b'0123456789[]{},:"abF_ \\')
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(8, header_end - 1))] = data.draw(replacements)
    path.write_bytes(damaged)
    try:
        schema, vector = read_vector(path)
    except ModelFileError:
        return
    loaded = safetensors.torch.load_file(path)
    assert loaded.keys() == {spec.name for spec in schema.tensors}
    for spec, start, stop in schema.spans():
        assert tuple(loaded[spec.name].shape) == spec.shape
        np.testing.assert_array_equal(vector[start:stop], loaded[spec.name].float().numpy().ravel())
