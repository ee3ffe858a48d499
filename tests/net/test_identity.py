"""Names, certificates and trust roots: what is accepted, and the reason for each refusal."""

import ipaddress
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as st

from maskwork.net import identity
from maskwork.net.authority import Authority
from maskwork.net.identity import (
    Identity,
    IdentityError,
    IdentityProblem,
    ParticipantVerifier,
    Role,
    TrustRoots,
    certificate_identity,
    fingerprint,
    serial_bytes,
    to_der,
)
from maskwork.net.signed_der import signed_der

NOW = 1_800_000_000.0
DAY = 86400.0
P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551

AUTHORITY = Authority.create("ward", now=NOW)
ROOTS = AUTHORITY.roots
KEY = ec.generate_private_key(ec.SECP256R1())
SITE = Identity("ward", Role.PARTICIPANT, "site-a")
LEAF = AUTHORITY.sign(KEY.public_key(), SITE, now=NOW, days=30)
DER = to_der(LEAF)

LABEL = st.from_regex(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?", fullmatch=True)


def problem_of(call: Callable[[], object]) -> IdentityProblem:
    with pytest.raises(IdentityError) as caught:
        call()
    assert str(caught.value) == caught.value.text
    return caught.value.problem


# --- names ----------------------------------------------------------------------------------------------------------


@given(LABEL, st.sampled_from(Role), LABEL)
def test_parse_is_the_inverse_of_uri(federation: str, role: Role, name: str) -> None:
    identity = Identity(federation, role, name)
    assert Identity.parse(identity.uri) == identity


@given(st.text(max_size=80) | st.text(alphabet="spiffe:/wardticnoprx.-_A%é\n", max_size=60).map("spiffe://".__add__))
def test_whatever_parses_is_written_the_same_way(text: str) -> None:
    try:
        identity = Identity.parse(text)
    except IdentityError:
        return
    assert identity.uri == text


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "ward/participant/a",
        "spiffe://ward/participant",
        "spiffe://ward/participant/",
        "spiffe:///participant/a",
        "spiffe://ward/participant/a/b",
        "spiffe://ward/participant/a/",
        "SPIFFE://ward/participant/a",
        "https://ward/participant/a",
        "spiffe://Ward/participant/a",
        "spiffe://ward/Participant/a",
        "spiffe://ward/root/a",
        "spiffe://ward/participant/A",
        "spiffe://ward/participant/a b",
        "spiffe://ward/participant/a%20",
        "spiffe://ward/participant/..",
        "spiffe://ward/participant/a\n",
        "spiffe://ward/participant/é",
        "spiffe://ward/participant/٣",
        "spiffe://ward/participant/a?x",
        "spiffe://user@ward/participant/a",
        "spiffe://ward:443/participant/a",
        "spiffe://ward/participant/" + "a" * 64,
        "spiffe://" + "a" * 64 + "/participant/a",
    ],
)
def test_a_name_that_is_not_ours_is_refused(uri: str) -> None:
    assert problem_of(lambda: Identity.parse(uri)) is IdentityProblem.MALFORMED


def test_a_strangers_text_is_shortened_and_escaped_in_errors() -> None:
    with pytest.raises(IdentityError) as caught:
        Identity.parse("\x1b[2J" * 1000)
    assert "\x1b" not in caught.value.text
    assert len(caught.value.text) < 600


# --- what a good certificate gives ----------------------------------------------------------------------------------


@pytest.mark.parametrize("role", list(Role))
def test_each_role_verifies_as_itself_and_as_no_other(role: Role) -> None:
    issued = AUTHORITY.issue(role, "x", now=NOW, dns_names=["localhost"] if role is Role.COORDINATOR else [])
    certificate = x509.load_pem_x509_certificate(issued.cert_pem)
    verified = ROOTS.verify(to_der(certificate), now=NOW, role=role, federation="ward")
    assert verified.identity == Identity("ward", role, "x")
    assert verified.fingerprint == certificate.fingerprint(SHA256())
    assert verified.public_key == certificate.public_key()
    for other in set(Role) - {role}:
        with pytest.raises(IdentityError, match=f"role {role} where {other} is needed"):
            ROOTS.verify(verified.der, now=NOW, role=other)


def test_the_port_of_the_protocol_core() -> None:
    verifier = ParticipantVerifier(ROOTS, "ward")
    peer = verifier.verify_participant(DER, NOW)
    assert (peer.name, peer.fingerprint, peer.public_key) == ("site-a", fingerprint(DER), KEY.public_key())
    operator = AUTHORITY.sign(KEY.public_key(), Identity("ward", Role.OPERATOR, "o"), now=NOW, days=1)
    assert problem_of(lambda: verifier.verify_participant(to_der(operator), NOW)) is IdentityProblem.WRONG_ROLE
    other = ParticipantVerifier(ROOTS, "another")
    assert problem_of(lambda: other.verify_participant(DER, NOW)) is IdentityProblem.WRONG_FEDERATION
    revoked = ParticipantVerifier(ROOTS, "ward", {fingerprint(DER)})
    with pytest.raises(ValueError, match="revoked"):
        revoked.verify_participant(DER, NOW)


def test_validity_is_closed_at_both_ends() -> None:
    begin, end = LEAF.not_valid_before_utc.timestamp(), LEAF.not_valid_after_utc.timestamp()
    assert ROOTS.verify(DER, now=begin).not_before == begin
    assert ROOTS.verify(DER, now=end).not_after == end
    assert problem_of(lambda: ROOTS.verify(DER, now=begin - 1)) is IdentityProblem.NOT_YET_VALID
    assert problem_of(lambda: ROOTS.verify(DER, now=end + 1)) is IdentityProblem.EXPIRED
    assert problem_of(lambda: ROOTS.verify(DER, now=float("nan"))) is IdentityProblem.EXPIRED


def test_an_expired_ca_vouches_for_nobody() -> None:
    short = Authority.create("ward", now=NOW, days=10)
    leaf = short.sign(KEY.public_key(), SITE, now=NOW, days=10)
    # A leaf that outlives its CA, as a careless CA could sign one.
    forever = forge(short, end=datetime.fromtimestamp(NOW + 100 * DAY, UTC))
    assert short.roots.verify(to_der(leaf), now=NOW + 9 * DAY).identity == SITE
    assert problem_of(lambda: short.roots.verify(forever, now=NOW + 11 * DAY)) is IdentityProblem.EXPIRED


# --- who signed it --------------------------------------------------------------------------------------------------


def test_a_ca_of_the_same_name_is_told_apart() -> None:
    impostor = Authority.create("ward", now=NOW)
    forged = to_der(impostor.sign(KEY.public_key(), SITE, now=NOW, days=30))
    with pytest.raises(IdentityError, match="same name") as caught:
        ROOTS.verify(forged, now=NOW)
    assert caught.value.problem is IdentityProblem.WRONG_CA


def test_a_ca_of_another_name_is_named() -> None:
    other = Authority.create("elsewhere", now=NOW)
    stranger = to_der(other.sign(KEY.public_key(), Identity("ward", Role.PARTICIPANT, "a"), now=NOW, days=30))
    with pytest.raises(IdentityError, match="elsewhere") as caught:
        ROOTS.verify(stranger, now=NOW)
    assert caught.value.problem is IdentityProblem.WRONG_CA


def test_while_a_ca_is_replaced_both_are_roots() -> None:
    successor = Authority.create("ward", now=NOW)
    both = TrustRoots([AUTHORITY.certificate, successor.certificate])
    assert both.verify(DER, now=NOW).identity == SITE
    assert both.verify(to_der(successor.sign(KEY.public_key(), SITE, now=NOW, days=1)), now=NOW).identity == SITE


def test_a_members_certificate_signs_nobody() -> None:
    member = Authority("ward", LEAF, KEY)
    grandchild = to_der(member.sign(KEY.public_key(), Identity("ward", Role.OPERATOR, "me"), now=NOW, days=1))
    assert problem_of(lambda: ROOTS.verify(grandchild, now=NOW)) is IdentityProblem.WRONG_CA
    assert problem_of(lambda: TrustRoots([LEAF])) is IdentityProblem.WRONG_USAGE


def test_the_ca_itself_is_no_member() -> None:
    refused = problem_of(lambda: ROOTS.verify(to_der(AUTHORITY.certificate), now=NOW))
    assert refused is IdentityProblem.MALFORMED  # it names no identity


def test_roots_must_be_cas(tmp_path: Path) -> None:
    assert problem_of(lambda: TrustRoots([])) is IdentityProblem.MALFORMED
    assert problem_of(lambda: TrustRoots.from_pem(b"hello")) is IdentityProblem.MALFORMED
    assert problem_of(lambda: TrustRoots.from_file(tmp_path / "ca.pem")) is IdentityProblem.UNREADABLE
    path = tmp_path / "ca.pem"
    path.write_bytes(AUTHORITY.certificate.public_bytes(Encoding.PEM))
    assert TrustRoots.from_file(path).certificates == (AUTHORITY.certificate,)


# --- the profile: each deviation, and its reason ----------------------------------------------------------------------


def forge(
    authority: Authority = AUTHORITY,
    *,
    uris: tuple[str, ...] = (SITE.uri,),
    end: datetime | None = None,
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey = KEY,
    ca: bool = False,
    signs: bool | None = True,
    purposes: tuple[x509.ObjectIdentifier, ...] | None = (ExtendedKeyUsageOID.CLIENT_AUTH,),
    digest: SHA256 | SHA384 | None = None,
    unknown: tuple[bool, int] | None = None,
) -> bytes:
    """A certificate with the CA's good signature and one thing wrong."""
    begin = datetime.fromtimestamp(NOW, UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "ward")]))
        .issuer_name(authority.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end or begin + timedelta(days=30))
        .add_extension(x509.BasicConstraints(ca, None), critical=True)
    )
    if uris:
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in uris]
        names.append(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    if signs is not None:
        usage = x509.KeyUsage(signs, not signs, False, False, False, ca and not signs, False, False, False)
        builder = builder.add_extension(usage, critical=True)
    if purposes is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
    if unknown is not None:
        critical, length = unknown
        extension = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.99999.1"), bytes(length))
        builder = builder.add_extension(extension, critical=critical)
    return to_der(builder.sign(authority.key, digest or SHA256()))


def test_a_serial_number_that_no_list_could_name_is_refused_though_the_ca_signed_it() -> None:
    tbs = bytearray(LEAF.tbs_certificate_bytes)
    at = tbs.index(b"\xa0\x03\x02\x01\x02\x02") + 7  # version 3, then INTEGER and its length
    tbs[at] |= 0x80
    signature = AUTHORITY.key.sign(bytes(tbs), ec.ECDSA(SHA256()))
    refused = problem_of(lambda: ROOTS.verify(signed_der(bytes(tbs), signature), now=NOW))
    assert refused is IdentityProblem.MALFORMED


def test_the_forge_makes_good_certificates_when_nothing_is_wrong() -> None:
    assert ROOTS.verify(forge(), now=NOW).identity == SITE
    assert ROOTS.verify(forge(unknown=(False, 5000)), now=NOW).identity == SITE


CLIENT, SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH
COORDINATOR_URI = "spiffe://ward/coordinator/main"


@pytest.mark.parametrize(
    ("der", "problem"),
    [
        pytest.param(forge(uris=()), IdentityProblem.MALFORMED, id="no URI name"),
        pytest.param(forge(uris=(SITE.uri, COORDINATOR_URI)), IdentityProblem.MALFORMED, id="two URI names"),
        pytest.param(forge(uris=(SITE.uri, SITE.uri)), IdentityProblem.MALFORMED, id="the same URI name twice"),
        pytest.param(forge(uris=("https://ward",)), IdentityProblem.MALFORMED, id="a URI that is no identity"),
        pytest.param(forge(ca=True), IdentityProblem.WRONG_USAGE, id="a CA"),
        pytest.param(forge(signs=False), IdentityProblem.WRONG_USAGE, id="no digitalSignature"),
        pytest.param(forge(signs=None), IdentityProblem.WRONG_USAGE, id="no key usage"),
        pytest.param(forge(purposes=None), IdentityProblem.WRONG_USAGE, id="no extended key usage"),
        pytest.param(forge(purposes=(SERVER,)), IdentityProblem.WRONG_USAGE, id="a server only"),
        pytest.param(forge(purposes=(CLIENT, SERVER)), IdentityProblem.WRONG_USAGE, id="a participant that may serve"),
        pytest.param(
            forge(uris=(COORDINATOR_URI,)), IdentityProblem.WRONG_USAGE, id="a coordinator that may not serve"
        ),
        pytest.param(forge(key=ec.generate_private_key(ec.SECP384R1())), IdentityProblem.WEAK_KEY, id="another curve"),
        pytest.param(forge(key=rsa.generate_private_key(65537, 2048)), IdentityProblem.WEAK_KEY, id="RSA"),
        pytest.param(forge(digest=SHA384()), IdentityProblem.MALFORMED, id="another digest"),
        pytest.param(forge(unknown=(True, 2)), IdentityProblem.MALFORMED, id="an unknown critical extension"),
        pytest.param(b"", IdentityProblem.MALFORMED, id="nothing"),
        pytest.param(DER + b"\x00", IdentityProblem.MALFORMED, id="something behind it"),
        pytest.param(DER[:-1], IdentityProblem.MALFORMED, id="cut short"),
        pytest.param(b"\x30" * 100_000, IdentityProblem.MALFORMED, id="too long"),
        pytest.param(forge(unknown=(False, 8192)), IdentityProblem.MALFORMED, id="longer than is read"),
    ],
)
def test_a_certificate_outside_the_profile_is_refused(der: bytes, problem: IdentityProblem) -> None:
    assert problem_of(lambda: ROOTS.verify(der, now=NOW)) is problem


CURVE_384 = ec.generate_private_key(ec.SECP384R1())


def test_a_forged_ca_can_be_a_root_when_nothing_is_wrong() -> None:
    root = x509.load_der_x509_certificate(forge(ca=True, signs=False, purposes=None))
    assert TrustRoots([root]).certificates == (root,)


@pytest.mark.parametrize(
    ("der", "problem"),
    [
        pytest.param(forge(signs=False), IdentityProblem.WRONG_USAGE, id="not a CA"),
        pytest.param(forge(ca=True, signs=True), IdentityProblem.WRONG_USAGE, id="may not sign certificates"),
        pytest.param(forge(ca=True, signs=None), IdentityProblem.WRONG_USAGE, id="no key usage"),
        pytest.param(forge(ca=True, signs=False, key=CURVE_384), IdentityProblem.WEAK_KEY, id="another curve"),
        pytest.param(forge(ca=True, signs=False, digest=SHA384()), IdentityProblem.WEAK_KEY, id="another digest"),
        pytest.param(
            forge(ca=True, signs=False, unknown=(True, 2)), IdentityProblem.MALFORMED, id="unknown critical extension"
        ),
    ],
)
def test_a_root_outside_the_profile_is_refused(der: bytes, problem: IdentityProblem) -> None:
    assert problem_of(lambda: TrustRoots([x509.load_der_x509_certificate(der)])) is problem


def test_certificate_identity_reads_without_judging() -> None:
    stranger = Authority.create("elsewhere", now=NOW).sign(KEY.public_key(), SITE, now=NOW, days=1)
    assert certificate_identity(stranger) == SITE


# --- one encoding -----------------------------------------------------------------------------------------------------


@given(st.integers(0, len(DER) - 1), st.integers(1, 255))
def test_a_changed_byte_never_verifies(index: int, change: int) -> None:
    mutated = bytearray(DER)
    mutated[index] ^= change
    with pytest.raises(IdentityError):
        ROOTS.verify(bytes(mutated), now=NOW)


def test_no_byte_outside_the_signed_part_can_change() -> None:
    # Nothing signs these bytes, so only their one accepted encoding protects them: try every value of each.
    head = DER.index(LEAF.tbs_certificate_bytes)
    tail = head + len(LEAF.tbs_certificate_bytes)
    signature = DER.index(LEAF.signature)
    for index in [*range(head), *range(tail, signature), *range(signature, signature + 6)]:
        for value in set(range(256)) - {DER[index]}:
            mutated = DER[:index] + bytes((value,)) + DER[index + 1 :]
            with pytest.raises(IdentityError):
                ROOTS.verify(mutated, now=NOW)


def test_a_wrong_count_of_unused_bits_is_refused() -> None:
    # Found by the test above: parsers take any count whose bits are zero, and verify the signature all the same.
    while (leaf := AUTHORITY.sign(KEY.public_key(), SITE, now=NOW, days=1)).signature[-1] & 1:
        continue
    der = to_der(leaf)
    index = der.index(leaf.signature) - 1
    assert problem_of(lambda: ROOTS.verify(der[:index] + b"\x01" + der[index + 1 :], now=NOW)) is (
        IdentityProblem.MALFORMED
    )


# --- revocation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [fingerprint(DER), serial_bytes(LEAF)], ids=["fingerprint", "serial"])
def test_a_revoked_certificate_is_refused(name: bytes) -> None:
    assert problem_of(lambda: ROOTS.verify(DER, now=NOW, is_revoked={name})) is IdentityProblem.REVOKED
    assert ROOTS.verify(DER, now=NOW, is_revoked={bytes(32), bytes(20)}).identity == SITE


def test_a_revoked_certificate_does_not_come_back_under_another_fingerprint() -> None:
    r, s = decode_dss_signature(LEAF.signature)
    flipped = encode_dss_signature(r, P256_ORDER - s)
    body = LEAF.tbs_certificate_bytes + bytes.fromhex("300a06082a8648ce3d040302")
    body += bytes((0x03, len(flipped) + 1, 0)) + flipped
    twin = b"\x30\x82" + len(body).to_bytes(2, "big") + body
    assert fingerprint(twin) != fingerprint(DER)
    assert ROOTS.verify(twin, now=NOW).identity == SITE
    assert problem_of(lambda: ROOTS.verify(twin, now=NOW, is_revoked={fingerprint(DER)})) is IdentityProblem.REVOKED


def fresh_roots() -> TrustRoots:
    """Trust roots that have not seen a certificate yet."""
    return TrustRoots(ROOTS.certificates)


def test_a_certificate_that_is_known_is_still_asked_for_its_time_its_list_and_its_role() -> None:
    """What a certificate says is remembered; whether it is good now is not."""
    roots = fresh_roots()
    verified = roots.verify(DER, now=NOW)
    assert roots.verify(DER, now=NOW) == verified
    assert problem_of(lambda: roots.verify(DER, now=verified.not_after + 1)) is IdentityProblem.EXPIRED
    assert problem_of(lambda: roots.verify(DER, now=verified.not_before - 1)) is IdentityProblem.NOT_YET_VALID
    revoked = {verified.fingerprint}
    assert problem_of(lambda: roots.verify(DER, now=NOW, is_revoked=revoked)) is IdentityProblem.REVOKED
    assert problem_of(lambda: roots.verify(DER, now=NOW, role=Role.OPERATOR)) is IdentityProblem.WRONG_ROLE
    assert problem_of(lambda: roots.verify(DER, now=NOW, federation="bay")) is IdentityProblem.WRONG_FEDERATION


def test_what_was_refused_is_refused_again() -> None:
    roots, impostor = fresh_roots(), Authority.create("ward", now=NOW)
    forged = to_der(impostor.sign(KEY.public_key(), SITE, now=NOW, days=30))
    for _ in range(2):
        assert problem_of(lambda: roots.verify(forged, now=NOW)) is IdentityProblem.WRONG_CA


def test_a_ca_that_expires_takes_what_was_known_with_it() -> None:
    short = Authority.create("ward", now=NOW, days=10)
    forever = forge(short, end=datetime.fromtimestamp(NOW + 100 * DAY, UTC))
    roots = TrustRoots(short.roots.certificates)
    assert roots.verify(forever, now=NOW).identity == SITE
    assert problem_of(lambda: roots.verify(forever, now=NOW + 11 * DAY)) is IdentityProblem.EXPIRED


def test_no_more_certificates_are_remembered_than_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "KNOWN_CERTIFICATES", 3)
    roots = fresh_roots()
    for i in range(8):
        der = to_der(AUTHORITY.sign(KEY.public_key(), Identity("ward", Role.PARTICIPANT, f"s{i}"), now=NOW, days=30))
        assert roots.verify(der, now=NOW).name == roots.verify(der, now=NOW).name == f"s{i}"
        assert len(roots._known) <= 3
