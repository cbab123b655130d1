"""Who may call what: a role for every method, and an interceptor that asks for it before the method runs."""

import hashlib
import hmac
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Final, TypeAlias, final

import grpc

from thresher.protos.credentials import checked_token, secret_lines, warn_if_open
from thresher.protos.errors import ConfigurationError
from thresher.protos.transport import ERROR_NAME, TOKEN_HEADER

Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Details = grpc.HandlerCallDetails

_SERVICE: Final = "/thresher.v1.AggregationService"


class Role(IntEnum):
    """What a caller may do; a higher role may do all that a lower one may."""

    OBSERVER = 1
    WORKER = 2
    OPERATOR = 3


LEAST_ROLES: Final = {
    f"{_SERVICE}/Register": Role.WORKER,
    f"{_SERVICE}/Seed": Role.WORKER,
    f"{_SERVICE}/Snapshot": Role.WORKER,
    f"{_SERVICE}/Exchange": Role.WORKER,
    f"{_SERVICE}/Statistics": Role.OBSERVER,
    f"{_SERVICE}/Measure": Role.WORKER,  # it loads the link as a worker does
}
"""The lowest role that may call a method. What is not in the table takes an operator."""

OPEN_SERVICE: Final = "/grpc.health.v1.Health/"
"""Whoever can connect may ask whether the shard is well: probes have no names, and the answer is one word."""

_ROLES: Final = {role.name.lower(): role for role in Role}


@final
@dataclass(frozen=True, slots=True)
class _Refusal:
    """Why a call is turned away: for the caller to read, so it names what to configure and nothing that is secret."""

    code: grpc.StatusCode
    reason: str


@final
class Tokens:
    """The tokens that a shard knows, as hashes."""

    def __init__(self, entries: Iterable[tuple[Role, str]]) -> None:
        """Forget each token as soon as it is hashed."""
        self._digests = [(role, _digest(token)) for role, token in entries]

    @classmethod
    def read(cls, path: Path) -> "Tokens":
        """Read a file of lines ``role token``; lines that begin with # and empty ones are skipped.

        Raises:
            ConfigurationError: when the file cannot be read, a line is no role and token, a token is too short or is
                there twice, or there is none; the message has path and number of the entry, never the token.
        """
        lines = [line for line in secret_lines(path) if not line.startswith("#")]
        entries = [_entry(line, f"{path}, entry {number}") for number, line in enumerate(lines, start=1)]
        if not entries:
            raise ConfigurationError(f"{path} holds no token, so that nobody could call; write lines of role and token")
        if len({token for _, token in entries}) < len(entries):
            raise ConfigurationError(f"{path} has a token twice, so that it has no one role; make one for each role")
        warn_if_open(path)
        return cls(entries)

    def role_of(self, token: str) -> Role | None:
        """Return the role of a token; None for one that is unknown. Takes as long for every token."""
        shown = _digest(token)
        found = [role for role, digest in self._digests if hmac.compare_digest(digest, shown)]
        return found[0] if found else None


@final
class Gatekeeper(grpc.aio.ServerInterceptor):
    """Turns away every call whose caller has not shown who it is, or may not call that method.

    A token is looked at before anything of the request is read. Where certificates are asked for too, both must
    allow the call, so the lower of the two roles counts.

    Args:
        tokens: The tokens that are known; None asks for none.
        certificates: Callers show certificates, whose organizational unit is their role.
    """

    def __init__(self, tokens: Tokens | None, *, certificates: bool) -> None:
        self._tokens = tokens
        self._certificates = certificates

    async def intercept_service(
        self, continuation: "Callable[[Details], Awaitable[Handler | None]]", handler_call_details: Details
    ) -> "Handler | None":
        """Return the method's handler, guarded, or one that refuses the call."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith(OPEN_SERVICE):
            return handler
        if self._tokens is not None:
            refusal = _judged(*_role_by_token(self._tokens, handler_call_details), method)
            if refusal is not None:
                return _refusing(refusal)
        return _guarded(handler, method) if self._certificates else handler


def role_in_subject(subject: str) -> Role | None:
    """Return the role that a certificate's subject names in its organizational unit; None without one, or with two.

    Args:
        subject: Distinguished name as in RFC 2253: backslashes escape the separators.

    >>> role_in_subject("CN=worker-3,OU=worker,O=Example")
    <Role.WORKER: 2>
    """
    parts = re.findall(r"(?:\\.|[^,+\\])+", subject, re.DOTALL)
    units = [part.removeprefix("OU=") for part in parts if part.startswith("OU=")]
    return _ROLES.get(units[0]) if len(units) == 1 else None


def _entry(line: str, where: str) -> tuple[Role, str]:
    word, _, token = line.partition(" ")
    if word not in _ROLES:
        raise ConfigurationError(f"{where}: a line is a role, one of {', '.join(_ROLES)}, a space and a token")
    return _ROLES[word], checked_token(token.strip(), where)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _role_by_token(tokens: Tokens, details: Details) -> tuple[Role | None, str]:
    """Return the role by the token that came with a call, and, for whom has none, what to do."""
    shown = [value for key, value in details.invocation_metadata if key == TOKEN_HEADER]
    if not shown:
        return None, "this shard asks for a token and none came; set THRESHER_TOKEN_FILE to the file that holds it"
    scheme, _, token = str(shown[0]).partition(" ")
    role = tokens.role_of(token) if len(shown) == 1 and scheme.lower() == "bearer" else None
    return role, "this shard does not know the token that came; compare THRESHER_TOKEN_FILE with the shard's --tokens"


def _role_by_certificate(context: Context) -> tuple[Role | None, str]:
    subjects = list(context.auth_context().get("x509_subject", ()))
    role = role_in_subject(subjects[0].decode(errors="replace")) if len(subjects) == 1 else None
    return (
        role,
        f"the certificate that came has no role; its organizational unit (OU) must be one of {', '.join(_ROLES)}",
    )


def _judged(role: Role | None, unknown: str, method: str) -> _Refusal | None:
    if role is None:
        return _Refusal(grpc.StatusCode.UNAUTHENTICATED, unknown)
    least = LEAST_ROLES.get(method, Role.OPERATOR)
    if role >= least:
        return None
    return _Refusal(
        grpc.StatusCode.PERMISSION_DENIED,
        f"{role.name.lower()}s may not call {method}; it takes the credentials of role {least.name.lower()}",
    )


def _refusing(refusal: _Refusal) -> Handler:
    """Return a handler that reads nothing. That of streams answers single messages too: it only ends the call."""

    async def refuse(_: AsyncIterator[bytes], context: Context) -> None:
        _refuse(context, refusal)

    return grpc.stream_stream_rpc_method_handler(refuse)


def _guarded(handler: Handler, method: str) -> Handler:
    """Return a handler that looks at the caller's certificate first, which only a running call can show."""

    def may(context: Context) -> bool:
        refusal = _judged(*_role_by_certificate(context), method)
        if refusal is not None:
            _refuse(context, refusal)
        return refusal is None

    async def answer(request: object, context: Context) -> object:
        return await behaviour(request, context) if may(context) else None  # gRPC sends no answer beside an error

    async def answers(request: object, context: Context) -> AsyncIterator[object]:
        if may(context):
            async with aclosing(behaviour(request, context)) as responses:
                async for response in responses:
                    yield response

    kinds: dict[tuple[bool, bool], tuple[Any, Any, Any]] = {
        (False, False): (handler.unary_unary, grpc.unary_unary_rpc_method_handler, answer),
        (False, True): (handler.unary_stream, grpc.unary_stream_rpc_method_handler, answers),
        (True, False): (handler.stream_unary, grpc.stream_unary_rpc_method_handler, answer),
        (True, True): (handler.stream_stream, grpc.stream_stream_rpc_method_handler, answers),
    }
    behaviour, make, guarded = kinds[handler.request_streaming, handler.response_streaming]
    with_guard: Handler = make(guarded, handler.request_deserializer, handler.response_serializer)
    return with_guard


def _refuse(context: Context, refusal: _Refusal) -> None:
    """Let a call end with a refusal. No exception, because gRPC keeps that of `abort`, and so all that it saw."""
    # Under this name the caller raises it as what it is: something to configure, and nothing to try again.
    context.set_trailing_metadata(((ERROR_NAME, ConfigurationError.__name__),))
    context.set_code(refusal.code)
    context.set_details(refusal.reason)
