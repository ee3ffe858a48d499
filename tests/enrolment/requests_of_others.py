"""Requests that `maskwork pki request` would never write; not a test itself."""

from collections.abc import Sequence

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.hazmat.primitives.serialization import Encoding

URI = "spiffe://ward/participant/site-a"
Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


def p256() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def request_of(
    *names: x509.GeneralName,
    key: Key | None = None,
    extensions: Sequence[x509.ExtensionType] = (),
    digest: SHA256 | SHA384 | None = None,
) -> bytes:
    """A request with just these names (the usual URI if there are none) and extensions."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    builder = builder.add_extension(
        x509.SubjectAlternativeName(names or (x509.UniformResourceIdentifier(URI),)), critical=False
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=True)
    return builder.sign(key or p256(), digest or SHA256()).public_bytes(Encoding.PEM)


def with_another_key(pem: bytes) -> bytes:
    """The request with another key in it, still under the first key's signature."""
    request = x509.load_pem_x509_csr(pem)
    there, other = request.public_key(), p256().public_key()
    assert isinstance(there, ec.EllipticCurvePublicKey)
    der = request.public_bytes(Encoding.DER)
    put = der.replace(_point(there), _point(other))
    assert put != der
    return x509.load_der_x509_csr(put).public_bytes(Encoding.PEM)


def _point(key: ec.EllipticCurvePublicKey) -> bytes:
    numbers = key.public_numbers()
    return numbers.x.to_bytes(32, "big") + numbers.y.to_bytes(32, "big")


def uri(text: str) -> x509.UniformResourceIdentifier:
    return x509.UniformResourceIdentifier(text)


CA_TRUE = x509.BasicConstraints(ca=True, path_length=None)
USAGE = x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.SERVER_AUTH])
EVIL: dict[str, tuple[bytes, str]] = {
    "ca": (request_of(extensions=[CA_TRUE]), "2.5.29.19"),
    "not-even-ca-false": (request_of(extensions=[x509.BasicConstraints(False, None)]), "2.5.29.19"),
    "server-auth": (request_of(extensions=[USAGE]), "2.5.29.37"),
    "a-second-uri": (request_of(uri(URI), uri("spiffe://ward/operator/root")), "2 URI names"),
    "no-uri": (request_of(x509.DNSName("hub.example.org")), "0 URI names"),
    "a-host": (request_of(uri(URI), x509.DNSName("hub.example.org")), "only dials out"),
    "an-address": (request_of(uri(URI), x509.RFC822Name("a@example.org")), "neither the identity nor host names"),
    "a-wildcard": (
        request_of(uri("spiffe://ward/coordinator/main"), x509.DNSName("*.example.org")),
        "not a host name",
    ),
    "a-coordinator-without-host": (request_of(uri("spiffe://ward/coordinator/main")), "0 host names"),
    "another-federation": (request_of(uri("spiffe://other/participant/site-a")), "of the federation 'other'"),
    "a-role-of-nobody": (request_of(uri("spiffe://ward/root/site-a")), "no role of ours"),
    "a-name-of-its-own-spelling": (request_of(uri("spiffe://ward/participant/Site-A")), "not allowed"),
    "rsa": (request_of(key=rsa.generate_private_key(65537, 2048)), "not ECDSA P-256"),
    "another-curve": (request_of(key=ec.generate_private_key(ec.SECP384R1())), "not ECDSA P-256"),
    "another-digest": (request_of(digest=SHA384()), "not signed with its own key"),
    "broken-signature": (with_another_key(request_of()), "not signed with its own key"),
    "no-request": (b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n", "not a readable"),
    "nothing": (b"", "not a readable"),
    "far-too-long": (request_of() + b"\n" * 20_000, "at most 16384"),
}
"""A request that is to be refused, and what the refusal says."""
