"""Requests: what is refused, what reaches a certificate, and the whole way off-line through `maskwork pki`."""

import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from tests.enrolment.requests_of_others import EVIL, p256, request_of, uri

from maskwork.cli import installed_contributions, run
from maskwork.errors import UserError
from maskwork.net.authority import Authority
from maskwork.net.identity import Identity, IdentityFiles, Role, fingerprint, to_der
from maskwork.net.installing import RequestFiles, check_new, fingerprint_text, known_roots, parse_fingerprint
from maskwork.net.register import Register
from maskwork.net.requests import RequestError, key_fingerprint, new_request, read_request, sign_request
from maskwork.net.whole_files import write_whole

NOW = 1_800_000_000.0
AUTHORITY = Authority.create("ward", now=NOW)
SITE = Identity("ward", Role.PARTICIPANT, "site-a")


@pytest.mark.parametrize(("pem", "why"), EVIL.values(), ids=EVIL.keys())
def test_a_request_that_asks_for_more_than_a_name_is_refused(pem: bytes, why: str) -> None:
    with pytest.raises(RequestError, match=r"(?s)" + why.replace(".", r"\.")):
        read_request(pem, federation="ward")


@pytest.mark.parametrize(
    ("identity", "dns", "ip"),
    [(SITE, [], []), (Identity("ward", Role.COORDINATOR, "main"), ["Hub.example.org"], ["10.0.0.1"])],
    ids=["participant", "coordinator"],
)
def test_what_is_asked_is_what_is_signed(identity: Identity, dns: list[str], ip: list[str]) -> None:
    key = p256()
    request = read_request(new_request(key, identity, dns_names=dns, ip_addresses=ip), federation="ward")
    assert (request.identity, request.public_key) == (identity, key.public_key())
    assert request.key_fingerprint == key_fingerprint(key.public_key())
    certificate = sign_request(AUTHORITY, request, now=NOW, days=7)
    verified = AUTHORITY.roots.verify(to_der(certificate), now=NOW, role=identity.role, federation="ward")
    assert (verified.identity, verified.public_key) == (identity, key.public_key())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [name.lower() for name in dns]
    assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ip
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_the_cas_own_key_gets_no_other_name() -> None:
    request = read_request(new_request(AUTHORITY.key, SITE), federation="ward")
    with pytest.raises(RequestError, match="own key"):
        sign_request(AUTHORITY, request, now=NOW, days=7)


@pytest.mark.parametrize(
    "text", ["", "sha256:", "sha1:" + "0" * 64, "0" * 63, "0" * 65, "g" * 64, "sha256:sha256:" + "0" * 64]
)
def test_what_is_no_fingerprint_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="not a fingerprint"):
        parse_fingerprint(text)


def test_a_fingerprint_is_read_as_people_write_it() -> None:
    digest = fingerprint(to_der(AUTHORITY.certificate))
    with_colons = ":".join(f"{byte:02X}" for byte in digest)
    assert {parse_fingerprint(t) for t in (fingerprint_text(digest), digest.hex(), f"sha256:{with_colons}")} == {digest}


def test_a_ca_that_nobody_was_told_of_is_not_taken_along() -> None:
    other = Authority.create("ward", now=NOW)
    roots = known_roots(
        [AUTHORITY.certificate, other.certificate], {fingerprint(to_der(AUTHORITY.certificate))}, source="x"
    )
    assert roots.certificates == (AUTHORITY.certificate,)


# --- maskwork pki request, sign, install ------------------------------------------------------------------------------


class Shell:
    def __init__(self, capsys: pytest.CaptureFixture[str], home: Path) -> None:
        self.capsys, self.home = capsys, home

    def __call__(self, *arguments: str) -> tuple[int, str]:
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


def ca_fingerprint(home: Path, ca: str = "ca") -> str:
    return fingerprint_text(fingerprint(to_der(Authority.load(home / ca).certificate)))


REQUEST = ("request", "participant", "site-a", "--federation", "ward", "--out", "@site")
SIGN = ("sign", "@site/request.pem", "--ca", "@ca", "--out", "@signed.pem", "--role", "participant", "--name", "site-a")
INSTALL = ("install", "--certificate", "@signed.pem", "--into", "@site")


def test_the_whole_way_offline(pki: Shell) -> None:
    code, said = pki(*REQUEST)
    assert code == 0
    key_file = pki.home / "site" / "request-key.pem"
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    key = key_file.read_bytes()
    read_out = next(line.split()[1].rstrip(":") for line in said.splitlines() if line.startswith("key "))
    # Only what is no secret travels: the request in one direction, the certificate in the other.
    assert b"PRIVATE" not in (pki.home / "site" / "request.pem").read_bytes()
    code, said = pki(*SIGN)
    assert code == 0
    assert "spiffe://ward/participant/site-a" in said
    assert read_out in said
    assert ca_fingerprint(pki.home) in said
    assert [line.identity for line in Register(pki.home / "ca").certificates()] == [SITE]
    code, said = pki(*INSTALL, "--ca-fingerprint", ca_fingerprint(pki.home))
    assert code == 0, said
    files = IdentityFiles.in_directory(pki.home / "site")
    assert files.key.read_bytes() == key
    assert stat.S_IMODE(files.key.stat().st_mode) == 0o600
    assert sorted(p.name for p in (pki.home / "site").iterdir()) == ["ca.pem", "cert.pem", "key.pem"]
    assert pki("show", "@site", "--ca", "@ca")[0] == 0


def test_a_renewed_identity_replaces_only_when_told_and_trusts_the_ca_that_it_has(pki: Shell) -> None:
    assert pki("issue", "participant", "site-a", "--ca", "@ca", "--out", "@site")[0] == 0
    files = IdentityFiles.in_directory(pki.home / "site")
    before = (files.key.read_bytes(), files.cert.read_bytes())
    assert pki(*REQUEST)[0] == 0
    assert (files.key.read_bytes(), files.cert.read_bytes()) == before  # a service may be using them
    assert pki(*SIGN)[0] == 0
    code, said = pki(*INSTALL)
    assert code == 1
    assert "--force" in said
    assert (files.key.read_bytes(), files.cert.read_bytes()) == before
    assert pki(*INSTALL, "--force")[0] == 0
    assert files.key.read_bytes() != before[0]
    assert pki("show", "@site", "--ca", "@ca")[0] == 0


def test_a_file_that_is_not_there_is_answered_with_what_was_expected(pki: Shell) -> None:
    assert pki(*REQUEST)[0] == 0
    assert pki(*SIGN)[0] == 0
    fingerprint_there = ("--ca-fingerprint", ca_fingerprint(pki.home))
    enrol = ("enrol", "--coordinator", "localhost:1", "--out", "@o", *fingerprint_there)
    for arguments, expected in (
        (("sign", "@nofile", *SIGN[2:5], "@x.pem"), "request.pem that `maskwork pki request` wrote"),
        (("install", "--certificate", "@nofile", "--into", "@site"), "expected what `maskwork pki sign` wrote"),
        ((*INSTALL[:4], "@elsewhere", *fingerprint_there), "begin there with `maskwork pki request`"),
        ((*SIGN[:3], "@site", *SIGN[4:], "--force"), "directory of a CA, which `maskwork pki init` makes"),
        (("list", "--ca", "@nodirectory"), "directory of a CA, which `maskwork pki init` makes"),
        (("show", "@ca", "--ca", "@nofile"), "expected the federation's ca.pem"),
        ((*enrol, "--token-file", "@nofile"), "expected the token that `maskwork pki token` made"),
    ):
        code, said = pki(*arguments)
        assert (code, expected in said, "pki issue" in said) == (1, True, False), said


def test_a_request_under_way_is_not_thrown_away_in_passing(pki: Shell) -> None:
    assert pki(*REQUEST)[0] == 0
    key = (pki.home / "site" / "request-key.pem").read_bytes()
    code, said = pki(*REQUEST)
    assert code == 1
    assert "--force" in said
    assert (pki.home / "site" / "request-key.pem").read_bytes() == key
    assert pki(*REQUEST, "--force")[0] == 0
    assert (pki.home / "site" / "request-key.pem").read_bytes() != key


@pytest.mark.parametrize(
    ("stated", "why"),
    [
        (("--role", "operator", "--name", "site-a"), "you expect operator"),
        (("--role", "participant", "--name", "site-b"), "you expect 'site-b'"),
        (("--role", "participant", "--name", "site-a", "--dns", "hub"), "you expect hub"),
    ],
)
def test_a_request_of_somebody_else_is_not_signed(pki: Shell, stated: tuple[str, ...], why: str) -> None:
    pki(*REQUEST)
    code, said = pki("sign", "@site/request.pem", "--ca", "@ca", "--out", "@signed.pem", *stated)
    assert code == 1
    assert why in said
    assert not (pki.home / "signed.pem").exists()
    assert Register(pki.home / "ca").certificates() == ()


@pytest.mark.parametrize(("answer", "signed"), [("n\n", False), ("", False), ("y\n", True)])
def test_what_the_signer_did_not_state_it_is_asked(
    pki: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: str, signed: bool
) -> None:
    pki(*REQUEST)
    (tmp_path / "answer").write_text(answer)
    with (tmp_path / "answer").open() as typed:
        monkeypatch.setattr("sys.stdin", typed)
        code, _ = pki("sign", "@site/request.pem", "--ca", "@ca", "--out", "@signed.pem", "--role", "participant")
    assert (code == 0) is signed
    assert (pki.home / "signed.pem").exists() is signed


def test_a_coordinators_host_names_are_looked_at_too(
    pki: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pki("request", "coordinator", "main", "--federation", "ward", "--out", "@c", "--dns", "hub", "--ip", "10.0.0.1")
    sign = ("sign", "@c/request.pem", "--ca", "@ca", "--out", "@c.pem", "--role", "coordinator", "--name", "main")
    (tmp_path / "no").write_text("n\n")
    with (tmp_path / "no").open() as typed:
        monkeypatch.setattr("sys.stdin", typed)
        assert pki(*sign)[0] == 1
    assert "you expect hub" in pki(*sign, "--dns", "hub")[1]
    assert pki(*sign, "--dns", "hub", "--ip", "10.0.0.1")[0] == 0
    assert (
        pki("install", "--certificate", "@c.pem", "--into", "@c", "--ca-fingerprint", ca_fingerprint(pki.home))[0] == 0
    )
    assert "hub, 10.0.0.1" in pki("show", "@c")[1]


@pytest.mark.parametrize("written", [["ca.pem"], ["ca.pem", "key.pem"], ["ca.pem", "key.pem", "cert.pem"]])
def test_the_same_command_ends_an_installation_that_was_interrupted(pki: Shell, written: list[str]) -> None:
    site, install = pki.home / "site", (*INSTALL, "--ca-fingerprint", ca_fingerprint(pki.home))
    assert pki(*REQUEST)[0] == 0
    assert pki(*SIGN)[0] == 0
    request = {name: (site / name).read_bytes() for name in ("request.pem", "request-key.pem")}
    assert pki(*install)[0] == 0
    whole = {path.name: path.read_bytes() for path in site.iterdir()}
    assert pki(*install)[0] == 1  # it is done

    for name in whole.keys() - written:
        (site / name).unlink()
    for name, content in request.items():
        write_whole(site / name, content, private="key" in name)
    code, said = pki(*install)
    assert code == 0, said
    assert {path.name: path.read_bytes() for path in site.iterdir()} == whole


@pytest.mark.parametrize("name", ["ca.pem", "key.pem", "cert.pem"])
def test_what_is_not_of_this_installation_is_replaced_only_when_told(pki: Shell, name: str) -> None:
    site, install = pki.home / "site", (*INSTALL, "--ca-fingerprint", ca_fingerprint(pki.home))
    assert pki("init", "--federation", "ward", "--out", "@other")[0] == 0
    assert pki("issue", "participant", "site-a", "--ca", "@other", "--out", "@before")[0] == 0
    assert pki(*REQUEST)[0] == 0
    assert pki(*SIGN)[0] == 0
    precious = (pki.home / "before" / name).read_bytes()
    write_whole(site / name, precious, private=name == "key.pem")
    code, said = pki(*install)
    assert (code, f"{site / name} already there" in said) == (1, True), said
    assert (site / name).read_bytes() == precious
    assert sorted(path.name for path in site.iterdir()) == sorted([name, "request-key.pem", "request.pem"])
    assert pki(*install, "--force")[0] == 0


def test_a_certificate_of_a_ca_with_another_fingerprint_is_not_installed(pki: Shell) -> None:
    pki(*REQUEST)
    assert pki("init", "--federation", "ward", "--out", "@strange")[0] == 0
    assert pki(*SIGN[:3], "@strange", *SIGN[4:])[0] == 0
    code, said = pki(*INSTALL, "--ca-fingerprint", ca_fingerprint(pki.home))
    assert code == 1
    assert "shows no CA with the fingerprint" in said
    code, said = pki(*INSTALL)
    assert code == 1
    assert "--ca-fingerprint" in said
    assert not (pki.home / "site" / "cert.pem").exists()
    # Nor with the right CA's certificate beside it.
    right = (pki.home / "ca" / "ca.pem").read_bytes()
    (pki.home / "signed.pem").write_bytes((pki.home / "signed.pem").read_bytes() + right)
    code, said = pki(*INSTALL, "--ca-fingerprint", ca_fingerprint(pki.home))
    assert code == 1
    assert "was not signed by the CA" in said


def test_a_certificate_for_another_key_or_another_name_is_not_installed(tmp_path: Path) -> None:
    files = RequestFiles.in_directory(tmp_path)
    key, known = files.own_key(), {fingerprint(to_der(AUTHORITY.certificate))}
    for signed, why in ((p256().public_key(), "another key"), (key.public_key(), "was asked for")):
        certificate = AUTHORITY.sign(signed, Identity("ward", Role.PARTICIPANT, "site-b"), now=NOW, days=1)
        pem = certificate.public_bytes(Encoding.PEM) + AUTHORITY.certificate.public_bytes(Encoding.PEM)
        with pytest.raises(UserError, match=why):
            check_new(pem, tmp_path, now=NOW, known=known, asked=SITE, source="it")


def test_a_request_with_a_name_too_much_is_not_signed_by_the_command_either(pki: Shell) -> None:
    (pki.home / "site").mkdir()
    (pki.home / "site" / "request.pem").write_bytes(request_of(uri(f"{SITE.uri}"), x509.DNSName("hub")))
    code, said = pki(*SIGN)
    assert code == 1
    assert "only dials out" in said
