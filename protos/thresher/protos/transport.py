"""Settings of gRPC: those of the connection, on which both sides must agree, and one of the process.

Importing this module makes forks safe: gRPC's own fork handlers abort a child now and then when another thread is
inside a call, as a worker's always is, and forked `DataLoader` workers never speak gRPC. gRPC reads its variable once,
when it is imported, so the packages that import gRPC import this module first.
"""

import ipaddress
import os
import sys
from typing import Final

from thresher.protos.errors import ConfigurationError

FORK_VARIABLE: Final = "GRPC_ENABLE_FORK_SUPPORT"
"""The switch of gRPC's fork handlers. A value that the user has set stays."""

FORKS_ARE_SAFE: Final = FORK_VARIABLE in os.environ or "grpc" not in sys.modules
"""Whether the switch was set before gRPC read it; otherwise somebody had imported gRPC before Thresher."""

os.environ.setdefault(FORK_VARIABLE, "0")

ERROR_NAME: Final = "thresher-error"
"""Trailing metadata key with the name of the error class, so that the other side raises the same one."""

_PING_MS: Final = 10_000

CHANNEL_OPTIONS: Final[tuple[tuple[str, int], ...]] = (
    ("grpc.keepalive_time_ms", _PING_MS),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_http_proxy", 0),  # shards are not on the web, and a proxy there for the web does not know them
    ("grpc.enable_retries", 0),  # a push is repeated by who knows what it means, never by the transport
)
"""What a worker sets: an open stream with keepalive is its heartbeat."""

SERVER_OPTIONS: Final[tuple[tuple[str, int], ...]] = (
    ("grpc.keepalive_time_ms", _PING_MS),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # A server refuses pings that come more often than this; it must allow what the workers send.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", _PING_MS // 2),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),  # or a second shard would quietly share the port of the first
)
"""What a shard sets; it matches `CHANNEL_OPTIONS`."""


def check_address(address: str, *, insecure: bool) -> None:
    """Refuse to speak in the clear beyond this machine, unless that is asked for.

    Args:
        address: ``host:port``; IPv6 hosts in brackets.
        insecure: The user has typed that plain text is fine.

    Raises:
        ConfigurationError: when it is no address, or plain text would leave the machine.

    >>> check_address("127.0.0.1:5000", insecure=False)
    """
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ConfigurationError(f"{address!r} is not an address; write host:port, such as 127.0.0.1:50051")
    if not insecure and not _is_loopback(host.strip("[]")):
        raise ConfigurationError(
            f"{address} is reached over a network, and the traffic would be neither encrypted nor authenticated; "
            "on a network you trust, say --insecure (or THRESHER_INSECURE=1 for a worker)"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
