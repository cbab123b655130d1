"""Settings of gRPC: those of the connection, on which both sides must agree, and one of the process; and the channel.

Importing this module makes forks safe: gRPC's own fork handlers abort a child now and then when another thread is
inside a call, as a worker's always is, and forked `DataLoader` workers never speak gRPC. gRPC reads its variable once,
when it is imported, so the packages that import gRPC import this module first.
"""

import ipaddress
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar, final

from thresher.protos.credentials import NO_CREDENTIALS, Credentials
from thresher.protos.errors import ConfigurationError
from thresher.protos.timeouts import PING_SECONDS, PONG_SECONDS

Request = TypeVar("Request")
Call = TypeVar("Call")

FORK_VARIABLE: Final = "GRPC_ENABLE_FORK_SUPPORT"
"""The switch of gRPC's fork handlers. A value that the user has set stays."""

FORKS_ARE_SAFE: Final = FORK_VARIABLE in os.environ or "grpc" not in sys.modules
"""Whether the switch was set before gRPC read it; otherwise somebody had imported gRPC before Thresher."""

os.environ.setdefault(FORK_VARIABLE, "0")

import grpc  # noqa: E402 - reads the variable set above

ERROR_NAME: Final = "thresher-error"
"""Trailing metadata key with the name of the error class, so that the other side raises the same one."""

TOKEN_HEADER: Final = "authorization"  # noqa: S105 - a name, no secret
"""Metadata key of the bearer token (RFC 6750)."""

MESSAGE_BYTES: Final = 4 << 20
"""Largest message: a registration has up to 3 MiB, a chunk 1 MiB. Longer ones are refused before they are read."""

_PING_MS: Final = 1000 * PING_SECONDS
_PONG_MS: Final = 1000 * PONG_SECONDS

CHANNEL_OPTIONS: Final[tuple[tuple[str, int], ...]] = (
    ("grpc.keepalive_time_ms", _PING_MS),
    ("grpc.keepalive_timeout_ms", _PONG_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_http_proxy", 0),  # shards are not on the web, and a proxy there for the web does not know them
    ("grpc.enable_retries", 0),  # a push is repeated by who knows what it means, never by the transport
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
)
"""What a worker sets: an open stream with keepalive is its heartbeat."""

SERVER_OPTIONS: Final[tuple[tuple[str, int], ...]] = (
    ("grpc.keepalive_time_ms", _PING_MS),
    ("grpc.keepalive_timeout_ms", _PONG_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    # A server refuses pings that come more often than this; it must allow what the workers send.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", _PING_MS // 2),
    ("grpc.http2.max_ping_strikes", 0),  # a worker that waits for long pings for long: no reason to close on it
    ("grpc.so_reuseport", 0),  # or a second shard would quietly share the port of the first
    # What one peer may cost; docs/security.md adds it up.
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_metadata_size", 8 << 10),
    ("grpc.absolute_max_metadata_size", 16 << 10),
    ("grpc.max_concurrent_streams", 256),
    ("grpc.server_handshake_timeout_ms", 20_000),
)
"""What a shard sets; it matches `CHANNEL_OPTIONS`."""


def channel(
    address: str, credentials: Credentials = NO_CREDENTIALS, options: Sequence[tuple[str, Any]] = ()
) -> grpc.Channel:
    """Open a channel to a shard; gRPC connects in the background. `check_address` is the caller's.

    Args:
        address: ``host:port``. With TLS the host must be one that the shard's certificate names.
        credentials: What is shown and trusted.
        options: Beside `CHANNEL_OPTIONS`.

    Raises:
        ConfigurationError: when a file of the credentials can no longer be read.
    """
    every = (*CHANNEL_OPTIONS, *options)
    if credentials.tls is None:
        opened = grpc.insecure_channel(address, every)
    else:
        opened = grpc.secure_channel(address, grpc.ssl_channel_credentials(*credentials.tls.read()), every)
    token = credentials.token()
    return opened if token is None else grpc.intercept_channel(opened, _Bearer(token))


@final
@dataclass(frozen=True, slots=True)
class _CallDetails(grpc.ClientCallDetails):
    """What gRPC is told of a call."""

    method: str
    timeout: float | None
    metadata: tuple[tuple[str, str | bytes], ...] | None
    credentials: grpc.CallCredentials | None
    wait_for_ready: bool | None
    compression: grpc.Compression | None


@final
class _Bearer(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Shows the token with every call. gRPC's own call credentials would not do so on loopback's plain text."""

    def __init__(self, token: str) -> None:
        self._header = (TOKEN_HEADER, f"Bearer {token}")

    def _with_token(self, details: grpc.ClientCallDetails) -> grpc.ClientCallDetails:
        return _CallDetails(
            method=details.method,
            timeout=details.timeout,
            metadata=(*(details.metadata or ()), self._header),
            credentials=details.credentials,
            wait_for_ready=details.wait_for_ready,
            compression=details.compression,
        )

    def intercept_unary_unary(
        self,
        continuation: Callable[[grpc.ClientCallDetails, Request], Call],
        client_call_details: grpc.ClientCallDetails,
        request: Request,
    ) -> Call:
        return continuation(self._with_token(client_call_details), request)

    def intercept_unary_stream(
        self,
        continuation: Callable[[grpc.ClientCallDetails, Request], Call],
        client_call_details: grpc.ClientCallDetails,
        request: Request,
    ) -> Call:
        return continuation(self._with_token(client_call_details), request)

    def intercept_stream_unary(
        self,
        continuation: Callable[[grpc.ClientCallDetails, Iterator[Request]], Call],
        client_call_details: grpc.ClientCallDetails,
        request_iterator: Iterator[Request],
    ) -> Call:
        return continuation(self._with_token(client_call_details), request_iterator)

    def intercept_stream_stream(
        self,
        continuation: Callable[[grpc.ClientCallDetails, Iterator[Request]], Call],
        client_call_details: grpc.ClientCallDetails,
        request_iterator: Iterator[Request],
    ) -> Call:
        return continuation(self._with_token(client_call_details), request_iterator)


def any_port(host: str) -> str:
    """Return the address of a port on ``host`` that is free when somebody listens there.

    >>> any_port("10.0.0.1"), any_port("::1")
    ('10.0.0.1:0', '[::1]:0')
    """
    return f"[{host}]:0" if ":" in host else f"{host}:0"


def check_address(address: str, *, insecure: bool, encrypted: bool = False) -> None:
    """Refuse to speak in the clear beyond this machine, unless that is asked for.

    Args:
        address: ``host:port``; IPv6 hosts in brackets.
        insecure: The user has typed that plain text is fine.
        encrypted: It will not be plain text: TLS is configured.

    Raises:
        ConfigurationError: when it is no address, or plain text would leave the machine.

    >>> check_address("127.0.0.1:5000", insecure=False)
    """
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ConfigurationError(f"{address!r} is not an address; write host:port, such as 127.0.0.1:50051")
    if not (insecure or encrypted) and not _is_loopback(host.strip("[]")):
        raise ConfigurationError(
            f"{address} is reached over a network, and the traffic would not be encrypted, a token neither; name "
            "certificates: --tls-ca, --tls-cert and --tls-key (for a worker THRESHER_TLS_CA, THRESHER_TLS_CERT and "
            "THRESHER_TLS_KEY), which `thresher certs` makes for a trial; or, on a network you trust, say --insecure "
            "(or THRESHER_INSECURE=1 for a worker)"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
