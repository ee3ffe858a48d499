"""Tokens: one member, one key, one time, for a while; and what is on the disk at each moment."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tests.enrolment.requests_of_others import p256

from maskwork.coordinator import issuing
from maskwork.coordinator.issuing import Issuer
from maskwork.errors import UserError
from maskwork.net.authority import Authority
from maskwork.net.identity import Identity, Role, to_der
from maskwork.net.register import Register, RegisterError
from maskwork.net.requests import RequestError, new_request, read_request
from maskwork.net.tokens import NotAToken, Token, TokenBook, TokenError, TokenRefused

NOW = 1_800_000_000.0
SITE = Identity("ward", Role.PARTICIPANT, "site-a")
KEY = p256()
REQUEST = new_request(KEY, SITE)


class Clock:
    now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    Authority.create("ward", now=NOW).write(tmp_path / "ca")
    return tmp_path / "ca"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def issuer(ca: Path, clock: Clock) -> Issuer:
    return Issuer(ca, "ward", days=30, clock=clock)


@pytest.fixture
def token(ca: Path) -> Token:
    return TokenBook(ca).make(SITE, expires=NOW + 3600)


def record(ca: Path) -> dict[str, str]:
    (path,) = (ca / "tokens").glob("*.json")
    found: dict[str, str] = json.loads(path.read_bytes())
    return found


def test_a_token_gets_its_member_a_certificate(ca: Path, issuer: Issuer, token: Token) -> None:
    request, pem = issuer.enrol(Token.parse(token.text), REQUEST)
    assert (request.identity, request.public_key) == (SITE, KEY.public_key())
    (line,) = Register(ca).certificates()
    assert line.identity == SITE
    verified = Authority.load(ca).roots.verify(to_der(line.certificate), now=NOW, role=Role.PARTICIPANT)
    assert verified.public_key == KEY.public_key()
    assert pem.decode() == record(ca)["certificate"]


def test_the_same_key_gets_the_same_certificate_again_until_the_token_expires(
    ca: Path, issuer: Issuer, token: Token, clock: Clock
) -> None:
    _, first = issuer.enrol(token, REQUEST)
    clock.now = NOW + 3600
    assert issuer.enrol(token, new_request(KEY, SITE))[1] == first
    assert len(Register(ca).certificates()) == 1
    clock.now = NOW + 3601
    with pytest.raises(TokenRefused, match="expired"):
        issuer.enrol(token, REQUEST)


def test_another_key_gets_nothing_for_a_used_token(ca: Path, issuer: Issuer, token: Token) -> None:
    issuer.enrol(token, REQUEST)
    with pytest.raises(TokenRefused, match="another key"):
        issuer.enrol(token, new_request(p256(), SITE))
    assert len(Register(ca).certificates()) == 1


def test_an_expired_token_gets_nothing(ca: Path, issuer: Issuer, token: Token, clock: Clock) -> None:
    clock.now = NOW + 3600.001
    with pytest.raises(TokenRefused, match="expired"):
        issuer.enrol(token, REQUEST)
    assert record(ca)["used_by"] == ""


@pytest.mark.parametrize(
    "asked", [Identity("ward", Role.PARTICIPANT, "site-b"), Identity("ward", Role.OPERATOR, "site-a")]
)
def test_a_token_is_for_one_name_in_one_role(ca: Path, issuer: Issuer, token: Token, asked: Identity) -> None:
    lying = replace(token, role=asked.role, name=asked.name)
    for given in (token, lying):
        with pytest.raises(TokenRefused, match=SITE.uri):
            issuer.enrol(given, new_request(KEY, asked))
    assert Register(ca).certificates() == ()
    assert record(ca)["used_by"] == ""  # a wrong try does not use it up
    issuer.enrol(token, REQUEST)


def test_a_wrong_secret_or_an_unknown_token_gets_nothing(issuer: Issuer, token: Token) -> None:
    wrong = ("A" if token.secret[0] != "A" else "B") + token.secret[1:]
    for given in (replace(token, secret=wrong), replace(token, id="0" * 16)):
        with pytest.raises(TokenRefused, match="no such token"):
            issuer.enrol(given, REQUEST)


def test_a_token_of_another_ca_gets_nothing(tmp_path: Path, token: Token) -> None:
    Authority.create("ward", now=NOW).write(tmp_path / "other")
    with pytest.raises(TokenRefused, match="no such token"):
        Issuer(tmp_path / "other", "ward", days=30, clock=Clock()).enrol(token, REQUEST)


def test_a_token_is_used_up_before_anything_is_signed(
    ca: Path, issuer: Issuer, token: Token, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, str]] = []

    def crash(*_: object, **__: object) -> None:
        seen.append(record(ca))
        raise RegisterError("the power went away")

    with monkeypatch.context() as patched:
        patched.setattr(issuing, "sign_request", crash)
        with pytest.raises(RegisterError):
            issuer.enrol(token, REQUEST)
    assert seen[0]["used_by"] == read_request(REQUEST, federation="ward").key_fingerprint.hex()
    with pytest.raises(TokenRefused):
        issuer.enrol(token, new_request(p256(), SITE))
    issuer.enrol(token, REQUEST)  # the same key goes on where it stopped


def test_a_certificate_that_cannot_be_registered_does_not_go_out(ca: Path, issuer: Issuer, token: Token) -> None:
    (ca / "issued").write_text("not a directory")
    with pytest.raises(RegisterError):
        issuer.enrol(token, REQUEST)
    assert record(ca)["certificate"] == ""


def test_the_secret_is_nowhere_but_in_the_token(ca: Path, issuer: Issuer, token: Token) -> None:
    issuer.enrol(token, REQUEST)
    assert len(token.secret) == 43  # 256 bits
    assert token.secret not in repr(token)
    for path in ca.rglob("*"):
        assert not path.is_file() or token.secret.encode() not in path.read_bytes()
    for bad in (replace(token, id="0" * 16), replace(token, secret="A" * 43)):
        with pytest.raises(TokenRefused) as caught:
            issuer.enrol(bad, REQUEST)
        assert bad.secret not in str(caught.value)
        assert bad.id not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "participant:site-a:0123456789abcdef",
        "participant:site-a:../../etc/passwd0:" + "A" * 43,
        "participant:site-a:0123456789ABCDEF:" + "A" * 43,
        "participant:site-a:0123456789abcdef:" + "A" * 42,
        "participant:site-a:0123456789abcdef:" + "A" * 42 + "/",
        "nobody:site-a:0123456789abcdef:" + "A" * 43,
        "participant:Site A:0123456789abcdef:" + "A" * 43,
        "participant:site-a:0123456789abcdef:" + "A" * 43 + ":x",
        "participant:site-a:0123456789abcdef:" + "A" * 5000,
    ],
)
def test_what_is_no_token_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(NotAToken) as caught:
        Token.parse(text)
    assert not text or text not in str(caught.value)


def test_a_coordinator_does_not_enrol_by_token(ca: Path) -> None:
    with pytest.raises(TokenError, match="request"):
        TokenBook(ca).make(Identity("ward", Role.COORDINATOR, "main"), expires=NOW)


def test_a_renewal_is_for_the_caller_and_a_new_key(ca: Path, issuer: Issuer, token: Token) -> None:
    issuer.enrol(token, REQUEST)
    authority = Authority.load(ca)
    (line,) = Register(ca).certificates()
    caller = authority.roots.verify(to_der(line.certificate), now=NOW)
    new = p256()
    with pytest.raises(RequestError, match="new key"):
        issuer.renew(caller, REQUEST)
    for other in (Identity("ward", Role.PARTICIPANT, "site-b"), Identity("ward", Role.OPERATOR, "site-a")):
        with pytest.raises(RequestError, match="may not ask"):
            issuer.renew(caller, new_request(new, other))
    assert len(Register(ca).certificates()) == 1
    issuer.renew(caller, new_request(new, SITE))
    keys = [line.certificate.public_key() for line in Register(ca).certificates()]
    assert len(keys) == 2
    assert KEY.public_key() in keys
    assert new.public_key() in keys


def test_a_ca_that_nobody_trusts_is_noticed_at_the_start(tmp_path: Path, issuer: Issuer, ca: Path) -> None:
    issuer.check(Authority.load(ca).roots)
    with pytest.raises(UserError, match=issuing.NOT_THE_CA):
        issuer.check(Authority.create("ward", now=NOW).roots)
