"""What a side says about its own files, and about a connection that failed."""

import os
from pathlib import Path

import pytest

from maskwork.errors import UserError
from maskwork.net.authority import Authority
from maskwork.net.diagnosis import (
    Target,
    check_own_files,
    explain_connection_failure,
    load_private_key,
    probe_server,
)
from maskwork.net.identity import IdentityError, IdentityFiles, IdentityProblem, Role, TrustRoots

NOW = 1_800_000_000.0
DAY = 86400.0
AUTHORITY = Authority.create("ward", now=NOW)
STRANGER = Authority.create("ward", now=NOW)


@pytest.fixture
def files(tmp_path: Path) -> IdentityFiles:
    return AUTHORITY.issue(Role.PARTICIPANT, "site-a", now=NOW, days=30).write(tmp_path / "id")


def problem_of(files: IdentityFiles, *, now: float = NOW, role: Role | None = Role.PARTICIPANT) -> IdentityProblem:
    with pytest.raises(IdentityError) as caught:
        check_own_files(files, now=now, role=role)
    assert str(files.cert.parent) in caught.value.text, "the text names the file"
    explained = explain_connection_failure(files, "hub:1", now=now, role=role, reason="something at the peer")
    assert explained == f"cannot connect to hub:1: {caught.value.text}", "one's own fault comes first"
    return caught.value.problem


def test_good_files(files: IdentityFiles) -> None:
    verified = check_own_files(files, now=NOW, role=Role.PARTICIPANT)
    assert verified.name == "site-a"
    assert check_own_files(files, now=NOW, roots=AUTHORITY.roots) == verified


def test_each_fault_of_ones_own_files(files: IdentityFiles, tmp_path: Path) -> None:
    other = STRANGER.issue(Role.PARTICIPANT, "site-a", now=NOW).write(tmp_path / "other")
    assert problem_of(files, now=NOW + 31 * DAY) is IdentityProblem.EXPIRED
    assert problem_of(files, now=NOW - DAY) is IdentityProblem.NOT_YET_VALID
    assert problem_of(files, role=Role.OPERATOR) is IdentityProblem.WRONG_ROLE
    assert problem_of(IdentityFiles(other.ca, files.cert, files.key)) is IdentityProblem.WRONG_CA
    assert problem_of(IdentityFiles(files.cert, files.cert, files.key)) is IdentityProblem.WRONG_USAGE


def test_roots_given_are_used_instead_of_the_file(files: IdentityFiles) -> None:
    with pytest.raises(IdentityError, match="another key"):
        check_own_files(files, now=NOW, roots=TrustRoots([STRANGER.certificate]))


def test_a_key_that_is_not_the_certificates(files: IdentityFiles, tmp_path: Path) -> None:
    other = AUTHORITY.issue(Role.PARTICIPANT, "site-b", now=NOW).write(tmp_path / "other")
    mixed = IdentityFiles(files.ca, files.cert, other.key)
    with pytest.raises(IdentityError, match="not the key of") as caught:
        check_own_files(mixed, now=NOW)
    assert caught.value.problem is IdentityProblem.WRONG_KEY


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o644])
def test_a_key_that_others_can_read_or_write_is_refused(files: IdentityFiles, mode: int) -> None:
    files.key.chmod(mode)
    assert problem_of(files) is IdentityProblem.UNREADABLE
    with pytest.raises(IdentityError, match=f"others can read or write this key: run `chmod 600 {files.key}`"):
        load_private_key(files.key)
    for good in (0o600, 0o400):
        files.key.chmod(good)
        assert check_own_files(files, now=NOW).name == "site-a"


@pytest.mark.parametrize("name", ["ca.pem", "cert.pem", "key.pem"])
def test_a_file_that_is_missing_or_garbled(files: IdentityFiles, name: str) -> None:
    path = files.cert.parent / name
    path.write_text("-----BEGIN NOTHING-----\n")
    assert problem_of(files) is IdentityProblem.MALFORMED
    path.unlink()
    assert problem_of(files) is IdentityProblem.UNREADABLE


def test_two_certificates_in_one_file(files: IdentityFiles) -> None:
    files.cert.write_bytes(files.cert.read_bytes() + files.ca.read_bytes())
    assert problem_of(files) is IdentityProblem.MALFORMED


def test_when_ones_own_files_are_good_the_peers_possible_faults_are_listed(files: IdentityFiles) -> None:
    text = explain_connection_failure(files, "hub.example.org:443", now=NOW, role=Role.PARTICIPANT)
    for expected in ("hub.example.org:443", "'hub.example.org'", str(files.ca), "expired", "revoked", "site-a"):
        assert expected in text
    text = explain_connection_failure(files, "hub:1", now=NOW, reason="connection refused")
    assert text == "cannot connect to hub:1: connection refused"


@pytest.mark.parametrize(
    ("text", "host", "port"), [("hub:443", "hub", 443), ("10.0.0.1:1", "10.0.0.1", 1), ("[::1]:65535", "::1", 65535)]
)
def test_targets(text: str, host: str, port: int) -> None:
    assert Target.parse(text) == Target(host, port)


@pytest.mark.parametrize("text", ["", "hub", ":1", "hub:", "hub:0", "hub:65536", "hub:http", "hub:-1", "hub:٣"])
def test_what_is_no_target(text: str) -> None:
    with pytest.raises(UserError, match="HOST:PORT"):
        Target.parse(text)


def test_a_probe_of_what_is_no_target_says_so(files: IdentityFiles) -> None:
    assert "HOST:PORT" in (probe_server(files, "hub") or "")


def test_a_clock_earlier_than_ones_own_files_is_said_to_be_wrong(files: IdentityFiles) -> None:
    for path in (files.ca, files.cert, files.key):
        os.utime(path, (NOW, NOW))
    with pytest.raises(IdentityError) as caught:
        check_own_files(files, now=NOW - 365 * DAY)
    assert caught.value.problem is IdentityProblem.NOT_YET_VALID
    assert "This machine's clock says 2026-01-15" in caught.value.text
    assert "but these files were written at 2027-01-15" in caught.value.text
    assert "the clock is wrong; set it" in caught.value.text


def test_a_clock_that_may_be_ahead_is_named_beside_a_certificate_that_may_be_old(files: IdentityFiles) -> None:
    for path in (files.ca, files.cert, files.key):
        os.utime(path, (NOW, NOW))
    with pytest.raises(IdentityError) as caught:
        check_own_files(files, now=NOW + 31 * DAY)
    assert "expired at" in caught.value.text
    assert "these files were written at 2027-01-15" in caught.value.text
    assert "if it is wrong, set it first" in caught.value.text


def test_a_fault_that_is_no_matter_of_time_says_nothing_of_clocks(files: IdentityFiles) -> None:
    with pytest.raises(IdentityError) as caught:
        check_own_files(files, now=NOW, role=Role.OPERATOR)
    assert "clock" not in caught.value.text
