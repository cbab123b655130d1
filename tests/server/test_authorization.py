"""Who may call what: the table, the tokens, the role in a certificate, and the interceptor on a served service."""

import asyncio
import string
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from thresher.protos.credentials import LEAST_TOKEN_CHARACTERS
from thresher.protos.errors import ConfigurationError
from thresher.protos.transport import ERROR_NAME, TOKEN_HEADER
from thresher.server.authorization import LEAST_ROLES, Gatekeeper, Role, Tokens, role_in_subject
from thresher.v1.aggregation_pb2 import DESCRIPTOR

TOKENS = {role: f"token-of-the-{role.name.lower()}-" + "0123456789abcdef" * 2 for role in Role}
KNOWN = Tokens(TOKENS.items())
CODE = grpc.StatusCode


def test_every_method_has_a_role() -> None:
    """A method that is new in the .proto file needs a decision in the table."""
    methods = {
        f"/{service.full_name}/{method.name}"
        for service in DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert methods == LEAST_ROLES.keys()


def test_what_each_role_may() -> None:
    """An observer reads counters, a worker takes part, an operator may do all."""
    may = {role: {name.rpartition("/")[2] for name, least in LEAST_ROLES.items() if role >= least} for role in Role}
    assert may[Role.OBSERVER] == {"Statistics"}
    assert may[Role.WORKER] == {"Register", "Seed", "Snapshot", "Exchange", "Statistics", "Measure"}
    assert may[Role.OPERATOR] >= may[Role.WORKER]


token_texts = st.text(string.ascii_letters + string.digits + "-._~+/", min_size=LEAST_TOKEN_CHARACTERS, max_size=60)


@given(
    entries=st.dictionaries(token_texts, st.sampled_from(Role), min_size=1, max_size=6),
    other=token_texts,
    blank=st.sampled_from(["\n", "\n\n", "\n# a comment\n", " \n"]),
)
def test_a_token_has_the_role_of_its_line(
    tmp_path_factory: pytest.TempPathFactory, entries: dict[str, Role], other: str, blank: str
) -> None:
    """And any other text has none."""
    path = tmp_path_factory.getbasetemp() / "tokens"
    path.touch(mode=0o600)
    path.write_text(blank.join(f"{role.name.lower()} {token}" for token, role in entries.items()), encoding="ascii")
    tokens = Tokens.read(path)
    for token, role in entries.items():
        assert tokens.role_of(token) is role
        assert tokens.role_of(token[:-1]) is entries.get(token[:-1])
    assert tokens.role_of(other) is entries.get(other)
    assert tokens.role_of("") is None
    assert not any(token in repr(vars(tokens)) for token in entries), "only hashes are kept"


SECRET = TOKENS[Role.WORKER]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no token"),
        ("# worker later\n", "holds no token"),
        (SECRET, "entry 1: a line is a role, one of observer, worker, operator"),
        (f"{SECRET} worker", "entry 1: a line is a role"),
        (f"admin {SECRET}", "entry 1: a line is a role"),
        (f"worker {SECRET}\nWORKER {SECRET}2", "entry 2: a line is a role"),
        ("worker short", "entry 1 has 5 characters and could be guessed"),
        ("worker", "entry 1 has 0 characters"),
        (f"worker {SECRET} {SECRET}", "entry 1 has characters beside"),
        (f"worker {SECRET}\noperator {SECRET}", "a token twice"),
    ],
)
def test_a_file_of_tokens_that_makes_no_sense(tmp_path: Path, text: str, message: str) -> None:
    """Path, line and reason; never the token."""
    path = tmp_path / "tokens"
    path.write_text(text, encoding="ascii")
    with pytest.raises(ConfigurationError, match=message) as raised:
        Tokens.read(path)
    assert str(path) in str(raised.value)
    assert SECRET not in str(raised.value)


def test_tokens_that_others_may_read_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The warning has the path only."""
    path = tmp_path / "tokens"
    path.write_text(f"worker {SECRET}", encoding="ascii")
    path.chmod(0o644)
    Tokens.read(path)
    assert caplog.messages == [f"{path} holds a secret and other users may read it; chmod 600 it"]


attributes = st.tuples(
    st.sampled_from([NameOID.COMMON_NAME, NameOID.ORGANIZATION_NAME, NameOID.ORGANIZATIONAL_UNIT_NAME]),
    st.sampled_from([role.name.lower() for role in Role])
    | st.sampled_from(
        [",OU=operator", "x\\,OU=operator", "+OU=operator", "\\", "OU=operator", '"', "worker\n", "Worker"]
    )
    | st.text(string.printable, min_size=1, max_size=20),
)


@given(st.lists(attributes, max_size=4))
def test_only_one_organizational_unit_is_a_role(parts: list[tuple[x509.ObjectIdentifier, str]]) -> None:
    """Whatever else a subject says, however it is escaped, and however hard it tries to look like a role."""
    name = x509.Name([x509.NameAttribute(oid, value, _validate=False) for oid, value in parts])
    units = [value for oid, value in parts if oid == NameOID.ORGANIZATIONAL_UNIT_NAME]
    roles = {role.name.lower(): role for role in Role}
    assert role_in_subject(name.rfc4514_string()) is (roles.get(units[0]) if len(units) == 1 else None)


class Streams:
    """Answers one method of streams and notes how it ended."""

    def __init__(self) -> None:
        self.began = 0
        self.ended = threading.Event()

    def handler(self) -> grpc.GenericRpcHandler:
        method: Any = grpc.stream_stream_rpc_method_handler(self._echo)
        return grpc.method_handlers_generic_handler("test.Streams", {"Echo": method})

    async def _echo(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        self.began += 1
        try:
            async for request in requests:
                yield request
        finally:
            self.ended.set()


def on_a_server(gatekeeper: Gatekeeper, streams: Streams, use: Callable[[Any], None]) -> None:
    """Serve the streams behind the gatekeeper on loopback, and use their method on another thread."""

    async def scenario() -> None:
        server = grpc.aio.server(interceptors=[gatekeeper])
        server.add_generic_rpc_handlers([streams.handler()])
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            await asyncio.to_thread(use, channel.stream_stream("/test.Streams/Echo"))
        await server.stop(0.5)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ([], CODE.UNAUTHENTICATED),
        ([f"Bearer {TOKENS[Role.OPERATOR]}x"], CODE.UNAUTHENTICATED),
        ([TOKENS[Role.OPERATOR]], CODE.UNAUTHENTICATED),
        ([f"Basic {TOKENS[Role.OPERATOR]}"], CODE.UNAUTHENTICATED),
        ([f"Bearer {TOKENS[Role.OPERATOR]}"] * 2, CODE.UNAUTHENTICATED),
        (["Bearer "], CODE.UNAUTHENTICATED),
        ([f"Bearer {TOKENS[Role.OBSERVER]}"], CODE.PERMISSION_DENIED),
        ([f"Bearer {TOKENS[Role.WORKER]}"], CODE.PERMISSION_DENIED),
    ],
)
def test_a_method_that_no_table_names_takes_an_operator(headers: list[str], code: grpc.StatusCode) -> None:
    """Anybody else is refused before the method, by an error that says what to configure, and no secret."""
    streams = Streams()

    def use(echo: Any) -> None:
        call = echo(iter([b"a"]), metadata=[(TOKEN_HEADER, header) for header in headers], timeout=20)
        assert call.code() is code
        assert streams.began == 0
        assert dict(call.trailing_metadata())[ERROR_NAME] == "ConfigurationError"
        assert not any(token in repr(call) + call.details() for token in TOKENS.values())

    on_a_server(Gatekeeper(KNOWN, certificates=False), streams, use)


@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_an_operator_is_let_through(scheme: str) -> None:
    """The scheme's case says nothing (RFC 9110)."""
    streams = Streams()

    def use(echo: Any) -> None:
        call = echo(iter([b"a", b"b"]), metadata=[(TOKEN_HEADER, f"{scheme} {TOKENS[Role.OPERATOR]}")], timeout=20)
        assert list(call) == [b"a", b"b"]

    on_a_server(Gatekeeper(KNOWN, certificates=False), streams, use)


def test_certificates_are_asked_for_where_no_tls_brought_one() -> None:
    """A port without TLS cannot have seen a certificate, so that nobody gets in."""
    streams = Streams()

    def use(echo: Any) -> None:
        call = echo(iter([b"a"]), timeout=20)
        assert call.code() is CODE.UNAUTHENTICATED
        assert "organizational unit" in call.details()
        assert streams.began == 0

    on_a_server(Gatekeeper(None, certificates=True), streams, use)


def test_a_guarded_stream_ends_when_its_caller_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard is a generator around the method's own: that one is closed too, in the middle of a stream."""
    monkeypatch.setattr("thresher.server.authorization._role_by_certificate", lambda context: (Role.OPERATOR, ""))
    streams, more = Streams(), threading.Event()

    def requests() -> Iterator[bytes]:
        yield b"a"
        more.wait()

    def use(echo: Any) -> None:
        call = echo(requests(), timeout=20)
        assert next(call) == b"a"
        call.cancel()
        assert streams.ended.wait(20)
        more.set()

    on_a_server(Gatekeeper(None, certificates=True), streams, use)
    assert streams.began == 1
