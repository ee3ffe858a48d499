"""Mutual TLS 1.3 for gRPC: credentials, channel and server options, and who is at the other end.

Everything of ours that makes gRPC credentials does it here. There is no insecure mode.

It is NOT where certificates are judged (`maskwork.net.identity`) nor where permissions are
(`maskwork.net.permissions`); it hands the one to the other. It does not retry and holds no connection.

Rules it upholds:

1. **TLS 1.3 only.** gRPC for Python has no setting for the least TLS version. So the list of TLS 1.2 suites is
   set to an RSA suite, which no certificate of ours fits, before gRPC is imported (`maskwork.net` does that);
   then neither side can agree on 1.2. Should gRPC have been imported earlier, with another list, this module
   refuses to be imported. `peer_identity` looks at the negotiated version too.
2. Both sides present a certificate, and both verify the other's. gRPC's own check (chain, validity, and host
   name at the client) comes first; the server verifies again, with all of `TrustRoots.verify`, on each call.
3. What gRPC leaves to defaults that matter here is set, below, each with its reason.

Sources: DESIGN sections 5 and 7; gRPC core, `include/grpc/impl/channel_arg_names.h`; gRFC A8 (keepalive).
"""

from collections.abc import Callable, Container, Iterable, Mapping
from functools import lru_cache
from typing import Final, Protocol, cast

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

import maskwork.net
from maskwork.net.diagnosis import check_own_files, explain_connection_failure, probe_server
from maskwork.net.identity import (
    KNOWN_CERTIFICATES,
    UNREADABLE_CERTIFICATE,
    IdentityError,
    IdentityFiles,
    IdentityProblem,
    TrustRoots,
    VerifiedCertificate,
    read_identity_file,
    to_der,
)
from maskwork.net.loaded import LoadedIdentity
from maskwork.net.names import malformed, shortened

__all__ = [
    "CHANNEL_OPTIONS",
    "CHUNK_BYTES",
    "SERVER_OPTIONS",
    "HasAuthContext",
    "channel_credentials",
    "check_own_files",
    "enrolling_credentials",
    "enrolment_server_credentials",
    "explain_connection_failure",
    "loaded_channel_credentials",
    "peer_identity",
    "probe_server",
    "renewable_server_credentials",
    "server_credentials",
]

if maskwork.net.GRPC_CAME_FIRST:
    raise RuntimeError(
        f"grpc was imported before maskwork.net with another {maskwork.net.CIPHER_SUITES_VARIABLE}, so it would accept "
        "TLS 1.2: import maskwork.net (or any module of it) before grpc"
    )

# gRPC counts its asyncio objects and, with the last one, waits in a destructor for its poller thread to end; with a
# call still pending that wait never ends (seen: a process hung in a garbage collection). One count is never given back.
grpc.aio.init_grpc_aio()

Options = tuple[tuple[str, int], ...]

CHUNK_BYTES: Final = 1 << 20
"""Payload of one chunk of a vector (DESIGN section 5)."""
SERVER_RECEIVE_BYTES: Final = 2 * CHUNK_BYTES
"""Longest message to the coordinator: a chunk and its envelope, nothing else of ours is as large."""
CLIENT_RECEIVE_BYTES: Final = 8 * CHUNK_BYTES
"""Longest message from the coordinator: rosters and the like come whole."""
METADATA_BYTES: Final = 8 << 10

KEEPALIVE_TIME_MS: Final = 30_000
KEEPALIVE_TIMEOUT_MS: Final = 10_000
HANDSHAKE_TIMEOUT_MS: Final = 10_000

_KEEPALIVE: Final[Options] = (
    # A control stream is silent for as long as a training takes; a site whose network went away, or a
    # NAT that forgot the connection, is noticed after 40 s, not after TCP's quarter of an hour or more.
    ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    # Between two jobs there may be no call at all, and the connection should be known to work.
    ("grpc.keepalive_permit_without_calls", 1),
    # The default of two pings without data in between would end the above after a minute.
    ("grpc.http2.max_pings_without_data", 0),
)

SERVER_OPTIONS: Final[Options] = (
    *_KEEPALIVE,
    # The policy that matches the clients' keepalive: the default (5 minutes) would answer pings every 30 s
    # with GOAWAY "too_many_pings". Half the interval leaves room for jitter.
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_TIME_MS // 2),
    ("grpc.http2.max_ping_strikes", 2),
    # A connection that never finishes its handshake is closed after this; the default is two minutes.
    ("grpc.server_handshake_timeout_ms", HANDSHAKE_TIMEOUT_MS),
    ("grpc.max_receive_message_length", SERVER_RECEIVE_BYTES),
    # What the client would not take is our own mistake, and is told where it is made.
    ("grpc.max_send_message_length", CLIENT_RECEIVE_BYTES),
    ("grpc.max_metadata_size", METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", METADATA_BYTES),
    # One control stream, one upload, one download, a watch, a health check: twice that.
    ("grpc.max_concurrent_streams", 10),
    # The receive window is fixed instead of probed, so that a stream's memory has a bound. Measured: 64 uploads
    # that nobody reads held 306 MB probed, 133 MB with 2 MiB each, 8 MB with the default of 64 KiB; one upload
    # at a round trip of 40 ms ran at 204, 43 and 22 MB/s. Few uploads are admitted at a time, so 2 MiB it is.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 2 * CHUNK_BYTES),
    # A second coordinator on the same port has to fail, not to take half of the connections.
    ("grpc.so_reuseport", 0),
)
"""For ``grpc.aio.server(options=…)``."""

CHANNEL_OPTIONS: Final[Options] = (
    *_KEEPALIVE,
    # After a restart of the coordinator, sites are back within seconds, and a thousand of them do not come at
    # once: gRPC adds 20 % of jitter. The default backs off to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 15_000),
    # Also the time that one attempt may take, handshake included: the server's handshake timeout is no longer.
    ("grpc.min_reconnect_backoff_ms", HANDSHAKE_TIMEOUT_MS),
    ("grpc.max_receive_message_length", CLIENT_RECEIVE_BYTES),
    ("grpc.max_send_message_length", SERVER_RECEIVE_BYTES),
    ("grpc.max_metadata_size", METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", METADATA_BYTES),
    # A site has one download at a time: here probing costs little memory and fills long links.
    ("grpc.http2.bdp_probe", 1),
    # Calls are repeated by the protocol, which knows what may be repeated, never by the library.
    ("grpc.enable_retries", 0),
    # No timeouts, retries or load balancing out of somebody's DNS TXT record.
    ("grpc.service_config_disable_resolution", 1),
)
"""For ``grpc.aio.secure_channel(target, credentials, options=…)``."""


class HasAuthContext(Protocol):
    """The part of ``grpc.aio.ServicerContext`` that tells who is calling."""

    def auth_context(self) -> Mapping[str, Iterable[bytes]]:
        """Properties of the connection, each with its values."""
        ...


def server_credentials(files: IdentityFiles) -> grpc.ServerCredentials:
    """Credentials of a server that demands a client certificate signed by the CA in `files.ca`.

    Call `check_own_files` first: gRPC does not say what is wrong with a file.

    Raises:
        IdentityError: `UNREADABLE`, when a file cannot be read.
    """
    pair = (read_identity_file(files.key), read_identity_file(files.cert))
    return grpc.ssl_server_credentials([pair], read_identity_file(files.ca), require_client_auth=True)


def channel_credentials(files: IdentityFiles) -> grpc.ChannelCredentials:
    """Credentials of a client that trusts the CA in `files.ca` alone and presents its own certificate.

    Call `check_own_files` first: gRPC does not say what is wrong with a file.

    Raises:
        IdentityError: `UNREADABLE`, when a file cannot be read.
    """
    return grpc.ssl_channel_credentials(
        root_certificates=read_identity_file(files.ca),
        private_key=read_identity_file(files.key),
        certificate_chain=read_identity_file(files.cert),
    )


def loaded_channel_credentials(identity: LoadedIdentity) -> grpc.ChannelCredentials:
    """Credentials of a client that goes by the pair that it loaded, whatever the files say by now."""
    return grpc.ssl_channel_credentials(
        root_certificates=identity.ca_pem, private_key=identity.key_pem, certificate_chain=identity.cert_pem
    )


def renewable_server_credentials(current: Callable[[], LoadedIdentity]) -> grpc.ServerCredentials:
    """As `server_credentials`, and each handshake asks `current` for the certificate: none of them needs a restart."""

    def configuration(identity: LoadedIdentity) -> grpc.ServerCertificateConfiguration:
        pair = (identity.key_pem, identity.cert_pem)
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=identity.ca_pem)

    return _dynamic(current, configuration, require_client_auth=True)


def enrolment_server_credentials(current: Callable[[], LoadedIdentity]) -> grpc.ServerCredentials:
    """Credentials of the one port that asks for no client certificate.

    It presents the CA beside its own certificate: who enrols knows no more of the CA than its fingerprint.
    """

    def configuration(identity: LoadedIdentity) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(identity.key_pem, identity.cert_pem + identity.ca_pem)])

    return _dynamic(current, configuration, require_client_auth=False)


def _dynamic(
    current: Callable[[], LoadedIdentity],
    configuration: Callable[[LoadedIdentity], grpc.ServerCertificateConfiguration],
    *,
    require_client_auth: bool,
) -> grpc.ServerCredentials:
    """Credentials that change when `current` does, and only then.

    Whatever is returned for a handshake replaces what other handshakes are using at that moment, and grpcio 1.85 does
    not always survive that: under a thousand connections at a time the process ended with a segmentation fault. None
    leaves everything as it is.
    """
    used = current()

    def changed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal used
        if (identity := current()) is used:
            return None
        used = identity
        return configuration(identity)

    fetch = cast("Callable[[], grpc.ServerCertificateConfiguration]", changed)  # its stubs do not know None
    return grpc.dynamic_ssl_server_credentials(configuration(used), fetch, require_client_auth)


def enrolling_credentials(roots: TrustRoots) -> grpc.ChannelCredentials:
    """Credentials of a client that has no certificate yet, and trusts `roots` alone."""
    pem = b"".join(root.public_bytes(Encoding.PEM) for root in roots.certificates)
    return grpc.ssl_channel_credentials(root_certificates=pem)


def peer_identity(
    context: HasAuthContext,
    roots: TrustRoots,
    *,
    now: float,
    federation: str | None = None,
    is_revoked: Container[bytes] = frozenset(),
) -> VerifiedCertificate:
    """Who is calling, decided anew for this call.

    A connection outlives its handshake by days, so validity and revocation are looked at on each call.

    Args:
        context: The call's ``grpc.aio.ServicerContext``.
        roots: The federation's roots.
        now: Unix time in seconds.
        federation: The federation that the caller has to be of.
        is_revoked: As in `TrustRoots.verify`.

    Raises:
        IdentityError: When the caller is not a member in good standing over TLS 1.3. The text is for our log;
            the caller gets a code and a short phrase.
    """
    properties = context.auth_context()
    _expect(properties, "transport_security_type", b"ssl")
    _expect(properties, "security_level", b"TSI_PRIVACY_AND_INTEGRITY")
    _expect(properties, "ssl_tls_version", b"TLSv1.3")
    pem = _single(properties, "x509_pem_cert")
    try:
        der = _der_of(pem)
    except UNREADABLE_CERTIFICATE:
        raise malformed("the caller's certificate is not readable") from None
    return roots.verify(der, now=now, role=None, federation=federation, is_revoked=is_revoked)


@lru_cache(maxsize=KNOWN_CERTIFICATES)
def _der_of(pem: bytes) -> bytes:
    return to_der(x509.load_pem_x509_certificate(pem))


def _expect(properties: Mapping[str, Iterable[bytes]], key: str, expected: bytes) -> None:
    value = _single(properties, key)
    if value != expected:
        problem = IdentityProblem.TLS_TOO_OLD if key == "ssl_tls_version" else IdentityProblem.MALFORMED
        raise IdentityError(
            problem, f"the caller's connection has {key} {shortened(repr(value))} where {expected!r} is needed"
        )


def _single(properties: Mapping[str, Iterable[bytes]], key: str) -> bytes:
    values = list(properties.get(key, ()))
    if len(values) != 1:
        raise malformed(f"the caller's connection has {len(values)} values of {key} where one is needed")
    return values[0]
