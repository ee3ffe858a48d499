"""The reader of revocation lists: what is accepted, each refusal by its cause, and how lists follow each other."""

import hashlib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384
from hypothesis import given
from hypothesis import strategies as st
from tests.revocation.lists import DAY, Extension, list_of, signed_list

from maskwork.errors import StoreError
from maskwork.net.authority import Authority
from maskwork.net.identity import (
    Identity,
    IdentityError,
    IdentityProblem,
    ParticipantVerifier,
    Role,
    TrustRoots,
    serial_bytes,
    to_der,
)
from maskwork.net.kept_list import KeptList
from maskwork.net.revocation import (
    MAX_LIST_BYTES,
    NO_LIST,
    ListProblem,
    Reason,
    RevocationError,
    RevocationList,
)
from maskwork.net.revoking import next_list
from maskwork.net.signed_der import signed_der
from maskwork.wire import codec

NOW = 1_800_000_000.0
AUTHORITY = Authority.create("ward", now=NOW)
ROOTS = AUTHORITY.roots
KEY = ec.generate_private_key(ec.SECP256R1())
LEAF = AUTHORITY.sign(KEY.public_key(), Identity("ward", Role.PARTICIPANT, "site-a"), now=NOW, days=30)
OTHER = AUTHORITY.sign(KEY.public_key(), Identity("ward", Role.PARTICIPANT, "site-b"), now=NOW, days=30)
STRANGER = Authority.create("ward", now=NOW)
GOOD = signed_list(AUTHORITY, 3, [LEAF], now=NOW)
P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


def parse(der: bytes, roots: TrustRoots = ROOTS, now: float = NOW) -> RevocationList:
    return RevocationList.parse(der, roots, now=now)


def problem_of(call: Callable[[], object]) -> ListProblem:
    with pytest.raises(RevocationError) as caught:
        call()
    return caught.value.problem


def test_a_good_list_says_who_is_withdrawn_and_is_what_verification_asks() -> None:
    read = parse(GOOD)
    assert (read.number, read.digest, read.der) == (3, hashlib.sha256(GOOD).digest(), GOOD)
    assert (read.this_update, read.next_update) == (NOW, NOW + 7 * DAY)
    assert serial_bytes(LEAF) in read
    assert serial_bytes(OTHER) not in read
    with pytest.raises(IdentityError) as caught:
        ROOTS.verify(to_der(LEAF), now=NOW, is_revoked=read)
    assert caught.value.problem is IdentityProblem.REVOKED
    assert ROOTS.verify(to_der(OTHER), now=NOW, is_revoked=read).name == "site-b"
    with pytest.raises(ValueError, match="revoked"):
        ParticipantVerifier(ROOTS, "ward", read).verify_participant(to_der(LEAF), NOW)


def test_no_list_withdraws_nobody() -> None:
    assert (NO_LIST.number, NO_LIST.digest) == (0, bytes(32))
    assert serial_bytes(LEAF) not in NO_LIST
    NO_LIST.check_dates(NOW)


@pytest.mark.parametrize(
    ("extension", "reason"),
    [
        ([], Reason.UNSPECIFIED),
        ([(x509.CRLReason(x509.ReasonFlags.key_compromise), False)], Reason.KEY_COMPROMISE),
        ([(x509.CRLReason(x509.ReasonFlags.ca_compromise), False)], Reason.UNSPECIFIED),
    ],
)
def test_each_entry_has_its_date_and_reason(extension: list[Extension], reason: Reason) -> None:
    read = parse(signed_list(AUTHORITY, 1, [LEAF], now=NOW, entry_extensions=extension))
    assert read.revoked[serial_bytes(LEAF)].reason is reason
    assert read.revoked[serial_bytes(LEAF)].at == NOW


def distribution_point() -> Extension:
    point = x509.IssuingDistributionPoint(
        full_name=None,
        relative_name=None,
        only_contains_user_certs=True,
        only_contains_ca_certs=False,
        only_some_reasons=None,
        indirect_crl=False,
        only_contains_attribute_certs=False,
    )
    return point, True


REFUSED: dict[str, tuple[Callable[[], bytes], ListProblem]] = {
    "nothing": (lambda: b"", ListProblem.MALFORMED),
    "a-certificate": (lambda: to_der(LEAF), ListProblem.MALFORMED),
    "signed-by-another-ca-of-that-name": (lambda: signed_list(STRANGER, now=NOW), ListProblem.WRONG_CA),
    "signed-by-a-leaf": (lambda: signed_list(AUTHORITY, now=NOW, key=KEY), ListProblem.WRONG_CA),
    "signed-by-a-leaf-in-its-own-name": (
        lambda: signed_list(AUTHORITY, now=NOW, key=KEY, issuer=LEAF.subject),
        ListProblem.WRONG_CA,
    ),
    "signed-by-the-ca-in-anothers-name": (
        lambda: signed_list(AUTHORITY, now=NOW, issuer=LEAF.subject),
        ListProblem.WRONG_CA,
    ),
    "another-hash": (lambda: signed_list(AUTHORITY, now=NOW, algorithm=SHA384()), ListProblem.MALFORMED),
    "no-number": (lambda: signed_list(AUTHORITY, None, now=NOW), ListProblem.MALFORMED),
    "number-zero": (lambda: signed_list(AUTHORITY, 0, now=NOW), ListProblem.MALFORMED),
    "a-number-of-2^63": (lambda: signed_list(AUTHORITY, 1 << 63, now=NOW), ListProblem.MALFORMED),
    "a-delta-list": (
        lambda: signed_list(AUTHORITY, now=NOW, extensions=[(x509.DeltaCRLIndicator(1), True)]),
        ListProblem.MALFORMED,
    ),
    "a-list-of-a-part": (
        lambda: signed_list(AUTHORITY, now=NOW, extensions=[distribution_point()]),
        ListProblem.MALFORMED,
    ),
    "an-entry-for-another-issuer": (
        lambda: signed_list(
            AUTHORITY,
            1,
            [LEAF],
            now=NOW,
            entry_extensions=[(x509.CertificateIssuer([x509.DirectoryName(LEAF.subject)]), True)],
        ),
        ListProblem.MALFORMED,
    ),
    "an-entry-twice": (lambda: signed_list(AUTHORITY, 1, [LEAF, LEAF], now=NOW), ListProblem.MALFORMED),
    "too-long": (lambda: bytes(MAX_LIST_BYTES + 1), ListProblem.TOO_LONG),
    "one-byte-more": (lambda: GOOD + b"\0", ListProblem.MALFORMED),
    "truncated": (lambda: GOOD[:-1], ListProblem.MALFORMED),
}


@pytest.mark.parametrize(("make", "problem"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(make: Callable[[], bytes], problem: ListProblem) -> None:
    der = make()
    assert problem_of(lambda: parse(der)) is problem


@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
def test_no_byte_can_change(at: int, by: int) -> None:
    altered = bytearray(GOOD)
    altered[at] ^= by
    problem_of(lambda: parse(bytes(altered)))


@given(st.integers(0, len(GOOD) - 1))
def test_no_beginning_of_a_list_is_a_list(length: int) -> None:
    assert problem_of(lambda: parse(GOOD[:length])) is ListProblem.MALFORMED


@given(st.binary(max_size=300))
def test_noise_is_refused_as_malformed(noise: bytes) -> None:
    assert problem_of(lambda: parse(noise)) is ListProblem.MALFORMED


def test_the_other_form_of_the_signature_is_another_list_under_the_same_number() -> None:
    # (r, s) and (r, -s) both verify, and nothing that a CA does can prevent it: so the digest decides.
    crl = x509.load_der_x509_crl(GOOD)
    r, s = decode_dss_signature(crl.signature)
    twin = parse(signed_der(crl.tbs_certlist_bytes, encode_dss_signature(r, P256_ORDER - s)))
    assert twin.serials == parse(GOOD).serials
    assert problem_of(lambda: twin.check_follows(3, parse(GOOD).digest)) is ListProblem.EQUIVOCATION


def test_twenty_thousand_entries_are_read() -> None:
    serials = [(7 << 150) + number for number in range(20_000)]
    made = signed_list(
        AUTHORITY, now=NOW, serials=serials, entry_extensions=[(x509.CRLReason(x509.ReasonFlags.superseded), False)]
    )
    assert len(made) < MAX_LIST_BYTES // 3
    read = parse(made)
    assert len(read.serials) == 20_000
    assert serials[19_999].to_bytes(20, "big") in read


def test_both_readers_have_the_same_bound() -> None:
    assert codec.MAX_REVOCATION_LIST_BYTES == MAX_LIST_BYTES


# --- dates and numbers ----------------------------------------------------------------------------------------------


def test_a_list_is_current_from_its_date_to_its_next_update() -> None:
    read = parse(GOOD)
    for now in (NOW - 299, NOW, NOW + 7 * DAY):
        read.check_dates(now)
    assert problem_of(lambda: read.check_dates(NOW - 301)) is ListProblem.NOT_YET
    assert problem_of(lambda: read.check_dates(NOW + 7 * DAY + 1)) is ListProblem.EXPIRED


def test_a_list_without_a_next_update_or_with_one_before_itself_is_refused() -> None:
    # OpenSSL's own tool makes such lists; the builder here cannot, so one is cut out by hand.
    crl = x509.load_der_x509_crl(GOOD)
    due = datetime.fromtimestamp(NOW + 7 * DAY, UTC).strftime("%y%m%d%H%M%SZ").encode()
    begun = datetime.fromtimestamp(NOW, UTC).strftime("%y%m%d%H%M%SZ").encode()
    signed = crl.tbs_certlist_bytes
    same = signed.replace(due, begun)
    assert same != signed
    der = signed_der(same, AUTHORITY.key.sign(same, ec.ECDSA(crl.signature_hash_algorithm)))  # type: ignore[arg-type]
    assert problem_of(lambda: parse(der)) is ListProblem.MALFORMED
    field = b"\x17\x0d" + due
    assert signed[:2] == b"\x30\x81"  # SEQUENCE, and a length in one byte
    without = signed[:2] + bytes([signed[2] - len(field)]) + signed[3:].replace(field, b"")
    der = signed_der(without, AUTHORITY.key.sign(without, ec.ECDSA(crl.signature_hash_algorithm)))  # type: ignore[arg-type]
    assert x509.load_der_x509_crl(der).next_update_utc is None
    assert problem_of(lambda: parse(der)) is ListProblem.MALFORMED


def test_numbers_never_go_back_and_one_number_is_one_list() -> None:
    five = list_of(AUTHORITY, 5, now=NOW)
    five.check_follows(0, None)
    five.check_follows(4, bytes(32))
    five.check_follows(5, five.digest)
    five.check_follows(5, None)
    assert problem_of(lambda: five.check_follows(6, None)) is ListProblem.OLDER
    assert problem_of(lambda: five.check_follows(5, bytes(32))) is ListProblem.EQUIVOCATION
    assert problem_of(lambda: NO_LIST.check_follows(1, None)) is ListProblem.OLDER


# --- two roots ------------------------------------------------------------------------------------------------------


def test_either_of_two_roots_may_sign_for_the_certificates_of_both() -> None:
    both = TrustRoots([AUTHORITY.certificate, STRANGER.certificate])
    theirs = STRANGER.sign(KEY.public_key(), Identity("ward", Role.PARTICIPANT, "site-c"), now=NOW, days=30)
    for signer in (AUTHORITY, STRANGER):
        read = parse(signed_list(signer, 2, [LEAF, theirs], now=NOW), both)
        for certificate in (LEAF, theirs):
            with pytest.raises(IdentityError, match="revoked"):
                both.verify(to_der(certificate), now=NOW, is_revoked=read)


def test_a_root_that_has_expired_signs_no_lists_but_stops_nobody_else() -> None:
    old = Authority.create("ward", now=NOW - 400 * DAY, days=300)
    both = TrustRoots([old.certificate, AUTHORITY.certificate])
    assert problem_of(lambda: parse(signed_list(old, now=NOW), both)) is ListProblem.WRONG_CA
    assert parse(GOOD, both).number == 3
    both.check_validity(NOW)
    (said,) = both.out_of_date(NOW)
    assert "expired" in said
    assert both.verify(to_der(LEAF), now=NOW).name == "site-a"
    with pytest.raises(IdentityError, match="expired"):
        TrustRoots([old.certificate]).check_validity(NOW)


def test_a_changed_list_of_the_own_ca_is_told_from_one_of_another(tmp_path: Path) -> None:
    made = next_list(AUTHORITY, tmp_path, now=NOW, withdrawn={serial_bytes(LEAF): Reason.UNSPECIFIED}).der
    changed = made.replace(serial_bytes(LEAF), bytes([1]) + serial_bytes(LEAF)[1:])
    assert changed != made
    assert problem_of(lambda: parse(changed)) is ListProblem.MALFORMED
    assert problem_of(lambda: parse(made, TrustRoots([STRANGER.certificate]))) is ListProblem.WRONG_CA
    assert problem_of(lambda: parse(changed, TrustRoots([STRANGER.certificate]))) is ListProblem.WRONG_CA


# --- the newest list on the disk --------------------------------------------------------------------------------------


def test_what_was_kept_is_there_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "state" / "revoked.crl"
    kept = KeptList(path, ROOTS, now=NOW)
    assert (kept.current, kept.problem) == (NO_LIST, "")
    five = list_of(AUTHORITY, 5, LEAF, now=NOW)
    kept.keep(five)
    kept.keep(five)
    assert serial_bytes(LEAF) in kept
    again = KeptList(path, ROOTS, now=NOW)
    assert again.current == five
    assert problem_of(lambda: again.keep(list_of(AUTHORITY, 4, now=NOW))) is ListProblem.OLDER
    assert problem_of(lambda: again.keep(list_of(AUTHORITY, 5, now=NOW))) is ListProblem.EQUIVOCATION
    assert again.current == five
    again.keep(list_of(AUTHORITY, 7, now=NOW))
    assert KeptList(path, ROOTS, now=NOW).current.number == 7


def test_a_kept_list_that_cannot_be_relied_upon_is_told_and_left_aside(tmp_path: Path) -> None:
    path = tmp_path / "revoked.crl"
    path.write_bytes(GOOD[:-3])
    kept = KeptList(path, ROOTS, now=NOW)
    assert kept.current is NO_LIST
    assert str(path) in kept.problem
    assert kept.damaged
    path.write_bytes(signed_list(STRANGER, now=NOW))
    kept = KeptList(path, ROOTS, now=NOW)
    assert (kept.current, kept.damaged) == (NO_LIST, False)
    assert "not signed by a CA that is trusted here" in kept.problem
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError, match="folder"):
        KeptList(tmp_path / "folder", ROOTS, now=NOW)


def test_a_list_that_the_disk_does_not_take_is_not_in_force(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("in the way")
    kept = KeptList.__new__(KeptList)
    kept._path, kept.current, kept.problem = tmp_path / "state" / "revoked.crl", NO_LIST, ""
    with pytest.raises(StoreError, match=r"revoked\.crl"):
        kept.keep(list_of(AUTHORITY, 1, LEAF, now=NOW))
    assert kept.current is NO_LIST
