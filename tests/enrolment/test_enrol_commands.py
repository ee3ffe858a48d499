"""`maskwork pki token`, `enrol` and `participant enrol`: what is refused before anybody is dialled, what is said."""

import stat
from pathlib import Path

import pytest
from tests.enrolment.test_requests import Shell, ca_fingerprint

from maskwork import enrolment_client
from maskwork.cli import installed_contributions, run
from maskwork.net.identity import load_certificate
from maskwork.net.tokens import Token

NOWHERE = "localhost:1"


@pytest.fixture
def pki(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Shell:
    shell = Shell(capsys, tmp_path)
    assert shell("init", "--federation", "ward", "--out", "@ca")[0] == 0
    return shell


def made(pki: Shell, role: str = "participant") -> str:
    code, _ = pki("token", role, "site-a", "--ca", "@ca", "--out", f"@{role}.token")
    assert code == 0
    return (pki.home / f"{role}.token").read_text().strip()


def test_a_token_is_told_once_with_what_has_to_be_handed_over(pki: Shell) -> None:
    code, said = pki("token", "participant", "site-a", "--ca", "@ca", "--valid", "2h")
    assert code == 0
    token = next(line.split()[1] for line in said.splitlines() if line.startswith("  token"))
    assert Token.parse(token).name == "site-a"
    assert ca_fingerprint(pki.home) in said
    assert "maskwork participant enrol" in said


def test_a_token_in_a_file_is_its_owners_alone_and_not_on_the_screen(pki: Shell) -> None:
    code, said = pki("token", "operator", "alice", "--ca", "@ca", "--out", "@alice.token")
    assert code == 0
    path = pki.home / "alice.token"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Token.parse(path.read_text()).secret not in said
    assert "maskwork pki enrol" in said
    assert pki("token", "operator", "alice", "--ca", "@ca", "--out", "@alice.token")[0] == 1


@pytest.mark.parametrize("valid", ["", "0h", "31d", "-1h", "1w", "1.5h", "24", "9999999m", "1h1m"])
def test_a_validity_that_is_none_or_too_long_is_refused(pki: Shell, valid: str) -> None:
    assert pki("token", "participant", "site-a", "--ca", "@ca", "--valid", valid)[0] == 1
    assert not (pki.home / "ca" / "tokens").exists()


def test_nobody_is_dialled_without_a_fingerprint_or_a_token(pki: Shell) -> None:
    made(pki)
    dial = ("enrol", "--coordinator", NOWHERE, "--out", "@site")
    known = ("--ca-fingerprint", ca_fingerprint(pki.home))
    for arguments, why in (
        ((*dial, "--token-file", "@participant.token"), "--ca-fingerprint"),
        ((*dial, *known), "MASKWORK_ENROLMENT_TOKEN"),
        ((*dial, *known, "--token", "nonsense"), "not an enrolment token"),
        ((*dial, *known, "--token-file", "@nowhere"), "nowhere"),
        ((*dial, "--ca-fingerprint", "sha256:12", "--token-file", "@participant.token"), "not a fingerprint"),
    ):
        code, said = pki(*arguments)
        assert code == 1
        assert why in said
        assert not (pki.home / "site").exists()


def test_an_error_does_not_repeat_the_token(pki: Shell) -> None:
    secret = Token.parse(made(pki)).secret
    known = ("--ca-fingerprint", ca_fingerprint(pki.home))
    code, said = pki("enrol", "--coordinator", NOWHERE, "--out", "@site", *known, "--token-file", "@participant.token")
    assert code == 1
    assert NOWHERE in said
    assert secret not in said


def test_an_identity_that_is_there_is_not_replaced(pki: Shell) -> None:
    made(pki)
    pki("issue", "participant", "site-a", "--ca", "@ca", "--out", "@site")
    known = ("--ca-fingerprint", ca_fingerprint(pki.home))
    code, said = pki("enrol", "--coordinator", NOWHERE, "--out", "@site", *known, "--token-file", "@participant.token")
    assert code == 1
    assert "--force" in said


def test_a_site_enrols_as_a_participant_alone(
    pki: Shell, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASKWORK_ENROLMENT_TOKEN", made(pki, "operator"))
    words = ["participant", "enrol", "--coordinator", NOWHERE, "--out", str(pki.home / "site")]
    with pytest.raises(SystemExit):
        run(installed_contributions(), [*words, "--ca-fingerprint", ca_fingerprint(pki.home)])
    assert "maskwork pki enrol" in capsys.readouterr().err


def test_a_coordinator_is_told_how_it_is_renewed_and_its_directory_is_left_as_it_was(pki: Shell) -> None:
    assert pki("issue", "coordinator", "hub", "--ca", "@ca", "--out", "@hub", "--dns", "localhost")[0] == 0
    code, said = pki("renew", "--coordinator", NOWHERE, "--identity", "@hub")
    assert (code, "`maskwork pki request`" in said) == (1, True), said
    assert sorted(path.name for path in (pki.home / "hub").iterdir()) == ["ca.pem", "cert.pem", "key.pem"]


def test_the_main_port_is_not_taken_for_somebody_in_between(pki: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    made(pki)
    assert pki("issue", "coordinator", "hub", "--ca", "@ca", "--out", "@hub", "--dns", "localhost")[0] == 0
    shown = [load_certificate(pki.home / "hub" / "cert.pem")]  # without the CA's, which only the enrolment port adds
    monkeypatch.setattr(enrolment_client, "presented_certificates", lambda target: shown)
    arguments = ("--ca-fingerprint", ca_fingerprint(pki.home), "--token-file", "@participant.token", "--out", "@site")
    code, said = pki("enrol", "--coordinator", NOWHERE, *arguments)
    assert (code, "enrolment port, not the port" in said) == (1, True), said
    assert not (pki.home / "site").exists()
