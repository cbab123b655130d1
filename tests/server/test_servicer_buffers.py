"""Tensors beside the trained ones: taken from who may bring them, as registered, and from nobody else."""

from collections.abc import Iterator, Mapping

import grpc
import pytest
import torch
from tests.server.conversing import LAYOUT, Served, hello, leave, push, refusal, serving, zeros
from torch import Tensor

from thresher.protos.errors import FrameError, ProtocolError
from thresher.protos.replica import PARAMETERS
from thresher.protos.snapshots import pack_state, state_bytes_bound, unpack_state
from thresher.v1 import aggregation_pb2 as pb

GOOD = {"bn.mean": torch.full((2,), 5.0)}
SEEDED = {"bn.mean": [1.0, 1.0]}


@pytest.fixture
def served() -> Iterator[Served]:
    with serving() as one:
        yield one


def untrained_of(served: Served) -> dict[str, object]:
    _, untrained = unpack_state(b"".join(part.chunk for part in served.parts()))
    return {name: value.tolist() for name, value in untrained.items()}


WRONG: list[tuple[Mapping[str, Tensor], str]] = [
    ({"bn.mean": torch.ones(3)}, r"bn.mean float32 \[3\], which is none of the 1 untrained tensors"),
    ({"bn.mean": torch.ones(2, dtype=torch.float64)}, r"bn.mean float64 \[2\], which is none"),
    (GOOD | {"more": torch.ones(1)}, r"more float32 \[1\], which is none"),
    ({"w": torch.ones(3)}, r"w float32 \[3\], which is none"),
]


@pytest.mark.parametrize(("buffers", "said"), WRONG, ids=["shape", "dtype", "another name", "a trained one"])
def test_buffers_that_were_not_registered_are_refused(served: Served, buffers: Mapping[str, Tensor], said: str) -> None:
    """Whoever joins later would break on them; the worker is still there, and may leave with the right ones."""
    first, _ = served.join()
    first.say(leave(buffers=pack_state({}, buffers)))
    code, error = first.hear_refusal()
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    with pytest.raises(ProtocolError, match=said):
        raise error
    assert untrained_of(served) == SEEDED
    again = served.talk(hello(0), leave(buffers=pack_state({}, GOOD)))
    assert again.hear().HasField("left")
    assert untrained_of(served) == {"bn.mean": [5.0, 5.0]}


def test_buffers_of_another_worker_are_refused_before_they_come(served: Served) -> None:
    """Rank 0 alone hands them over; without them everybody may leave."""
    _, second = served.join()
    second.say(pb.ExchangeRequest(leave=pb.Leave(), payload_bytes=100))
    _, error = second.hear_refusal()
    with pytest.raises(ProtocolError, match="from rank 0 to the first shard, not from worker 1 to shard 0"):
        raise error
    again = served.talk(hello(1), leave())
    assert again.hear().HasField("left")
    assert untrained_of(served) == SEEDED


def test_another_shard_takes_no_buffers() -> None:
    """They go with the first slice; a seed or a leave that brings them elsewhere is of no honest worker."""
    with serving(shard=1, shards=2) as served:
        for rank in (0, 1):
            served.register(rank, shard=1, shards=2)
        trained = {PARAMETERS: torch.zeros(2)}
        with pytest.raises(grpc.RpcError, match="which is none of the 0 untrained tensors that shard 1 keeps"):
            served.seed(pack_state(trained, GOOD))
        assert served.seed(pack_state(trained, {}))
        talk = served.talk(hello(0), pb.ExchangeRequest(leave=pb.Leave(), payload_bytes=100))
        with pytest.raises(ProtocolError, match="not from worker 0 to shard 1"):
            raise talk.hear_refusal()[1]


@pytest.mark.parametrize("refill", [None, pb.Refill(history=pb.History(run=5, version=3))], ids=["seed", "refill"])
@pytest.mark.parametrize("buffers", [buffers for buffers, _ in WRONG], ids=["shape", "dtype", "name", "trained"])
def test_a_state_with_other_buffers_is_refused(
    served: Served, refill: pb.Refill | None, buffers: Mapping[str, Tensor]
) -> None:
    """The shard stays empty, and the right state is still welcome."""
    served.register(0)
    with pytest.raises(grpc.RpcError, match="which is none of the 1 untrained tensors") as caught:
        served.seed(pack_state({PARAMETERS: torch.zeros(4)}, buffers), refill)
    assert refusal(caught.value)[0] is grpc.StatusCode.FAILED_PRECONDITION
    assert not served.register(0).seeded
    assert served.seed(zeros(), refill)


def test_no_more_is_taken_of_a_leave_than_buffers_can_be(served: Served) -> None:
    """The bound is that of the untrained tensors, not of a whole state."""
    first, _ = served.join()
    bound = state_bytes_bound(LAYOUT, 0)
    first.say(pb.ExchangeRequest(leave=pb.Leave(), payload_bytes=bound + 1))
    with pytest.raises(FrameError, match=f"{bound + 1} bytes is announced; at most {bound} are possible"):
        raise first.hear_refusal()[1]


@pytest.mark.parametrize(
    "first",
    [
        pb.ExchangeRequest(leave=pb.Leave(), payload_bytes=100),
        push(0, b"", announced=20)[0],
        pb.ExchangeRequest(hello=pb.Hello(rank=0, incarnation=1), payload_bytes=20),
    ],
    ids=["leave", "push", "hello"],
)
def test_a_stream_takes_no_payload_before_its_hello(served: Served, first: pb.ExchangeRequest) -> None:
    """It is refused for its first message; the rest need not come."""
    served.join()
    code, error = served.talk(first).hear_refusal()
    assert code in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT)
    with pytest.raises(type(error), match=r"must be a hello|20 bytes is announced; at most 0"):
        raise error
