"""Headers and frames between real processes."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ddp.ranks import Ranks
from torch import Tensor

from thresher.ddp.transfer import Header, Transfer, gather_headers
from thresher.protos.codec import encode
from thresher.protos.errors import FrameError
from thresher.protos.mean import mean_of
from thresher.protos.sparse import SparseGradient

WORKERS = 3
NUMEL = 7

dense = st.lists(st.integers(-9, 9), min_size=NUMEL, max_size=NUMEL).map(torch.tensor)
headers = st.builds(Header, st.integers(0, 2**62), st.booleans(), st.integers(0, 2**32 - 1))


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(WORKERS) as started:
        yield started


def sparse(vector: Tensor) -> SparseGradient:
    """What is not zero in it."""
    indices = vector.nonzero().squeeze(1)
    return SparseGradient(indices, vector[indices].float(), vector.numel())


def send(frames: list[bytes], dtype: torch.dtype) -> Tensor:
    """What is in the buffer afterwards; its two gradients are of unequal size, and in the other order."""
    buffer = torch.full((NUMEL,), torch.nan, dtype=dtype)
    gradients = [buffer[3:].view(2, 2), buffer[:3]]
    lengths = [len(frame) for frame in frames]
    transfer = Transfer(None, frames[dist.get_rank()], lengths, gradients, buffer)
    assert not transfer.future.done()
    transfer.finish()
    assert transfer.future.done()
    assert transfer.future.value() is buffer
    return torch.cat([gradient.reshape(-1) for gradient in gradients])


@settings(max_examples=10)
@given(
    vectors=st.lists(dense, min_size=WORKERS, max_size=WORKERS), dtype=st.sampled_from([torch.float32, torch.bfloat16])
)
def test_all_get_the_mean(ranks: Ranks, vectors: list[Tensor], dtype: torch.dtype) -> None:
    """Of frames of any lengths, in rank order, cast to the type of the gradients."""
    sent = [sparse(vector) for vector in vectors]
    expected = mean_of(sent, WORKERS).densify().to(dtype)
    for received in ranks.run(send, [encode(one) for one in sent], dtype):
        assert torch.equal(received, expected)


def send_header(all_headers: list[Header]) -> list[Header]:
    return gather_headers(None, all_headers[dist.get_rank()], torch.device("cpu"))


@settings(max_examples=10)
@given(sent=st.lists(headers, min_size=WORKERS, max_size=WORKERS))
def test_all_get_the_headers_by_rank(ranks: Ranks, sent: list[Header]) -> None:
    """As they were."""
    assert ranks.run(send_header, sent) == [sent] * WORKERS


def test_a_frame_that_is_none_is_refused(ranks: Ranks) -> None:
    """By every worker, as it is the same bytes for all of them."""
    frames = [encode(SparseGradient.empty(NUMEL)), b"no frame", encode(SparseGradient.empty(NUMEL))]
    assert all(isinstance(outcome, FrameError) for outcome in ranks.outcomes(send, frames, torch.float32))
