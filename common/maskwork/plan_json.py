"""Plans as JSON, for people and for tools that read logs: every field by its name, bytes in hexadecimal.

It is NOT what travels or is signed: that is `maskwork.wire.plan_codec`'s, byte for byte. A plan that is read here and
encoded there gives the very bytes again, so a session id can be checked from the JSON alone.

Rules
1. Both directions: `plan_of_json(canonical_json(plan)) == plan`, and there is one canonical form of each plan.
2. Reading takes any order and white space, and nothing else: unknown, missing and repeated keys, other types, and plans
   that contradict themselves are refused, with the place named.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from enum import Enum
from typing import Final, cast, get_args, get_origin, get_type_hints

from maskwork.secagg.plan import RoundPlan

MAX_JSON_BYTES: Final = 16 << 20
"""A roster of 20,000 takes about 3 MB, indented."""

_HEXADECIMAL: Final = re.compile(r"(?:[0-9a-f]{2})*")


class PlanJsonError(ValueError):
    """A text is not a plan as JSON; says where."""


def canonical_json(plan: RoundPlan) -> bytes:
    """The one form of a plan: sorted keys, no white space, shortest numbers that read back equal."""
    return json.dumps(_plain(plan), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def readable_json(plan: RoundPlan) -> str:
    """The same for people: indented, fields in the order of docs/protocol.md."""
    return json.dumps(_plain(plan), indent=2, allow_nan=False) + "\n"


def plan_of_json(data: bytes) -> RoundPlan:
    """The plan in some JSON.

    Raises:
        PlanJsonError: it is none; the text names the field.
    """
    if len(data) > MAX_JSON_BYTES:
        raise PlanJsonError(f"{len(data)} bytes, at most {MAX_JSON_BYTES} are read")
    try:
        found = json.loads(data, object_pairs_hook=_object, parse_constant=_no_constant)
    except PlanJsonError:
        raise
    except RecursionError:
        raise PlanJsonError("nested too deeply") from None
    except ValueError as error:
        raise PlanJsonError(f"no JSON: {error}") from error
    try:
        return cast("RoundPlan", _read(RoundPlan, found, "the plan"))
    except PlanJsonError:
        raise
    except ValueError as error:  # of the plan itself: out of range, or it contradicts itself
        raise PlanJsonError(str(error)) from error


def _plain(value: object) -> object:
    match value:
        case bytes():
            return value.hex()
        case Enum():
            return value.name.lower()
        case tuple():
            return [_plain(item) for item in value]
        case str() | int() | float():
            return value
        case _:
            assert dataclasses.is_dataclass(value)
            return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise PlanJsonError(f"{key[:80]!r} comes twice")
    return found


def _no_constant(text: str) -> object:
    raise PlanJsonError(f"{text} is no number")


def _read(kind: object, value: object, where: str) -> object:
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise PlanJsonError(f"{where}: not a list")
        item = get_args(kind)[0]
        return tuple(_read(item, each, f"{where}[{number}]") for number, each in enumerate(value))
    assert isinstance(kind, type)
    if dataclasses.is_dataclass(kind):
        return _read_fields(kind, value, where)
    if issubclass(kind, Enum):
        names = {member.name.lower(): member for member in kind}
        if not isinstance(value, str) or value not in names:
            raise PlanJsonError(f"{where}: not one of {', '.join(names)}")
        return names[value]
    if kind is bytes:
        return _bytes(value, where)
    if kind is float:
        return _float(value, where)
    assert kind in (int, str)
    if type(value) is not kind:  # a bool is an int, and no number here
        raise PlanJsonError(f"{where}: not {'a whole number' if kind is int else 'a text'}")
    return value


def _read_fields(kind: type, value: object, where: str) -> object:
    if not isinstance(value, dict):
        raise PlanJsonError(f"{where}: not an object")
    hints = get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    unknown, missing = [key for key in value if key not in names], [name for name in names if name not in value]
    if unknown:
        raise PlanJsonError(f"{where}: no such field: {unknown[0][:80]}")
    if missing:
        raise PlanJsonError(f"{where}: {missing[0]} is missing")
    found = {
        name: _read(hints[name], value[name], name if where == "the plan" else f"{where}.{name}") for name in names
    }
    made: object = kind(**found)
    return made


def _bytes(value: object, where: str) -> bytes:
    if not isinstance(value, str) or _HEXADECIMAL.fullmatch(value) is None:
        raise PlanJsonError(f"{where}: not bytes in lower-case hexadecimal")
    return bytes.fromhex(value)


def _float(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PlanJsonError(f"{where}: not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise PlanJsonError(f"{where}: not a finite number")
    return number
