"""Ways to spoil something valid: bytes, protobuf messages, JSON and text. Not a test itself.

Every function takes its `random.Random` and nothing else that varies, so a seed names one input for ever. What comes
out is bounded (`MOST_BYTES`), but for what a length field claims.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

M = TypeVar("M", bound=Message)

MOST_BYTES = 2 << 20
INTEGERS = (0, 1, 2, 127, 128, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1)
FLOATS = (0.0, -0.0, 1.0, -1.0, 5e-324, 1e308, float("inf"), float("-inf"), float("nan"))
TEXTS = (
    "",
    " ",
    "\0",
    "a\0b",
    "../../../../etc/passwd",
    "site-a\u202etxt.exe",
    "\u0430dmin",  # a Cyrillic a
    "e\u0301",
    "\x1b[2J\x1b[1;31m",
    "\r\nevent: forged",
    "\ufeff",
    "\U0010ffff",
    "%s%n{0}",
    "' OR 1=1 --",
    "x" * 300,
    "é" * 70_000,
)
"""Texts that have hurt somebody: control characters, bidirectional overrides, look-alikes, paths, formats, SQL."""


def mutate_bytes(rng: random.Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """One to four changes of the raw bytes."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = rng.choice(_BYTES)(rng, data, others)[:MOST_BYTES]
    return data


def _flip(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    if not data:
        return b"\x00"
    at = rng.randrange(len(data))
    return data[:at] + bytes((data[at] ^ (1 << rng.randrange(8)),)) + data[at + 1 :]


def _truncate(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _splice(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    other = rng.choice(others) if others else data[::-1]
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


def _repeat(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    a, b = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    return data[:b] + data[a:b] * rng.choice((1, 2, 50)) + data[b:]


def _remove(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    a, b = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    return data[:a] + data[b:]


def _inflate_length(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    """A varint of gigabytes, or a fixed-width length, in the place of some bytes."""
    at = rng.randrange(len(data) + 1)
    claims = rng.choice((2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1))
    forms = (varint(claims), (claims % 2**32).to_bytes(4, "big"), claims.to_bytes(8, "little"), b"\xff" * 11)
    form = rng.choice(forms)
    return data[:at] + form + data[at + rng.choice((0, 1, len(form))) :]


def _insert(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.choice((1, 8, 64))) + data[at:]


def _zero(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    a, b = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    return data[:a] + rng.choice((b"\0", b"\xff")) * (b - a) + data[b:]


def _noise(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    return rng.randbytes(rng.randrange(max(2, min(2 * len(data), 4096))))


_BYTES: tuple[Callable[[random.Random, bytes, Sequence[bytes]], bytes], ...] = (
    _flip,
    _flip,
    _flip,
    _truncate,
    _splice,
    _repeat,
    _remove,
    _inflate_length,
    _inflate_length,
    _insert,
    _zero,
    _noise,
)


def varint(value: int) -> bytes:
    """A protobuf varint."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


# --- protobuf -------------------------------------------------------------------------------------------------------


def mutate_message(rng: random.Random, message: M, *, huge: bool = True) -> M:
    """A copy with one to three of its fields, at any depth, changed by reflection."""
    copy = type(message)()
    copy.CopyFrom(message)
    for _ in range(rng.choice((1, 1, 2, 3))):
        _change_a_field(rng, copy, huge=huge)
    return copy


def _change_a_field(rng: random.Random, message: Message, *, huge: bool) -> None:
    present: list[FieldDescriptor] = [field for field, _ in message.ListFields()]
    nested = [f for f in present if f.message_type is not None and not _is_map(f)]
    if nested and rng.random() < 0.75:
        field = rng.choice(nested)
        value = getattr(message, field.name)
        if not field.is_repeated:
            return _change_a_field(rng, value, huge=huge)
        if rng.random() < 0.6:
            return _change_a_field(rng, rng.choice(value), huge=huge)
    fields: list[Any] = present if present and rng.random() < 0.85 else list(message.DESCRIPTOR.fields)
    if not fields:
        return None
    field = rng.choice(fields)
    if rng.random() < 0.15:
        message.ClearField(field.name)
    elif field.is_repeated:
        _change_repeated(rng, message, field, huge=huge)
    elif field.message_type is not None:
        getattr(message, field.name).SetInParent()
    else:
        setattr(message, field.name, _scalar(rng, field, getattr(message, field.name)))
    return None


def _change_repeated(rng: random.Random, message: Message, field: FieldDescriptor, *, huge: bool) -> None:
    values = getattr(message, field.name)
    if _is_map(field):
        values.clear()
        return
    what = rng.choice(("repeat", "shuffle", "drop", "grow", "huge"))
    if what == "shuffle" and values:
        kept = list(values)
        rng.shuffle(kept)
        message.ClearField(field.name)
        getattr(message, field.name).extend(kept)
    elif what == "drop" and values:
        del values[rng.randrange(len(values))]
    elif what == "repeat" and values:
        values.extend([values[rng.randrange(len(values))]] * rng.choice((1, 2, 40)))
    else:
        many = 20_000 if what == "huge" and huge else 1
        if field.message_type is not None:
            for _ in range(many):
                values.add()
        else:
            value = _scalar(rng, field, _PLAIN[field.cpp_type] if field.type != FieldDescriptor.TYPE_BYTES else b"")
            values.extend([value[:100] if isinstance(value, str | bytes) and many > 1 else value] * many)


_PLAIN: dict[int, Any] = {
    FieldDescriptor.CPPTYPE_STRING: "",
    FieldDescriptor.CPPTYPE_DOUBLE: 0.0,
    FieldDescriptor.CPPTYPE_FLOAT: 0.0,
    FieldDescriptor.CPPTYPE_BOOL: False,
    FieldDescriptor.CPPTYPE_UINT32: 0,
    FieldDescriptor.CPPTYPE_UINT64: 0,
    FieldDescriptor.CPPTYPE_ENUM: 0,
}


def _scalar(rng: random.Random, field: FieldDescriptor, value: Any) -> Any:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
            return mutate_bytes(rng, bytes(value))[:70_000]
        case FieldDescriptor.CPPTYPE_STRING:
            return rng.choice((*TEXTS, value + rng.choice(TEXTS), value.upper(), value[:-1]))[:80_000]
        case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
            return rng.choice((*FLOATS, -value, value * 2, value + 1e-9))
        case FieldDescriptor.CPPTYPE_BOOL:
            return not value
        case FieldDescriptor.CPPTYPE_UINT32:
            return rng.choice((*INTEGERS, value + 1, value ^ 1)) % 2**32
        case FieldDescriptor.CPPTYPE_UINT64:
            return rng.choice((*INTEGERS, value + 1, value ^ 1)) % 2**64
        case _:  # enumerations are open: any 32-bit number may arrive
            return rng.choice((0, 1, 2, 3, 99, 2**31 - 1, -1, -(2**31)))


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


# --- JSON and text --------------------------------------------------------------------------------------------------


def mutate_json(rng: random.Random, data: bytes) -> bytes:
    """JSON with something in it replaced by something else, or its text spoilt."""
    if rng.random() < 0.35:
        return mutate_text(rng, data)
    return json.dumps(_change_json(rng, json.loads(data))).encode()


def _change_json(rng: random.Random, value: Any) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        what = rng.random()
        if what < 0.15:
            return {k: v for k, v in value.items() if k != key}
        if what < 0.3:
            return {**value, rng.choice((key.upper(), key[:-1], *TEXTS)): value[key]}
        return {**value, key: _change_json(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.5:
        return [*value, _change_json(rng, value[0])] * rng.choice((1, 1, 300))
    nested: Any = 1
    for _ in range(rng.choice((1, 50, 400))):
        nested = [nested] if rng.random() < 0.5 else {"a": nested}
    plain: tuple[Any, ...] = (None, True, False, [], {}, "", -1, 1.5, 10**400, *INTEGERS, *FLOATS, *TEXTS)
    return nested if rng.random() < 0.1 else rng.choice(plain)


_BITS_OF_TEXT = (
    "[" * 2000,
    "{" * 2000,
    "9" * 5000,
    "-" + "9" * 5000,
    "1e999",
    "NaN",
    "Infinity",
    "nan",
    "inf",
    '"\\ud800"',
    '"""',
    "\0",
    "\ufeff",
    "=",
    "\n[a]\n[a]\n",
    "a.b.c.d = 1\n",
    "1979-13-99",
    "a = {" * 500,
    "x" * 70_000,
)


def mutate_text(rng: random.Random, data: bytes) -> bytes:
    """Text with a troublesome piece put in, in the place of a value or anywhere; or its bytes spoilt."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, data)
    text = data.decode(errors="replace")
    piece = rng.choice((*_BITS_OF_TEXT, *(json.dumps(t) for t in TEXTS), *map(str, INTEGERS)))
    places = [i + 1 for i, c in enumerate(text) if c in "=:,[{"] if rng.random() < 0.7 else []
    at = rng.choice(places) if places else rng.randrange(len(text) + 1)
    end = text.find("\n", at) if rng.random() < 0.6 else at
    return (text[:at] + piece + text[max(at, end) :]).encode()[:MOST_BYTES]
