"""`maskwork pki`, from the shell's side: what is written, what is said, and the exit codes."""

import stat
from pathlib import Path

import pytest

from maskwork.cli import installed_contributions, run
from maskwork.net.authority import Authority
from maskwork.net.identity import Role

LONG_AGO = 1_600_000_000.0


class Shell:
    def __init__(self, capsys: pytest.CaptureFixture[str], home: Path) -> None:
        self.capsys = capsys
        self.home = home

    def __call__(self, *arguments: str) -> tuple[int, str]:
        """Run `maskwork pki …`; a leading @ stands for the home directory. Returns code and both streams."""
        words = [str(self.home / word[1:]) if word.startswith("@") else word for word in arguments]
        with pytest.raises(SystemExit) as caught:
            run(installed_contributions(), ["pki", *words])
        streams = self.capsys.readouterr()
        return int(caught.value.code or 0), streams.out + streams.err


@pytest.fixture
def pki(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Shell:
    shell = Shell(capsys, tmp_path)
    assert shell("init", "--federation", "ward", "--out", "@ca")[0] == 0
    return shell


def test_a_federation_from_nothing(pki: Shell) -> None:
    code, said = pki("issue", "coordinator", "main", "--ca", "@ca", "--out", "@c", "--dns", "hub", "--ip", "127.0.0.1")
    assert code == 0
    assert "spiffe://ward/coordinator/main" in said
    for role in ("participant", "operator", "researcher", "auditor"):
        assert pki("issue", role, "x", "--ca", "@ca", "--out", f"@{role}", "--days", "7")[0] == 0
    code, said = pki("show", "@c", "@participant", "@ca", "@c/cert.pem", "@c/key.pem", "--ca", "@ca")
    assert code == 0
    for expected in ("spiffe://ward/coordinator/main", "hub, 127.0.0.1", "spiffe://ward/participant/x", "in 7 days"):
        assert expected in said
    assert said.count("good") == 5
    assert all(len(line.split()[1]) == 64 for line in said.splitlines() if "fingerprint" in line)


def test_an_existing_identity_survives(pki: Shell) -> None:
    issue = ("issue", "participant", "x", "--ca", "@ca", "--out", "@p")
    assert pki(*issue)[0] == 0
    before = (pki.home / "p/key.pem").read_bytes()
    code, said = pki(*issue)
    assert code == 1
    assert "--force" in said
    assert (pki.home / "p/key.pem").read_bytes() == before
    assert pki(*issue, "--force")[0] == 0
    assert (pki.home / "p/key.pem").read_bytes() != before
    code, said = pki("init", "--federation", "ward", "--out", "@ca")
    assert code == 1
    assert "ca-key.pem" in said


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("issue", "participant", "Site A", "--ca", "@ca", "--out", "@o"), "'Site A'"),
        (("issue", "participant", "x", "--ca", "@nowhere", "--out", "@o"), "nowhere/ca.pem"),
        (("issue", "participant", "x", "--ca", "@ca", "--out", "@o", "--dns", "hub"), "only dials out"),
        (("issue", "coordinator", "x", "--ca", "@ca", "--out", "@o"), "--dns"),
        (("issue", "participant", "x", "--ca", "@ca", "--out", "@o", "--days", "9999"), "outlive"),
        (("init", "--federation", "Ward!", "--out", "@o"), "'Ward!'"),
    ],
)
def test_mistakes_are_told_in_one_line_and_leave_nothing(pki: Shell, arguments: tuple[str, ...], expected: str) -> None:
    code, said = pki(*arguments)
    assert code == 1
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert expected in said
    assert not (pki.home / "o").exists()


def test_an_unknown_role_is_wrong_usage(pki: Shell) -> None:
    assert pki("issue", "root", "x", "--ca", "@ca", "--out", "@o")[0] == 2


def test_show_says_what_is_wrong(pki: Shell) -> None:
    home = pki.home
    assert pki("init", "--federation", "other", "--out", "@ca2")[0] == 0
    assert pki("issue", "participant", "x", "--ca", "@ca", "--out", "@p")[0] == 0
    old = Authority.create("ward", now=LONG_AGO, days=400)
    old.write(home / "old-ca")
    old.issue(Role.AUDITOR, "y", now=LONG_AGO, days=100).write(home / "old")

    for arguments, expected in (
        (("@p", "--ca", "@ca2"), "was not signed by the CA"),
        (("@p/cert.pem", "--ca", "@ca2/ca.pem"), "was not signed by the CA"),
        (("@old/cert.pem",), "expired"),
        (("@old",), "expired"),
        (("@old-ca",), "expired"),
        (("@ca", "--ca", "@ca2"), "another CA"),
        (("@missing",), "cannot be read"),
        (("@p", "@missing"), "cannot be read"),
    ):
        code, said = pki("show", *arguments)
        assert code == 1, arguments
        assert expected in said

    (home / "p/key.pem").chmod(stat.S_IRUSR | stat.S_IRGRP)
    code, said = pki("show", "@p")
    assert code == 1
    assert "chmod 600" in said
    assert "chmod 600" in pki("show", "@p/key.pem")[1]
    (home / "p/key.pem").chmod(0o600)
    (home / "p/key.pem").write_bytes((home / "ca/ca-key.pem").read_bytes())
    code, said = pki("show", "@p")
    assert code == 1
    assert "not the key of" in said
    (home / "p/key.pem").unlink()
    code, said = pki("show", "@p")
    assert code == 1
    assert "key.pem cannot be read" in said
    (home / "p/cert.pem").write_text("no certificate")
    code, said = pki("show", "@p")
    assert code == 1
    assert "not a PEM certificate" in said


def test_show_without_a_ca_says_how_far_it_looked(pki: Shell) -> None:
    assert pki("issue", "participant", "x", "--ca", "@ca", "--out", "@p")[0] == 0
    code, said = pki("show", "@p/cert.pem")
    assert code == 0
    assert "add --ca" in said
