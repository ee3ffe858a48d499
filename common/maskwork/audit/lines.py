"""A record as it lies in a log: one line of canonical JSON, with the chain's head after it and the owner's signature.

    {"head":"…","record":{"at":…,"data":{…},"index":…,"kind":"…"},"signature":"…"}

What is chained is the bytes of the inner object exactly as they stand in the line, so nobody has to agree about how
JSON is written; that they are canonical is checked all the same, so that two readers cannot understand one line in two
ways. Every line carries a signed head: a record that was changed is found at its own place.

It judges no signature and knows no order: `verify` does.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from pydantic import ValidationError

from maskwork.audit import chain
from maskwork.audit.chain import SignedHead
from maskwork.audit.records import KINDS, Record

_OPENING = b'{"head":"'
_BEFORE_RECORD = b'","record":'
_BEFORE_SIGNATURE = b',"signature":"'
_CLOSING = b'"}'
_RECORD_AT = len(_OPENING) + 64 + len(_BEFORE_RECORD)
_SIGNATURE_AT = 128 + len(_CLOSING)
_MAX_INDEX = 1 << 62  # heads and signatures cover it, and the one after it, in eight bytes
_MAX_AT = 253_402_300_799  # the last second of the year 9999: what a date can be made of


class LineError(ValueError):
    """A line is not one of a log; the text says how."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line, read.

    Attributes:
        index: the number that the record gives itself.
        at: when it was written, Unix time in seconds, by its writer's clock.
        kind: its kind.
        record: what it says.
        digest: SHA-256 of the record's bytes.
        signed: the head that stands with it.
    """

    index: int
    at: float
    kind: str
    record: Record
    digest: bytes
    signed: SignedHead


def record_bytes(record: Record, *, index: int, at: float) -> bytes:
    """The canonical bytes of a record at its place."""
    data = record.model_dump(mode="json")
    return _canonical({"at": at, "data": data, "index": index, "kind": record.KIND})


def encode_line(record: bytes, signed: SignedHead) -> bytes:
    """A line, its end included."""
    signature = signed.signature.hex().encode()
    return b"".join(
        (
            _OPENING,
            signed.head.hex().encode(),
            _BEFORE_RECORD,
            record,
            _BEFORE_SIGNATURE,
            signature,
            _CLOSING,
            b"\n",
        )
    )


def split_line(line: bytes) -> tuple[bytes, bytes, bytes]:
    """A line's record, head and signature, without looking into the record.

    Raises:
        LineError: it has another shape.
    """
    body = line.removesuffix(b"\n")
    framed = (
        body[: len(_OPENING)] == _OPENING
        and body[_RECORD_AT - len(_BEFORE_RECORD) : _RECORD_AT] == _BEFORE_RECORD
        and body[-_SIGNATURE_AT - len(_BEFORE_SIGNATURE) : -_SIGNATURE_AT] == _BEFORE_SIGNATURE
        and body[-len(_CLOSING) :] == _CLOSING
        and line.endswith(b"\n")
    )
    if not framed:
        raise LineError("not a line of a log: head, record and signature are not where they should be")
    head = body[len(_OPENING) : len(_OPENING) + 64]
    signature = body[-_SIGNATURE_AT : -len(_CLOSING)]
    record = body[_RECORD_AT : -_SIGNATURE_AT - len(_BEFORE_SIGNATURE)]
    try:
        if head != head.lower() or signature != signature.lower():
            raise ValueError("upper case")
        return record, bytes.fromhex(head.decode("ascii")), bytes.fromhex(signature.decode("ascii"))
    except ValueError:
        raise LineError("not a line of a log: head or signature is not lower-case hexadecimal") from None


def decode_line(line: bytes) -> Entry:
    """Read a line.

    Raises:
        LineError: it is not one, is not canonical, or holds a record of a kind or form that is not known.
    """
    data, head, signature = split_line(line)
    try:
        told = json.loads(data)
        canonical = _canonical(told) == data
        if b"\\ud" in data:  # half of a pair of surrogates is no text: it could be neither printed nor encoded
            json.dumps(told, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise LineError("the record is not JSON") from None
    if not canonical or not isinstance(told, dict) or told.keys() != {"at", "data", "index", "kind"}:
        raise LineError("the record is not in canonical form")
    index, at, name = told["index"], told["at"], told["kind"]
    if type(index) is not int or type(at) not in (int, float) or not isinstance(name, str):
        raise LineError("the record has no index, time or kind")
    if not 0 <= index <= _MAX_INDEX or not 0 <= at <= _MAX_AT:
        raise LineError("the record's index or time is out of range")
    kind = KINDS.get(name)
    if kind is None:
        raise LineError(f"a record of kind {name[:40]!a}, which this version does not know")
    try:
        record = kind.model_validate(told["data"])
    except ValidationError as error:
        raise LineError(f"a record of kind {name} that is not well-formed: {_first_of(error)}") from None
    return Entry(index, float(at), name, record, chain.record_digest(data), SignedHead(index + 1, head, signature))


def _first_of(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(str(part)[:40] for part in problem['loc'])}: {problem['msg'][:100]}"


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
