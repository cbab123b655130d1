"""Errors as gRPC tells them: each has its code, its name comes back as its class, and long texts are cut."""

import asyncio
from typing import Any, cast

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.protos import errors
from thresher.protos.errors import ThresherError, error_named
from thresher.protos.transport import ERROR_NAME
from thresher.server.refusals import answered, refuse
from thresher.server.stream import UnreadError

CODE = grpc.StatusCode
TOLD = [one for one in vars(errors).values() if isinstance(one, type) and ThresherError in one.__bases__]


class Answer:
    """What gRPC would send; nothing else of a context is touched."""

    def __init__(self) -> None:
        self.code, self.details, self.metadata = CODE.OK, "", dict[str, str]()

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details

    def set_trailing_metadata(self, pairs: Any) -> None:
        self.metadata = dict(pairs)


@pytest.mark.parametrize("kind", TOLD)
def test_each_error_comes_back_as_it_was(kind: type[ThresherError]) -> None:
    """By the name in the metadata, with a code that is not OK."""
    answer = Answer()
    refuse(cast("Any", answer), kind("what was wrong"))
    again = error_named(answer.metadata[ERROR_NAME], answer.details)
    assert (type(again), str(again)) == (kind, "what was wrong")
    assert answer.code is not CODE.OK


def test_an_error_of_this_package_comes_back_as_the_one_that_it_is() -> None:
    """Workers know the errors of the protocol only; the code tells more."""
    answer = Answer()
    refuse(cast("Any", answer), UnreadError("unread"))
    assert (answer.metadata[ERROR_NAME], answer.code) == ("BehindError", CODE.RESOURCE_EXHAUSTED)


@given(st.text(max_size=50), st.integers(0, 8000))
def test_details_fit_into_a_header(text: str, times: int) -> None:
    """Whatever is quoted: what is told is short enough after gRPC's own quoting, and begins as it was."""
    answer = Answer()
    refuse(cast("Any", answer), ThresherError(text * times))
    assert len(answer.details.encode("utf-8", "surrogatepass")) < 8 << 10
    assert (text * times).startswith(answer.details.removesuffix(" …"))


async def _failing() -> None:
    raise errors.ProtocolError("no")


async def _one() -> int:
    return 1


def test_an_answer_is_none_where_the_caller_is_told_why() -> None:
    """What was answered is returned; errors that nobody expected are gRPC's."""
    answer = Answer()
    assert asyncio.run(answered(_one(), cast("Any", answer))) == 1
    assert answer.code is CODE.OK
    assert asyncio.run(answered(_failing(), cast("Any", answer))) is None
    assert (answer.code, answer.details) == (CODE.FAILED_PRECONDITION, "no")
