"""What `tls.py` decides without a connection: the import order, the options, and who is at the other end."""

import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from maskwork.net import tls
from maskwork.net.authority import Authority
from maskwork.net.identity import Identity, IdentityError, IdentityFiles, IdentityProblem, Role, fingerprint, to_der

NOW = 1_800_000_000.0
AUTHORITY = Authority.create("ward", now=NOW)
SITE = Identity("ward", Role.PARTICIPANT, "site-a")
LEAF = AUTHORITY.sign(ec.generate_private_key(ec.SECP256R1()).public_key(), SITE, now=NOW, days=30)

GOOD: Mapping[str, list[bytes]] = {
    "transport_security_type": [b"ssl"],
    "security_level": [b"TSI_PRIVACY_AND_INTEGRITY"],
    "ssl_tls_version": [b"TLSv1.3"],
    "x509_pem_cert": [LEAF.public_bytes(Encoding.PEM)],
}


@dataclass(frozen=True)
class Call:
    """Stands for a ServicerContext."""

    properties: Mapping[str, Iterable[bytes]] = field(default_factory=lambda: GOOD)

    def auth_context(self) -> Mapping[str, Iterable[bytes]]:
        return self.properties


def test_the_caller_is_verified_anew() -> None:
    caller = tls.peer_identity(Call(), AUTHORITY.roots, now=NOW, federation="ward")
    assert (caller.identity, caller.fingerprint) == (SITE, fingerprint(to_der(LEAF)))


@pytest.mark.parametrize(
    ("key", "values", "problem"),
    [
        ("transport_security_type", [b"insecure"], IdentityProblem.MALFORMED),
        ("transport_security_type", None, IdentityProblem.MALFORMED),
        ("security_level", [b"TSI_INTEGRITY_ONLY"], IdentityProblem.MALFORMED),
        ("security_level", [], IdentityProblem.MALFORMED),
        ("ssl_tls_version", [b"TLSv1.2"], IdentityProblem.TLS_TOO_OLD),
        ("ssl_tls_version", [b"TLSv1.3", b"TLSv1.2"], IdentityProblem.MALFORMED),
        ("ssl_tls_version", None, IdentityProblem.MALFORMED),
        ("x509_pem_cert", None, IdentityProblem.MALFORMED),
        ("x509_pem_cert", [b"hello"], IdentityProblem.MALFORMED),
        ("x509_pem_cert", 2 * GOOD["x509_pem_cert"], IdentityProblem.MALFORMED),
    ],
)
def test_a_connection_that_is_not_as_it_should_be(
    key: str, values: list[bytes] | None, problem: IdentityProblem
) -> None:
    properties = {k: v for k, v in {**GOOD, key: values}.items() if v is not None}
    with pytest.raises(IdentityError) as caught:
        tls.peer_identity(Call(properties), AUTHORITY.roots, now=NOW)
    assert caught.value.problem is problem


def test_a_long_connection_does_not_outlive_its_certificate() -> None:
    roots, revoked = AUTHORITY.roots, {fingerprint(to_der(LEAF))}
    refused: tuple[tuple[Callable[[], object], IdentityProblem], ...] = (
        (lambda: tls.peer_identity(Call(), roots, now=NOW + 31 * 86400), IdentityProblem.EXPIRED),
        (lambda: tls.peer_identity(Call(), roots, now=NOW, federation="other"), IdentityProblem.WRONG_FEDERATION),
        (lambda: tls.peer_identity(Call(), roots, now=NOW, is_revoked=revoked), IdentityProblem.REVOKED),
    )
    for look, problem in refused:
        with pytest.raises(IdentityError) as caught:
            look()
        assert caught.value.problem is problem


def test_credentials_name_the_file_that_is_missing(tmp_path: Path) -> None:
    files = IdentityFiles.in_directory(tmp_path)
    for make in (tls.server_credentials, tls.channel_credentials):
        with pytest.raises(IdentityError, match=r"\.pem cannot be read"):
            make(files)


def test_the_servers_ping_policy_allows_the_clients_keepalive() -> None:
    server, channel = dict(tls.SERVER_OPTIONS), dict(tls.CHANNEL_OPTIONS)
    assert len(server) == len(tls.SERVER_OPTIONS)
    assert len(channel) == len(tls.CHANNEL_OPTIONS)
    assert server["grpc.http2.min_ping_interval_without_data_ms"] < channel["grpc.keepalive_time_ms"]
    assert server["grpc.keepalive_permit_without_calls"] == channel["grpc.keepalive_permit_without_calls"] == 1
    assert channel["grpc.http2.max_pings_without_data"] == 0


def test_a_chunk_with_its_envelope_fits_and_each_side_takes_what_the_other_may_send() -> None:
    server, channel = dict(tls.SERVER_OPTIONS), dict(tls.CHANNEL_OPTIONS)
    assert server["grpc.max_receive_message_length"] > tls.CHUNK_BYTES + 4096
    assert server["grpc.max_receive_message_length"] == channel["grpc.max_send_message_length"]
    assert channel["grpc.max_receive_message_length"] == server["grpc.max_send_message_length"]
    assert channel["grpc.min_reconnect_backoff_ms"] >= server["grpc.server_handshake_timeout_ms"]


IMPORT_ORDERS = {
    "maskwork first": ("import maskwork.net, grpc, maskwork.net.tls", {}, True),
    "tls alone": ("import maskwork.net.tls", {}, True),
    "grpc first": ("import grpc, maskwork.net.tls", {}, False),
    "grpc first, set afterwards": ("import grpc, maskwork.net; import maskwork.net.tls", {}, False),
    "grpc first, another list": ("import grpc, maskwork.net.tls", {"GRPC_SSL_CIPHER_SUITES": "ALL"}, False),
    "another list is replaced": ("import maskwork.net.tls", {"GRPC_SSL_CIPHER_SUITES": "ALL"}, True),
    "grpc first, the right list": (
        "import grpc, maskwork.net.tls",
        {"GRPC_SSL_CIPHER_SUITES": "ECDHE-RSA-AES256-GCM-SHA384"},
        True,
    ),
}


@pytest.mark.parametrize("case", IMPORT_ORDERS)
def test_grpc_must_not_have_been_imported_with_another_list_of_suites(case: str) -> None:
    script, environment, good = IMPORT_ORDERS[case]
    check = "; import os; assert os.environ['GRPC_SSL_CIPHER_SUITES'].startswith('ECDHE-RSA')"
    done = subprocess.run(
        [sys.executable, "-c", script + check], capture_output=True, text=True, timeout=60, env=environment
    )
    assert (done.returncode == 0) is good, done.stderr
    if not good:
        assert "RuntimeError: grpc was imported before maskwork.net" in done.stderr
