"""`maskwork pki list`, `revoke`, `refresh-list`, `successor` and `take-over`, from the shell's side."""

import json
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography import x509
from tests.cli.test_pki_commands import Shell

from maskwork.net.authority import Authority
from maskwork.net.identity import Identity, Role, TrustRoots, load_certificate, serial_bytes
from maskwork.net.register import Register, RegisterError
from maskwork.net.revocation import NO_LIST, Reason, RevocationList
from maskwork.net.revoking import RevokingError, current_list, next_list, take_over

LONG_AGO = 1_600_000_000.0


@pytest.fixture
def pki(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Shell:
    shell = Shell(capsys, tmp_path)
    assert shell("init", "--federation", "ward", "--out", "@ca")[0] == 0
    return shell


def issue(pki: Shell, name: str, *, role: str = "participant", ca: str = "@ca", out: str = "", days: int = 100) -> str:
    """Issue a certificate; returns its serial number in hex."""
    out = out or f"@{name}"
    code, said = pki("issue", role, name, "--ca", ca, "--out", out, "--days", str(days), "--force")
    assert code == 0, said
    return serial_bytes(load_certificate(pki.home / out[1:] / "cert.pem")).hex()


def list_in(pki: Shell, ca: str) -> RevocationList:
    roots = Authority.load(pki.home / ca).roots
    return current_list(pki.home / ca, roots, now=time.time())


def test_whatever_is_issued_is_on_the_register(pki: Shell) -> None:
    serials = {issue(pki, "site-a"), issue(pki, "site-b"), issue(pki, "site-a", out="@again")}
    kept = pki.home / "ca" / "issued"
    assert {path.stem for path in kept.iterdir()} == serials
    for path in kept.iterdir():
        assert b"PRIVATE" not in path.read_bytes()
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
    code, said = pki("list", "--ca", "@ca")
    assert code == 0
    assert said.count("site-a") == 2
    assert said.count("site-b") == 1
    assert "no revocation list yet" in said


def test_an_identity_that_is_not_written_is_not_registered(pki: Shell) -> None:
    issue(pki, "site-a")
    code, said = pki("issue", "participant", "site-b", "--ca", "@ca", "--out", "@site-a")
    assert (code, "--force" in said) == (1, True)
    assert len(list((pki.home / "ca" / "issued").iterdir())) == 1


def test_a_certificate_that_cannot_be_registered_is_not_handed_out(pki: Shell) -> None:
    (pki.home / "ca" / "issued").write_text("in the way")
    code, said = pki("issue", "participant", "site-a", "--ca", "@ca", "--out", "@site-a")
    assert (code, "issued" in said) == (1, True)
    assert not (pki.home / "site-a").exists()


def test_the_list_says_who_until_when_and_revoked_when_and_why(pki: Shell) -> None:
    good, soon = issue(pki, "site-a"), issue(pki, "site-b", days=7)
    revoked = issue(pki, "site-c")
    authority = Authority.load(pki.home / "ca")
    old = Authority("ward", _backdated_ca(authority), authority.key)
    key = load_certificate(pki.home / "site-a" / "cert.pem").public_key()
    expired = old.sign(key, Identity("ward", Role.PARTICIPANT, "site-d"), now=LONG_AGO, days=5)  # type: ignore[arg-type]
    Register(pki.home / "ca").record(expired)
    assert pki("revoke", "site-c", "--ca", "@ca", "--reason", "key-compromise")[0] == 0

    code, said = pki("list", "--ca", "@ca", "--json")
    assert code == 0
    told = json.loads(said)
    found = {line["serial"]: line for line in told["certificates"]}
    assert {serial: line["status"] for serial, line in found.items()} == {
        good: "good",
        soon: "soon",
        revoked: "revoked",
        serial_bytes(expired).hex(): "expired",
    }
    assert (found[revoked]["reason"], found[revoked]["identity"]) == (
        "key-compromise",
        "spiffe://ward/participant/site-c",
    )
    assert found[revoked]["revoked_at"].endswith("Z")
    assert found[good]["revoked_at"] is None
    assert (told["list"]["number"], len(told["list"]["digest"])) == (1, 64)
    code, said = pki("list", "--ca", "@ca")
    for word in ("soon", "expired", "key-compromise", "revocation list 1 of"):
        assert word in said


def _backdated_ca(authority: Authority) -> x509.Certificate:
    """The same CA in a certificate that is older, so that it could have issued what has expired meanwhile."""
    return Authority.create("ward", now=LONG_AGO).certificate


def test_revoking_a_name_revokes_every_unexpired_certificate_of_it(pki: Shell) -> None:
    both = {issue(pki, "site-a"), issue(pki, "site-a", out="@again")}
    other = issue(pki, "site-b")
    code, said = pki("revoke", "site-a", "--ca", "@ca")
    assert code == 0
    assert "2 certificates" in said
    made = list_in(pki, "ca")
    assert made.number == 1
    assert {serial.hex() for serial in made.serials} == both
    code, said = pki("revoke", "site-a", "--ca", "@ca")
    assert (code, "already" in said) == (1, True)
    third = issue(pki, "site-a", out="@third")
    assert pki("revoke", "site-a", "--ca", "@ca", "--reason", "superseded")[0] == 0
    made = list_in(pki, "ca")
    assert made.number == 2
    assert {serial.hex() for serial in made.serials} == {*both, third}
    assert made.revoked[bytes.fromhex(third)].reason is Reason.SUPERSEDED
    assert {made.revoked[bytes.fromhex(one)].reason for one in both} == {Reason.UNSPECIFIED}  # as it was
    assert pki("revoke", "--serial", other.upper(), "--ca", "@ca")[0] == 0
    assert bytes.fromhex(other) in list_in(pki, "ca")


def test_mistakes_in_revoking_change_nothing(pki: Shell) -> None:
    issue(pki, "x")
    issue(pki, "x", role="operator", out="@o")
    for arguments, expected in (
        (("x",), "--role"),
        (("nobody",), "no unexpired certificate of 'nobody'"),
        ((), "NAME"),
        (("x", "--serial", "12"), "not both"),
        (("--serial", "xyz"), "no serial number"),
        (("--serial", "-5"), "no serial number"),
        (("--serial", "f" * 41), "no serial number"),
    ):
        code, said = pki("revoke", *arguments, "--ca", "@ca")
        assert (code, expected in said) == (1, True), said
    assert list_in(pki, "ca") is NO_LIST
    assert pki("revoke", "x", "--role", "operator", "--ca", "@ca")[0] == 0
    assert len(list_in(pki, "ca").serials) == 1


@pytest.mark.parametrize("serial", ["0", "00:00", "f" * 40, "1" * 41, "12_34", "0x12", "-1", "+1"])
def test_a_number_that_no_certificate_can_have_is_no_serial_number(pki: Shell, serial: str) -> None:
    code, said = pki("revoke", f"--serial={serial}", "--ca", "@ca")
    assert (code, "no serial number" in said) == (1, True), said
    assert list_in(pki, "ca") == NO_LIST


def test_lists_that_are_made_at_once_lose_nothing_and_have_a_number_each(pki: Shell) -> None:
    ca = pki.home / "ca"
    authority = Authority.load(ca)
    serials = [bytes([1, *([0] * 18), n]) for n in range(16)]

    def withdraw(serial: bytes) -> int:
        return next_list(authority, ca, now=time.time(), withdrawn={serial: Reason.UNSPECIFIED}).number

    with ThreadPoolExecutor(max_workers=8) as at_once:
        numbers = sorted(at_once.map(withdraw, serials))
    assert numbers == list(range(1, 17))
    assert list_in(pki, "ca").serials == frozenset(serials)


def test_of_two_successors_only_one_takes_over(pki: Shell) -> None:
    for out in ("@ca-2", "@ca-3"):
        assert pki("successor", "--ca", "@ca", "--out", out)[0] == 0
        (pki.home / "ca" / "roots.pem").unlink()  # as who begins anew, but forgets the successor of before
    assert pki("take-over", "--ca", "@ca-2", "--old", "@ca")[0] == 0
    code, said = pki("take-over", "--ca", "@ca-3", "--old", "@ca")
    assert (code, "replaced by another than the CA in" in said) == (1, True), said
    assert pki("issue", "participant", "x", "--ca", "@ca-3", "--out", "@x")[0] == 1
    assert pki("refresh-list", "--ca", "@ca-3")[0] == 1
    assert not (pki.home / "ca-3" / "revoked.crl").exists()


def test_a_number_after_which_there_would_be_none_is_not_given(pki: Shell) -> None:
    code, said = pki("refresh-list", "--ca", "@ca", "--number-above", str(2**63 - 2))
    assert (code, "take no lower one" in said) == (1, True), said
    assert list_in(pki, "ca") == NO_LIST


def test_a_serial_number_that_is_not_on_the_register_is_shown_too(pki: Shell) -> None:
    code, said = pki("revoke", "--serial", "ab", "--ca", "@ca")
    assert (code, "not on the register: compare it" in said) == (0, True)
    code, said = pki("list", "--ca", "@ca")
    assert code == 0
    assert "not on the register" in said
    assert "ab".rjust(40, "0") in said


def test_show_prints_the_serial_number_that_revoke_takes(pki: Shell) -> None:
    serial = issue(pki, "site-a")
    assert serial in pki("show", "@site-a")[1]


def test_a_refreshed_list_has_a_new_number_and_new_dates_and_nobody_new(pki: Shell) -> None:
    issue(pki, "site-a")
    assert pki("revoke", "site-a", "--ca", "@ca")[0] == 0
    before = list_in(pki, "ca")
    assert pki("refresh-list", "--ca", "@ca", "--days", "30")[0] == 0
    after = list_in(pki, "ca")
    assert (after.number, after.revoked) == (2, before.revoked)
    assert after.next_update - after.this_update == 30 * 86400
    assert before.next_update - before.this_update == 7 * 86400
    assert pki("refresh-list", "--ca", "@ca", "--number-above", "17")[0] == 0
    assert list_in(pki, "ca").number == 18
    assert pki("refresh-list", "--ca", "@ca", "--number-above", "3")[0] == 0
    assert list_in(pki, "ca").number == 19


def test_a_newest_list_that_cannot_be_read_stops_the_next_one(pki: Shell) -> None:
    assert pki("refresh-list", "--ca", "@ca")[0] == 0
    path = pki.home / "ca" / "revoked.crl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    code, said = pki("refresh-list", "--ca", "@ca")
    assert (code, "needs its number" in said) == (1, True)
    assert path.read_bytes() == whole[:-1]


def test_an_overdue_list_is_told(pki: Shell) -> None:
    authority = Authority.load(pki.home / "ca")
    older = Authority.create("ward", now=LONG_AGO)
    older.write(pki.home / "old")
    next_list(Authority.load(pki.home / "old"), pki.home / "old", now=LONG_AGO)
    assert "overdue" in pki("list", "--ca", "@old")[1]
    assert authority.federation == "ward"


def test_a_register_with_something_else_in_it_is_refused(pki: Shell) -> None:
    issue(pki, "site-a")
    (pki.home / "ca" / "issued" / "note.pem").write_text("hello")
    code, said = pki("list", "--ca", "@ca")
    assert (code, "note.pem" in said) == (1, True)


# --- one CA after the other -------------------------------------------------------------------------------------------


def test_a_rollover_from_one_ca_to_the_next(pki: Shell) -> None:
    home = pki.home
    before = issue(pki, "site-a")
    assert pki("revoke", "site-a", "--ca", "@ca")[0] == 0
    assert pki("successor", "--ca", "@ca", "--out", "@ca-2")[0] == 0

    # Until it takes over the old one signs, and what it hands out trusts both.
    issue(pki, "site-b")
    both = TrustRoots.from_file(home / "site-b" / "ca.pem").certificates
    assert both == (load_certificate(home / "ca/ca.pem"), load_certificate(home / "ca-2/ca.pem"))
    for arguments in (("issue", "participant", "x", "--out", "@x"), ("refresh-list",), ("revoke", "--serial", "1")):
        code, said = pki(*arguments, "--ca", "@ca-2")
        assert (code, "take-over" in said) == (1, True), said
    assert pki("refresh-list", "--ca", "@ca")[0] == 0

    code, said = pki("take-over", "--ca", "@ca-2", "--old", "@ca")
    assert (code, "revocation list 3" in said) == (0, True)
    for arguments in (("issue", "participant", "x", "--out", "@x"), ("refresh-list",), ("revoke", "--serial", "1")):
        code, said = pki(*arguments, "--ca", "@ca")
        assert (code, "replaced by another" in said) == (1, True), said
    assert not (home / "x").exists()

    after = issue(pki, "site-b", ca="@ca-2", out="@new-b")
    code, said = pki("list", "--ca", "@ca-2", "--json")
    found = {line["serial"]: line for line in json.loads(said)["certificates"]}
    assert found[before]["status"] == "revoked"
    assert found[after]["ca"] != found[before]["ca"]
    assert pki("revoke", "site-b", "--ca", "@ca-2")[0] == 0  # of the old CA and of the new one
    made = list_in(pki, "ca-2")
    assert (made.number, len(made.serials)) == (4, 3)
    for directory in ("site-b", "new-b"):
        roots = TrustRoots.from_file(home / directory / "ca.pem")
        assert RevocationList.parse((home / "ca-2/revoked.crl").read_bytes(), roots, now=time.time()) == made
    code, said = pki("take-over", "--ca", "@ca-2", "--old", "@ca")
    assert (code, "does not wait" in said) == (1, True)


def test_a_ca_takes_over_from_the_one_that_it_was_made_to_replace_alone(pki: Shell) -> None:
    assert pki("init", "--federation", "ward", "--out", "@other")[0] == 0
    assert pki("successor", "--ca", "@ca", "--out", "@ca-2")[0] == 0
    code, said = pki("take-over", "--ca", "@ca-2", "--old", "@other")
    assert (code, "not the one" in said) == (1, True)
    assert pki("issue", "participant", "x", "--ca", "@other", "--out", "@x")[0] == 0


def test_a_second_successor_is_refused_while_members_may_trust_the_first(pki: Shell) -> None:
    home = pki.home
    assert pki("successor", "--ca", "@ca", "--out", "@ca-2")[0] == 0
    both = (home / "ca" / "roots.pem").read_bytes()
    code, said = pki("successor", "--ca", "@ca", "--out", "@ca-3")
    assert (code, f"remove {home}/ca/roots.pem" in said, "take-over" in said) == (1, True, True), said
    assert not (home / "ca-3").exists()
    assert (home / "ca" / "roots.pem").read_bytes() == both
    issue(pki, "site-a")
    assert pki("take-over", "--ca", "@ca-2", "--old", "@ca")[0] == 0
    assert load_certificate(home / "ca-2/ca.pem") in TrustRoots.from_file(home / "site-a/ca.pem").certificates

    # Another replacement begins when this one has been ended, and one that is given up can be begun anew.
    assert pki("successor", "--ca", "@ca-2", "--out", "@ca-3")[0] == 1
    for out in ("@ca-3", "@ca-4"):
        (home / "ca-2" / "roots.pem").unlink()
        assert pki("successor", "--ca", "@ca-2", "--out", out)[0] == 0


def test_a_take_over_that_was_interrupted_is_done_again(pki: Shell) -> None:
    home, now = pki.home, time.time()
    issue(pki, "site-a")
    assert pki("revoke", "site-a", "--ca", "@ca")[0] == 0
    assert pki("successor", "--ca", "@ca", "--out", "@ca-2")[0] == 0
    (home / "ca" / "successor.pem").mkdir()  # the last step fails
    with pytest.raises(RevokingError, match=r"successor\.pem"):
        take_over(Authority.load(home / "ca-2"), home / "ca", home / "ca-2", now=now)
    with pytest.raises(RegisterError, match="take-over"):
        next_list(Authority.load(home / "ca-2"), home / "ca-2", now=now)
    (home / "ca" / "successor.pem").rmdir()
    made = take_over(Authority.load(home / "ca-2"), home / "ca", home / "ca-2", now=now)
    assert (made.number, len(made.serials)) == (3, 1)


def test_show_takes_a_file_with_both_cas(pki: Shell) -> None:
    assert pki("successor", "--ca", "@ca", "--out", "@ca-2")[0] == 0
    code, said = pki("show", "@ca-2/roots.pem")
    assert (code, "2 certificate authorities" in said) == (0, True)
    old = Authority.create("ward", now=LONG_AGO, days=10)
    pem = (pki.home / "ca/ca.pem").read_bytes()
    (pki.home / "mixed.pem").write_bytes(old.roots_pem + pem)
    code, said = pki("show", "@mixed.pem")
    assert (code, "expired" in said) == (0, True)
    (pki.home / "gone.pem").write_bytes(old.roots_pem + old.roots_pem)
    assert pki("show", "@gone.pem")[0] == 1
