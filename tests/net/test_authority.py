"""The authority: what it writes is accepted, carries no more than it should, and is never written over."""

import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import NameOID

from maskwork.net.authority import Authority, AuthorityError
from maskwork.net.diagnosis import check_own_files
from maskwork.net.identity import IdentityError, IdentityFiles, IdentityProblem, Role, TrustRoots

NOW = 1_800_000_000.0
DAY = 86400.0
AUTHORITY = Authority.create("ward", now=NOW)


def names_of(pem: bytes) -> x509.SubjectAlternativeName:
    certificate = x509.load_pem_x509_certificate(pem)
    return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value


def test_host_names_are_alternative_names_and_never_the_common_name() -> None:
    issued = AUTHORITY.issue(
        Role.COORDINATOR, "main", now=NOW, dns_names=["Hub.Example.org"], ip_addresses=["10.0.0.1", "::1"]
    )
    names = names_of(issued.cert_pem)
    assert names.get_values_for_type(x509.DNSName) == ["hub.example.org"]
    assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.1", "::1"]
    for certificate in (AUTHORITY.certificate, x509.load_pem_x509_certificate(issued.cert_pem)):
        assert certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME) == []


@pytest.mark.parametrize("bad", ["", "a b", "-a.org", "a..org", "*.org", "a" * 64, "a_b", "x.org\n", "é.org"])
def test_a_bad_host_name_is_refused(bad: str) -> None:
    with pytest.raises(AuthorityError):
        AUTHORITY.issue(Role.COORDINATOR, "main", now=NOW, dns_names=[bad])


def test_a_bad_address_is_refused() -> None:
    with pytest.raises(AuthorityError, match="not an IP address"):
        AUTHORITY.issue(Role.COORDINATOR, "main", now=NOW, ip_addresses=["10.0.0"])


def test_a_coordinator_needs_a_host_name_and_nobody_else_may_have_one() -> None:
    with pytest.raises(AuthorityError, match="--dns"):
        AUTHORITY.issue(Role.COORDINATOR, "main", now=NOW)
    for role in set(Role) - {Role.COORDINATOR}:
        with pytest.raises(AuthorityError, match="only dials out"):
            AUTHORITY.issue(role, "x", now=NOW, dns_names=["localhost"])


@pytest.mark.parametrize("days", [0, -1, 36501, 3653])
def test_a_validity_that_is_impossible_or_outlives_the_ca_is_refused(days: int) -> None:
    with pytest.raises(AuthorityError, match="days"):
        AUTHORITY.issue(Role.AUDITOR, "x", now=NOW, days=days)


def test_a_member_whose_clock_runs_behind_can_start() -> None:
    issued = AUTHORITY.issue(Role.AUDITOR, "x", now=NOW, days=1)
    certificate = x509.load_pem_x509_certificate(issued.cert_pem)
    assert certificate.not_valid_before_utc.timestamp() == NOW - 300
    assert certificate.not_valid_after_utc.timestamp() == NOW + DAY
    assert AUTHORITY.certificate.not_valid_before_utc.timestamp() == NOW - 300


def test_what_is_written_is_read_back_and_keys_are_private(tmp_path: Path) -> None:
    AUTHORITY.write(tmp_path / "ca")
    again = Authority.load(tmp_path / "ca")
    assert (again.federation, again.certificate) == ("ward", AUTHORITY.certificate)
    files = again.issue(Role.PARTICIPANT, "site-a", now=NOW).write(tmp_path / "new" / "site-a")
    assert files == IdentityFiles.in_directory(tmp_path / "new" / "site-a")
    verified = check_own_files(files, now=NOW, role=Role.PARTICIPANT)
    assert verified.identity.uri == "spiffe://ward/participant/site-a"
    for key in (tmp_path / "ca" / "ca-key.pem", files.key):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        assert key.read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----")
        assert isinstance(load_pem_private_key(key.read_bytes(), None), ec.EllipticCurvePrivateKey)
    assert sorted(p.name for p in files.key.parent.iterdir()) == ["ca.pem", "cert.pem", "key.pem"]


@pytest.mark.parametrize("existing", ["ca.pem", "cert.pem", "key.pem"])
def test_nothing_is_written_over_unless_asked_for(tmp_path: Path, existing: str) -> None:
    (tmp_path / existing).write_text("precious")
    issued = AUTHORITY.issue(Role.PARTICIPANT, "site-a", now=NOW)
    with pytest.raises(AuthorityError, match="--force"):
        issued.write(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [existing]
    assert (tmp_path / existing).read_text() == "precious"
    check_own_files(issued.write(tmp_path, overwrite=True), now=NOW)


def test_a_dangling_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "key.pem").symlink_to(tmp_path / "elsewhere")
    issued = AUTHORITY.issue(Role.PARTICIPANT, "site-a", now=NOW)
    with pytest.raises(AuthorityError):
        issued.write(tmp_path)
    issued.write(tmp_path, overwrite=True)
    assert not (tmp_path / "elsewhere").exists()


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AuthorityError, match="cannot be written"):
        AUTHORITY.write(tmp_path / "file" / "ca")


def test_keys_do_not_show(tmp_path: Path) -> None:
    issued = AUTHORITY.issue(Role.PARTICIPANT, "site-a", now=NOW)
    assert "PRIVATE" not in repr(issued)
    assert "PrivateKey" not in repr(AUTHORITY)


def test_a_ca_with_anothers_key_is_refused(tmp_path: Path) -> None:
    AUTHORITY.write(tmp_path)
    Authority.create("ward", now=NOW).write(tmp_path / "other")
    (tmp_path / "ca-key.pem").write_bytes((tmp_path / "other" / "ca-key.pem").read_bytes())
    with pytest.raises(AuthorityError, match="not the key of"):
        Authority.load(tmp_path)
    (tmp_path / "ca-key.pem").write_text("-----BEGIN PRIVATE KEY-----\n")
    with pytest.raises(AuthorityError, match="PEM"):
        Authority.load(tmp_path)
    (tmp_path / "ca-key.pem").unlink()
    with pytest.raises(IdentityError) as caught:
        Authority.load(tmp_path)
    assert caught.value.problem is IdentityProblem.UNREADABLE


def test_a_cas_key_that_others_can_read_signs_nothing(tmp_path: Path) -> None:
    AUTHORITY.write(tmp_path)
    key = tmp_path / "ca-key.pem"
    key.chmod(0o640)
    with pytest.raises(IdentityError, match=f"others can read or write this key: run `chmod 600 {key}`"):
        Authority.load(tmp_path)
    key.chmod(0o600)
    assert Authority.load(tmp_path).federation == "ward"


def test_a_member_is_no_authority(tmp_path: Path) -> None:
    files = AUTHORITY.issue(Role.PARTICIPANT, "site-a", now=NOW).write(tmp_path)
    (tmp_path / "ca.pem").write_bytes(files.cert.read_bytes())
    (tmp_path / "ca-key.pem").write_bytes(files.key.read_bytes())
    with pytest.raises(IdentityError) as caught:
        Authority.load(tmp_path)
    assert caught.value.problem is IdentityProblem.WRONG_USAGE
    assert isinstance(AUTHORITY.roots, TrustRoots)
