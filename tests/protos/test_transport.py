"""The connection's settings: plain text stays on this machine unless somebody asked, and both sides agree on pings."""

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.deploy.certificates import write_certificates
from thresher.protos.credentials import Credentials, TlsFiles
from thresher.protos.errors import ConfigurationError
from thresher.protos.messages import CHUNK_BYTES, REGISTRATION_BYTES
from thresher.protos.transport import (
    CHANNEL_OPTIONS,
    FORK_VARIABLE,
    MESSAGE_BYTES,
    SERVER_OPTIONS,
    channel,
    check_address,
)

LOOPBACK = ["127.0.0.1:1", "127.8.9.10:65535", "localhost:50051", "[::1]:50051", "127.0.0.1:0"]
REMOTE = ["10.0.0.7:50051", "0.0.0.0:50051", "shard-0.example.org:50051", "[::]:50051", "[2001:db8::1]:50051"]
NONSENSE = ["", "50051", ":50051", "localhost", "localhost:", "localhost:grpc", "localhost:-1", "localhost:65536"]


@pytest.mark.parametrize("address", LOOPBACK)
def test_loopback_needs_no_permission(address: str) -> None:
    """What never leaves the machine may be plain text, and saying so changes nothing."""
    check_address(address, insecure=False)
    check_address(address, insecure=True)


@pytest.mark.parametrize("address", REMOTE)
def test_a_network_must_be_asked_for(address: str) -> None:
    """Plain text beyond this machine is refused until it is typed; the message says how, and what to do instead."""
    with pytest.raises(ConfigurationError, match=r"--tls-cert.*THRESHER_TLS_CA.*thresher certs.*--insecure"):
        check_address(address, insecure=False)
    check_address(address, insecure=True)
    check_address(address, insecure=False, encrypted=True)


@pytest.mark.parametrize("address", NONSENSE)
@pytest.mark.parametrize("insecure", [False, True])
def test_what_is_no_address_is_refused(address: str, insecure: bool) -> None:
    """The message shows what was given and what an address looks like."""
    with pytest.raises(ConfigurationError, match="is not an address; write host:port"):
        check_address(address, insecure=insecure)


@given(st.text(max_size=20) | st.text("0123456789²٣:[]", max_size=8))
def test_any_text_is_accepted_or_refused_by_name(address: str) -> None:
    """No text makes anything but a configuration error; what is accepted ends in a port that a socket takes."""
    try:
        check_address(address, insecure=True)
    except ConfigurationError:
        return
    assert 0 <= int(address.rpartition(":")[2].encode("ascii")) <= 65535


def test_a_server_allows_the_pings_that_workers_send() -> None:
    """A server that found the pings too frequent would close the connection of a worker that only waits."""
    workers, server = dict(CHANNEL_OPTIONS), dict(SERVER_OPTIONS)
    assert server["grpc.http2.min_recv_ping_interval_without_data_ms"] < workers["grpc.keepalive_time_ms"]
    assert server["grpc.http2.max_ping_strikes"] == 0  # it closes on nobody for pings, however long one waits
    assert server["grpc.keepalive_permit_without_calls"] == workers["grpc.keepalive_permit_without_calls"] == 1


def test_what_a_peer_may_cost_is_bounded() -> None:
    """No bound is left to gRPC's default, and the largest message that is right fits."""
    server = dict(SERVER_OPTIONS)
    assert server["grpc.max_receive_message_length"] == MESSAGE_BYTES >= REGISTRATION_BYTES + CHUNK_BYTES
    assert dict(CHANNEL_OPTIONS)["grpc.max_receive_message_length"] == MESSAGE_BYTES
    bounds = ["max_concurrent_streams", "max_metadata_size", "absolute_max_metadata_size"]
    assert all(server[f"grpc.{name}"] > 0 for name in bounds)


KINDS: dict[str, Callable[[Any], Any]] = {
    "unary_unary": lambda method: method(b"a", metadata=[("other", "kept")], timeout=20),
    "unary_stream": lambda method: list(method(b"a", metadata=[("other", "kept")], timeout=20)),
    "stream_unary": lambda method: method(iter([b"a"]), metadata=[("other", "kept")], timeout=20),
    "stream_stream": lambda method: list(method(iter([b"a"]), metadata=[("other", "kept")], timeout=20)),
}


@pytest.mark.parametrize("with_token", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tls", [False, True])
def test_a_token_goes_with_every_kind_of_call(tmp_path: Path, kind: str, tls: bool, with_token: bool) -> None:
    """Over TLS and on loopback, once, beside what the caller says itself; without a token there is no header."""
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text("0123456789abcdef" * 2, encoding="ascii")
    heard: list[list[tuple[str, str]]] = []

    def answer(request: Any, context: Any) -> Any:
        heard.append([item for item in context.invocation_metadata() if item[0] in {"authorization", "other"}])
        return b"b" if kind.endswith("_unary") else iter([b"b"])

    method = getattr(grpc, f"{kind}_rpc_method_handler")(answer)
    server = grpc.server(ThreadPoolExecutor(1), [grpc.method_handlers_generic_handler("test.Test", {"Call": method})])
    if tls:
        files = write_certificates(tmp_path)
        pem, key = (path.read_bytes() for path in files["shard"])
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, pem)]))
    else:
        port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    credentials = Credentials(TlsFiles(tmp_path / "ca.pem") if tls else None, token if with_token else None)
    with channel(f"127.0.0.1:{port}", credentials) as opened:
        KINDS[kind](getattr(opened, kind)("/test.Test/Call"))
    server.stop(None).wait()
    shown = [("authorization", f"Bearer {'0123456789abcdef' * 2}")] if with_token else []
    assert heard == [[("other", "kept"), *shown]]


@pytest.mark.parametrize(
    ("first", "variable", "safe", "left"),
    [
        ("thresher.worker", None, True, "0"),
        ("thresher.server.servicer", None, True, "0"),
        ("thresher.deploy.cli", None, True, "0"),
        ("grpc", None, False, "0"),
        ("grpc", "0", True, "0"),
        ("thresher.worker", "1", True, "1"),
    ],
)
def test_fork_handlers_are_off_before_grpc_is_imported(first: str, variable: str | None, safe: bool, left: str) -> None:
    """Whichever package comes first, except gRPC itself; and what a user has set stays."""
    environment = {name: value for name, value in os.environ.items() if name != FORK_VARIABLE}
    if variable is not None:
        environment[FORK_VARIABLE] = variable
    code = (
        f"import {first}, os, thresher.protos.transport as it, thresher.worker; "
        f"print(it.FORKS_ARE_SAFE, os.environ[{FORK_VARIABLE!r}])"
    )
    said = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True, timeout=60)
    assert said.split() == [str(safe), left]
