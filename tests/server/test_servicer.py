"""The gRPC edge, spoken to with raw messages: single calls are answered, or refused by name."""

import tracemalloc
from collections.abc import Iterable, Iterator

import grpc
import pytest
import torch
from tests.server.conversing import (
    LAYOUT,
    SECONDS,
    SGD,
    Served,
    refusal,
    register,
    seeds,
    serving,
    zeros,
)

from thresher.protos.layout import Layout, TensorSpec
from thresher.protos.messages import layout_to_message, optimizer_from_message
from thresher.protos.optimizers import OptimizerSpec
from thresher.protos.replica import PARAMETERS
from thresher.protos.snapshots import pack_state, unpack_state
from thresher.server.copies import MOST_COPIES
from thresher.v1 import aggregation_pb2 as pb

CODE = grpc.StatusCode


@pytest.fixture
def served() -> Iterator[Served]:
    with serving() as one:
        yield one


def test_a_registration_is_answered(served: Served) -> None:
    """The worker learns the run, the version, and how long a round may take; again it hears the same."""
    answer = served.register(0)
    assert (answer.version, answer.seeded, answer.answer_timeout) == (0, False, 3660.0)
    assert answer.run > 0
    assert served.register(0) == answer


MANY = OptimizerSpec("SGD", tuple({"lr": 0.1 + index, "weight_decay": 1e-4} for index in range(400)))


@pytest.mark.parametrize(
    ("request_", "code", "name"),
    [
        (register(1, layout=Layout((TensorSpec("w", (4,), "float32"),))), CODE.FAILED_PRECONDITION, "LayoutError"),
        (register(1, optimizer=MANY), CODE.FAILED_PRECONDITION, "RegistrationError"),
        (register(1, workers=3), CODE.FAILED_PRECONDITION, "RegistrationError"),
        (pb.RegisterRequest(rank=1), CODE.FAILED_PRECONDITION, "LayoutError"),
        (
            pb.RegisterRequest(
                layout=layout_to_message(LAYOUT), fingerprint=LAYOUT.fingerprint, optimizer=pb.Optimizer(name="Lion")
            ),
            CODE.INVALID_ARGUMENT,
            "OptimizerError",
        ),
        (
            pb.RegisterRequest(layout=layout_to_message(LAYOUT), fingerprint="another"),
            CODE.FAILED_PRECONDITION,
            "LayoutError",
        ),
    ],
    ids=[
        "layout",
        "a message longer than gRPC's metadata",
        "another number of workers",
        "empty",
        "optimizer",
        "fingerprint",
    ],
)
def test_a_refused_registration_names_its_error(
    served: Served, request_: pb.RegisterRequest, code: grpc.StatusCode, name: str
) -> None:
    """The class of the error travels in the trailing metadata, the message in the details, however long it is."""
    served.register(0)
    with pytest.raises(grpc.RpcError) as caught:
        served.stub.Register(request_, timeout=SECONDS)
    found, error = refusal(caught.value)
    assert (found, type(error).__name__) == (code, name)
    assert str(error)
    assert [worker.state for worker in served.statistics().workers] == ["registered", "waited for"]


def test_a_seed_can_be_read_back(served: Served) -> None:
    """Rank 0's values are the state of version 0, in as many chunks as they take."""
    layout = Layout((TensorSpec("w", (300_000,), "float32"),))
    served.register(0, layout=layout)
    values = torch.randn(300_000, generator=torch.Generator().manual_seed(1))
    assert served.seed(pack_state({PARAMETERS: values}, {}))
    parts = served.parts()
    assert len(parts) == 2
    state, _ = unpack_state(b"".join(part.chunk for part in parts))
    assert torch.equal(state[PARAMETERS], values)
    assert parts[0].layout == layout_to_message(layout)
    assert optimizer_from_message(parts[0].optimizer) == SGD


@pytest.mark.parametrize(
    ("requests", "code", "said"),
    [
        ([], CODE.FAILED_PRECONDITION, "empty seed"),
        (list(seeds(zeros(), total=1 << 50)), CODE.INVALID_ARGUMENT, "1125899906842624 bytes is announced; at most"),
        (list(seeds(zeros()))[:1] * 2, CODE.INVALID_ARGUMENT, "more came"),
        (list(seeds(zeros(), total=len(zeros()) + 1)), CODE.INVALID_ARGUMENT, "was announced"),
        (list(seeds(b"no safetensors")), CODE.INVALID_ARGUMENT, "not a safetensors file"),
        (list(seeds(pack_state({PARAMETERS: torch.zeros(9)}, {}))), CODE.FAILED_PRECONDITION, "needs float32"),
        (list(seeds(zeros(), rank=1)), CODE.FAILED_PRECONDITION, "rank 0 seeds the shards"),
    ],
    ids=["nothing", "huge", "more than announced", "less than announced", "noise", "another size", "another rank"],
)
def test_a_wrong_seed_is_refused(
    served: Served, requests: Iterable[pb.SeedRequest], code: grpc.StatusCode, said: str
) -> None:
    """What is wrong with it is said, and the right seed is still welcome."""
    for rank in (0, 1):
        served.register(rank)
    with pytest.raises(grpc.RpcError, match=said) as caught:
        served.stub.Seed(iter(requests), timeout=SECONDS)
    assert refusal(caught.value)[0] is code
    assert served.seed(zeros())


def test_a_seed_before_any_registration_is_told_to_register(served: Served) -> None:
    """The shard knows no model yet, so it cannot even say how large a seed may be."""
    with pytest.raises(grpc.RpcError, match="register first") as caught:
        served.seed(zeros())
    assert refusal(caught.value)[0] is CODE.FAILED_PRECONDITION


def test_who_waits_for_a_seed_that_does_not_come_is_told_who_brings_it(served: Served) -> None:
    """The wait has a deadline, and its error names the worker and the shard."""
    with pytest.raises(grpc.RpcError, match=r"shard 0 has waited 0.0 s for its starting values; worker 0") as caught:
        served.snapshot(wait_seconds=0.0)
    assert refusal(caught.value)[0] is CODE.ABORTED


def test_callers_who_read_slowly_share_one_copy_of_the_state(served: Served) -> None:
    """However many join at once, the shard's memory holds the model once more, and parts that are on their way."""
    numel, readers = 2_000_000, 16
    served.register(0, layout=Layout((TensorSpec("w", (numel,), "float32"),)))
    served.seed(pack_state({PARAMETERS: torch.zeros(numel)}, {}))
    tracemalloc.start()
    try:
        calls = [served.stub.Snapshot(pb.SnapshotRequest(wait_seconds=SECONDS)) for _ in range(readers)]
        firsts = [next(call) for call in calls]
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert firsts[0].total_bytes > 4 * numel
    assert held < 8 * firsts[0].total_bytes
    for call, first in zip(calls, firsts, strict=True):
        assert len(first.chunk) + sum(len(part.chunk) for part in call) == first.total_bytes


def test_callers_who_break_off_leave_room_for_others(served: Served) -> None:
    """More of them than may read at a time, each of another state, none to its end: the next is answered."""
    numel = 2_000_000
    layout = Layout((TensorSpec("w", (numel,), "float32"),))
    served.register(0, layout=layout)
    served.seed(pack_state({PARAMETERS: torch.zeros(numel)}, {}))
    for life in range(2, MOST_COPIES + 4):
        call = served.stub.Snapshot(pb.SnapshotRequest(wait_seconds=SECONDS), timeout=SECONDS)
        next(call)
        call.cancel()
        served.register(0, layout=layout, incarnation=life)  # a record: what was read is no longer the newest
    assert served.parts()[0].version == 0
