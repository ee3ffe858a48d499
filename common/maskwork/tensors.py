"""Models as files and as vectors: a safetensors file, its schema, and the flat float32 vector of its tensors.

The order of the flat vector is the order of the names, each tensor in C order. That, and the schema, is all that the
two sides must agree on; the coordinator needs no task code and no torch.

It is NOT a general reader of safetensors: integers, booleans and 8-bit floats are refused, since they are not averaged.
The header is read and written here rather than by the safetensors package for three reasons: equal inputs must give
equal bytes (the package writes several metadata entries in an order that changes from run to run), duplicate names must
be refused, and a tensor must not be in memory twice. Tests hold both directions to the package.

Rules it upholds:

1. Nothing is unpickled, ever. A header is bounded before it is read and checked before a tensor is.
2. A file that is refused is named, with what is wrong with it.
3. What is accepted here the safetensors package accepts too, and reads as the same numbers.
4. A model file exists whole or not at all: temporary name, fsync, rename, fsync of the directory.
5. No NaN and no infinity is ever written.

Format: https://github.com/huggingface/safetensors#format
"""

import hashlib
import itertools
import json
import math
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from maskwork.errors import UserError

Float32Array: TypeAlias = NDArray[np.float32]

MAX_HEADER_BYTES: Final = 16 << 20
"""About 100,000 tensors; the safetensors package stops at 100 MB."""
MAX_RANK: Final = 16
MAX_NAME_BYTES: Final = 1024

ITEM_BYTES: Final[Mapping[str, int]] = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
"""The dtypes that can be federated, by their names in safetensors, in the order in which they lie in a file."""

_NOT_AVERAGED: Final = frozenset(("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"))
_MAX_SIZE: Final = 1 << 48
_TILE: Final = 1 << 18  # coordinates converted at a time: 1 MiB of float32, so that no tensor is held twice
_METADATA: Final = "__metadata__"


class Openable(Protocol):
    """A model that is not simply a file's bytes, such as one that is encrypted at rest; as text, its file's name."""

    def open(self) -> BinaryIO:
        """Open it for reading, from any place in it."""
        ...


class Writable(Protocol):
    """Where a model is written, from its first byte to its last."""

    def write(self, data: bytes, /) -> object:
        """Append."""
        ...


ModelSource: TypeAlias = str | Path | Openable


class ModelFileError(UserError, ValueError):
    """A model file is damaged, hostile, or holds something that cannot be federated; the text names the file."""

    @classmethod
    def about(cls, path: ModelSource, what: str) -> "ModelFileError":
        """The error for a file: its name, then what is wrong with it and what can be done."""
        return cls(f"{path}: {what}")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype (as safetensors spells it: F64, F32, F16, BF16) and shape of one tensor.

    Raises:
        ValueError: On construction, if the dtype cannot be federated, or the name or shape is out of range.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype in _NOT_AVERAGED:
            raise ValueError(
                f"tensor {self.name!r} is {self.dtype}: integers are not averaged; leave it out of the model file"
            )
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"tensor {self.name!r} has dtype {self.dtype!r}, expected one of {', '.join(ITEM_BYTES)}")
        if len(self.shape) > MAX_RANK or min(self.shape, default=0) < 0 or self.size >= _MAX_SIZE:
            raise ValueError(f"tensor {self.name!r} has an impossible shape")
        if self.name == _METADATA or not 0 < len(_utf8(self.name)) <= MAX_NAME_BYTES:
            raise ValueError(f"a tensor cannot be named {self.name[:80]!r}")

    @property
    def size(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.size * ITEM_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.name!r} {self.dtype}{list(self.shape)}"


@dataclass(frozen=True, slots=True)
class Schema:
    """The tensors of a model, by name. Equal schemas mean equal layouts of the flat vector.

    Attributes:
        tensors: In the order of their names, whatever order they were given in.

    Raises:
        ValueError: On construction, if a name is repeated.
    """

    tensors: tuple[TensorSpec, ...]

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.tensors, key=lambda spec: spec.name))
        for left, right in itertools.pairwise(ordered):
            if left.name == right.name:
                raise ValueError(f"tensor {left.name!r} appears twice")
        object.__setattr__(self, "tensors", ordered)

    @property
    def size(self) -> int:
        """Number of coordinates of the flat vector (d)."""
        return sum(spec.size for spec in self.tensors)

    def spans(self) -> Iterator[tuple[TensorSpec, int, int]]:
        """Each tensor with its range [start, stop) of the flat vector, in order."""
        start = 0
        for spec in self.tensors:
            yield spec, start, start + spec.size
            start += spec.size

    def tensor_at(self, coordinate: int) -> TensorSpec:
        """The tensor that a coordinate of the flat vector belongs to.

        Raises:
            IndexError: Beyond the vector.
        """
        for spec, start, stop in self.spans():
            if start <= coordinate < stop:
                return spec
        raise IndexError(f"coordinate {coordinate} of a vector of {self.size}")

    def difference(self, other: "Schema") -> str | None:
        """The first mismatch in words ("here" is this schema, "there" the other one), or None if they are equal."""
        here, there = ({spec.name: spec for spec in schema.tensors} for schema in (self, other))
        for name in sorted(here.keys() | there.keys()):
            if name not in there:
                return f"tensor {here[name]} is here but not there"
            if name not in here:
                return f"tensor {there[name]} is there but not here"
            if here[name] != there[name]:
                return f"tensor {here[name]} here is {there[name].dtype}{list(there[name].shape)} there"
        return None


@dataclass(frozen=True, slots=True)
class ModelHeader:
    """What a model file says before its first tensor.

    Attributes:
        schema: The tensors.
        metadata: Free text by key; nothing in it is trusted.
        offsets: Where each tensor begins, in bytes from the start of the file.
    """

    schema: Schema
    metadata: Mapping[str, str]
    offsets: Mapping[str, int]


def read_header(path: ModelSource) -> ModelHeader:
    """Read and check the header of a model file; no tensor is read.

    Raises:
        ModelFileError: It is not a well-formed safetensors file of floating-point tensors.
        OSError: It cannot be read.
    """
    with _opened(path) as file:
        return _read_header(file, path)


def read_schema(path: ModelSource) -> Schema:
    """The schema of a model file. Raises as `read_header` does."""
    return read_header(path).schema


def read_vector(
    path: ModelSource, *, allocate: Callable[[int], Float32Array] | None = None
) -> tuple[Schema, Float32Array]:
    """The schema of a model file and its flat vector.

    Args:
        path: The file.
        allocate: Gives the vector, float32[n] for n; None: ordinary memory.

    Returns:
        The schema and float32[schema.size]; values of other dtypes are rounded to float32.

    Raises:
        ModelFileError: It is not a well-formed safetensors file of floating-point tensors.
        OSError: It cannot be read.
    """
    with _opened(path) as file:
        header = _read_header(file, path)
        size = header.schema.size
        vector = np.empty(size, np.float32) if allocate is None else allocate(size)
        for start, stop, raw, dtype in _tiles(file, header, path):
            _decode(raw, dtype, vector[start:stop])
    return header.schema, vector


def check_finite(path: ModelSource) -> Schema:
    """As `read_finite_vector`, without the vector: one tile of it is in memory at a time.

    Raises:
        ModelFileError: It is not usable, or holds a NaN or an infinity as float32; the text names the tensor.
        OSError: It cannot be read.
    """
    values = np.empty(_TILE, np.float32)
    with _opened(path) as file:
        header = _read_header(file, path)
        for start, stop, raw, dtype in _tiles(file, header, path):
            tile = values[: stop - start]
            _decode(raw, dtype, tile)
            if (at := first_non_finite(tile)) is not None:
                raise _not_finite(path, header.schema, start + at)
    return header.schema


def read_finite_vector(
    path: ModelSource, *, allocate: Callable[[int], Float32Array] | None = None
) -> tuple[Schema, Float32Array]:
    """As `read_vector`, and every number is finite as float32.

    Raises:
        ModelFileError: Also for a NaN or an infinity; the text names the tensor.
        OSError: It cannot be read.
    """
    schema, vector = read_vector(path, allocate=allocate)
    if (at := first_non_finite(vector)) is not None:
        raise _not_finite(path, schema, at)
    return schema, vector


def _opened(path: ModelSource) -> BinaryIO:
    return Path(path).open("rb") if isinstance(path, str | Path) else path.open()


def _not_finite(path: ModelSource, schema: Schema, coordinate: int) -> ModelFileError:
    return ModelFileError.about(path, f"tensor {schema.tensor_at(coordinate).name!r} holds NaN or infinity")


def first_non_finite(vector: Float32Array) -> int | None:
    """The first coordinate that is NaN or infinite, or None; a mask of one tile is all the memory it takes."""
    for start in range(0, len(vector), _TILE):
        finite = np.isfinite(vector[start : start + _TILE])
        if not finite.all():
            return start + int(np.argmin(finite))
    return None


def write_model(path: str | Path, schema: Schema, vector: Float32Array, metadata: Mapping[str, str]) -> None:
    """Write a model file, whole or not at all. The same arguments always give the same bytes.

    Args:
        path: Where; a file that is there is replaced in one step.
        schema: The tensors.
        vector: float32[schema.size].
        metadata: Free text by key.

    Raises:
        ModelFileError: A value is not finite, or not within the range of its tensor's dtype; nothing was written.
        ValueError: The vector does not fit the schema, the schema is empty, or the header is too large.
        OSError: The disk failed; nothing was written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:64]}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            write_model_to(file, schema, vector, metadata, named=path)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _fsync_directory(path.parent)


def write_model_to(
    file: Writable, schema: Schema, vector: Float32Array, metadata: Mapping[str, str], *, named: ModelSource
) -> None:
    """As `write_model`, in order, into a file that the caller opened; `named` is for errors.

    Raises:
        ModelFileError, ValueError: As `write_model`; what was written by then is of no use.
    """
    if vector.dtype != np.float32 or vector.shape != (schema.size,):
        raise ValueError(f"the schema takes float32[{schema.size}], the vector is {vector.dtype}{list(vector.shape)}")
    file.write(_header_bytes(schema, metadata))
    for spec, start, stop in _layout(schema):
        _write_tensor(file, named, spec, vector[start:stop])


def file_bytes(schema: Schema, metadata: Mapping[str, str]) -> int:
    """How many bytes a model file of this schema and metadata has."""
    return len(_header_bytes(schema, metadata)) + sum(spec.nbytes for spec in schema.tensors)


def model_digest(path: str | Path) -> bytes:
    """SHA-256 of a model file's bytes: 32 bytes.

    Raises:
        OSError: It cannot be read.
    """
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


# --- the header -----------------------------------------------------------------------------------------------------


class _Malformed(ValueError):
    """What is wrong with a header; `_read_header` adds the file."""


def _read_header(file: BinaryIO, path: ModelSource) -> ModelHeader:
    file_size = file.seek(0, os.SEEK_END)
    file.seek(0)
    try:
        length = _header_length(file.read(8), file_size)
        entries = _parse(file.read(length))
        metadata = _parse_metadata(entries.pop(_METADATA, {}))
        placed = [_parse_entry(name, entry) for name, entry in entries.items()]
        _check_placing(placed, data_bytes=file_size - 8 - length)
        schema = Schema(tuple(spec for spec, _, _ in placed))
    except ValueError as error:
        raise ModelFileError.about(path, f"not a usable model file: {error}") from None
    return ModelHeader(schema, metadata, {spec.name: 8 + length + begin for spec, begin, _ in placed})


def _header_length(prefix: bytes, file_size: int) -> int:
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8:
        raise _Malformed(f"it has {file_size} bytes, too few for a safetensors header")
    if length > MAX_HEADER_BYTES:
        raise _Malformed(f"its header claims {length} bytes, over {MAX_HEADER_BYTES}; is it safetensors?")
    if length > file_size - 8:
        raise _Malformed(f"its header claims {length} bytes, the file has {file_size - 8} after the length: cut short?")
    return length


def _parse(header: bytes) -> dict[str, object]:
    try:
        parsed: object = json.loads(header.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except _Malformed:
        raise
    except UnicodeDecodeError:
        raise _Malformed("its header is not UTF-8") from None
    except (ValueError, RecursionError):  # the parser's own words quote the input; it may be anything
        raise _Malformed("its header is not JSON") from None
    if not isinstance(parsed, dict) or not header.startswith(b"{"):
        raise _Malformed("its header is not a JSON object")
    return parsed


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise _Malformed(f"its header has {key[:80]!r} twice")
        found[key] = value
    return found


def _no_constant(name: str) -> object:
    raise _Malformed(f"its header holds {name}, which is not JSON")


def _parse_metadata(entry: object) -> dict[str, str]:
    if not isinstance(entry, dict):
        raise _Malformed("its metadata is not an object of texts")
    metadata: dict[str, str] = {}
    for key, value in entry.items():
        if not isinstance(value, str):
            raise _Malformed("its metadata is not an object of texts")
        _utf8(key), _utf8(value)
        metadata[key] = value
    return metadata


def _parse_entry(name: str, entry: object) -> tuple[TensorSpec, int, int]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _Malformed(f"tensor {name[:80]!r} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], _integers(entry["shape"]), _integers(entry["data_offsets"])
    if not isinstance(dtype, str) or shape is None or offsets is None or len(offsets) != 2:
        raise _Malformed(f"tensor {name[:80]!r} has a malformed dtype, shape or data_offsets")
    spec, (begin, end) = TensorSpec(name, dtype[:16], tuple(shape)), offsets
    if end - begin != spec.nbytes:
        raise _Malformed(f"tensor {spec} takes {spec.nbytes} bytes, its data_offsets span {end - begin}")
    return spec, begin, end


def _integers(value: object) -> list[int] | None:
    if not isinstance(value, list) or any(type(item) is not int or item < 0 for item in value):
        return None
    return value


def _check_placing(placed: Iterable[tuple[TensorSpec, int, int]], *, data_bytes: int) -> None:
    """Tensors lie one after another, without gaps and overlaps, from the end of the header to the end of the file."""
    expected = 0
    ordered = sorted(placed, key=lambda item: item[1:])
    if not ordered:
        raise _Malformed("it holds no tensors")
    for spec, begin, end in ordered:
        if begin != expected:
            raise _Malformed(f"tensor {spec.name!r} begins at byte {begin} instead of {expected}: an overlap or a gap")
        expected = end
    if expected != data_bytes:
        raise _Malformed(f"its tensors take {expected} bytes, the file has {data_bytes} for them: damaged")


def _layout(schema: Schema) -> list[tuple[TensorSpec, int, int]]:
    # Wide items first, as the safetensors package does: every tensor is then aligned for whoever maps the file.
    order = list(ITEM_BYTES)
    return sorted(schema.spans(), key=lambda span: (order.index(span[0].dtype), span[0].name))


def _header_bytes(schema: Schema, metadata: Mapping[str, str]) -> bytes:
    if not schema.tensors:
        raise ValueError("a model file holds at least one tensor")
    header: dict[str, object] = {}
    if metadata:
        header[_METADATA] = dict(sorted(metadata.items()))
    begin = 0
    for spec, _, _ in _layout(schema):
        header[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [begin, begin + spec.nbytes],
        }
        begin += spec.nbytes
    text = _utf8(json.dumps(header, ensure_ascii=False, separators=(",", ":")))
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"the header would take {len(text)} bytes, more than the {MAX_HEADER_BYTES} allowed")
    return len(text).to_bytes(8, "little") + text


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can spell
        raise ValueError("a name or text in it is not Unicode") from None


# --- the numbers ----------------------------------------------------------------------------------------------------


def _tiles(file: BinaryIO, header: ModelHeader, path: ModelSource) -> Iterator[tuple[int, int, bytes, str]]:
    """The bytes of the flat vector's range [start, stop), with their dtype, tile by tile in order."""
    for spec, start, stop in header.schema.spans():
        file.seek(header.offsets[spec.name])
        for at in range(start, stop, _TILE):
            end = min(at + _TILE, stop)
            raw = file.read((end - at) * ITEM_BYTES[spec.dtype])
            if len(raw) != (end - at) * ITEM_BYTES[spec.dtype]:
                raise ModelFileError.about(path, "it became shorter while it was being read")
            yield at, end, raw, spec.dtype


def _decode(raw: bytes, dtype: str, out: Float32Array) -> None:
    match dtype:
        case "F32":
            np.copyto(out, np.frombuffer(raw, "<f4"))
        case "BF16":  # the upper half of a float32
            np.left_shift(np.frombuffer(raw, "<u2"), 16, out=out.view(np.uint32), dtype=np.uint32)
        case _:
            wide = np.frombuffer(raw, "<f8" if dtype == "F64" else "<f2")
            with np.errstate(over="ignore", invalid="ignore"):  # becomes infinite; `read_finite_vector` looks for it
                np.copyto(out, wide, casting="same_kind")


def _encode(values: Float32Array, dtype: str) -> bytes:
    match dtype:
        case "F32":
            return values.astype("<f4", copy=False).tobytes()
        case "F64":
            return values.astype("<f8").tobytes()
        case "F16":
            with np.errstate(over="ignore"):  # found by the caller
                return values.astype("<f2").tobytes()
        case _:  # BF16: to nearest, ties to even, as torch rounds; finite values cannot carry past the exponent
            bits = values.view(np.uint32)
            rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
            return (rounded >> np.uint32(16)).astype("<u2").tobytes()


def _write_tensor(file: Writable, path: ModelSource, spec: TensorSpec, values: Float32Array) -> None:
    back = np.empty(min(_TILE, len(values)), np.float32)
    for at in range(0, len(values), _TILE):
        tile = values[at : at + _TILE]
        if not np.isfinite(tile).all():
            raise ModelFileError.about(path, f"not written: tensor {spec.name!r} would hold NaN or infinity")
        raw = _encode(tile, spec.dtype)
        if ITEM_BYTES[spec.dtype] < 4:
            _decode(raw, spec.dtype, back[: len(tile)])
            if not np.isfinite(back[: len(tile)]).all():
                raise ModelFileError.about(path, f"not written: tensor {spec.name!r} has values beyond {spec.dtype}")
        file.write(raw)


def _fsync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
