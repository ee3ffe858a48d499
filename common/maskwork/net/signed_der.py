"""The one valid encoding of what a federation's CA signed: a certificate (RFC 5280 section 4.1) or a list (5.1).

Both are SEQUENCE { what is signed, algorithm, signature }, and everybody here signs with ECDSA and SHA-256. Parsers
forgive what nothing signs, for one a wrong count of unused bits in the signature; whoever wants one encoding only
builds it again from its parts, and compares. This module verifies no signature.
"""

from typing import Final

# SEQUENCE { OID ecdsa-with-SHA256 }, the one signature algorithm of a federation (RFC 5758 section 3.2).
_ECDSA_WITH_SHA256_DER: Final = bytes.fromhex("300a06082a8648ce3d040302")


def signed_der(signed: bytes, signature: bytes) -> bytes:
    """The DER of a certificate or a list from what is signed and the signature."""
    bit_string = _tagged(0x03, b"\x00" + signature)
    return _tagged(0x30, signed + _ECDSA_WITH_SHA256_DER + bit_string)


def _tagged(tag: int, content: bytes) -> bytes:
    length = len(content)
    if length < 0x80:
        return bytes((tag, length)) + content
    octets = length.to_bytes((length.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(octets))) + octets + content
