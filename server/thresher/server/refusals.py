"""Errors as gRPC tells them: a status code, the class of the error in the trailing metadata, the text as details."""

from bisect import bisect_right
from collections.abc import Awaitable
from itertools import accumulate
from typing import Any, Final, TypeVar
from urllib.parse import quote

import grpc

from thresher.protos.errors import (
    BehindError,
    BusyError,
    ConfigurationError,
    DataLossError,
    FencedError,
    FrameError,
    LayoutError,
    LostHistoryError,
    OptimizerError,
    ProtocolError,
    RegistrationError,
    RoundFailedError,
    ThresherError,
)
from thresher.protos.transport import ERROR_NAME
from thresher.server.stream import UnreadError

Context = grpc.aio.ServicerContext[Any, Any]
T = TypeVar("T")

_CODES: Final[dict[type[Exception], grpc.StatusCode]] = {
    FrameError: grpc.StatusCode.INVALID_ARGUMENT,
    OptimizerError: grpc.StatusCode.INVALID_ARGUMENT,
    ConfigurationError: grpc.StatusCode.INVALID_ARGUMENT,
    LayoutError: grpc.StatusCode.FAILED_PRECONDITION,
    RegistrationError: grpc.StatusCode.FAILED_PRECONDITION,
    ProtocolError: grpc.StatusCode.FAILED_PRECONDITION,
    FencedError: grpc.StatusCode.FAILED_PRECONDITION,
    BehindError: grpc.StatusCode.OUT_OF_RANGE,
    UnreadError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    BusyError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    LostHistoryError: grpc.StatusCode.DATA_LOSS,
    DataLossError: grpc.StatusCode.DATA_LOSS,
    RoundFailedError: grpc.StatusCode.ABORTED,
}
_DETAILS_BYTES: Final = 6000  # of the 8 KiB that gRPC takes as metadata


async def answered(answer: Awaitable[T], context: Context) -> T | None:
    """Return an answer; None when there is none, and the caller is told why."""
    try:
        return await answer
    except ThresherError as error:
        refuse(context, error)
        return None


def refuse(context: Context, error: ThresherError) -> None:
    """Let a call end with an error: with no exception, because gRPC keeps that of `abort`, and so all that it saw."""
    known = next(cls for cls in type(error).__mro__ if ThresherError in (cls, *cls.__bases__))  # by `error_named`
    context.set_trailing_metadata(((ERROR_NAME, known.__name__),))
    context.set_code(_CODES.get(type(error), grpc.StatusCode.INTERNAL))
    context.set_details(_cut(str(error)))


def _cut(text: str) -> str:
    """Return as much of it as the details of a status can carry: gRPC quotes them, and a longer header is dropped."""
    costs = accumulate(len(quote(character)) for character in text)
    kept = bisect_right(list(costs), _DETAILS_BYTES)
    return text if kept == len(text) else text[:kept] + " …"
