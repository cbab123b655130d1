"""State as a file: what goes in comes out, anything else is refused, and the bound lets every honest state through."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from thresher.protos.errors import FrameError
from thresher.protos.layout import Layout, TensorSpec
from thresher.protos.optimizers import OptimizerSpec
from thresher.protos.replica import PARAMETERS, Replica
from thresher.protos.snapshots import pack_state, state_bytes_bound, unpack_state
from thresher.protos.sparse import SparseGradient
from thresher.protos.update import Update

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    return torch.randint(0, 2, shape).to(draw(st.sampled_from(DTYPES)))


named = st.dictionaries(st.sampled_from(["parameters", "state.step.0", "state.exp_avg.12"]), tensors())
buffers = st.dictionaries(st.sampled_from(["bn.running_mean", "untrained.x", "parameters"]), tensors())


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


@given(named, buffers)
def test_state_round_trip(state: dict[str, Tensor], untrained: dict[str, Tensor]) -> None:
    """State and untrained tensors come back apart, whatever their names, shapes and dtypes."""
    found_state, found_untrained = unpack_state(pack_state(state, untrained))
    assert equal(found_state, state)
    assert equal(found_untrained, untrained)


def test_views_and_transposed_tensors_are_packed_by_value() -> None:
    """A file holds values, not storages: overlapping and strided tensors are fine."""
    whole = torch.arange(6.0).view(2, 3)
    found, _ = unpack_state(pack_state({PARAMETERS: whole[0], "state.x.0": whole.t()}, {}))
    assert torch.equal(found[PARAMETERS], whole[0])
    assert torch.equal(found["state.x.0"], whole.t())


GOOD = pack_state({PARAMETERS: torch.arange(3.0)}, {"bn.mean": torch.ones(2)})


@given(st.binary(max_size=64) | st.integers(0, len(GOOD) - 1).map(lambda end: GOOD[:end]))
def test_other_bytes_are_refused(data: bytes) -> None:
    """Noise and truncated files are a FrameError, never a foreign exception."""
    with pytest.raises(FrameError, match="not a safetensors file"):
        unpack_state(data)


@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
def test_a_damaged_file_is_refused_or_read(position: int, change: int) -> None:
    """A flipped byte in the header is refused or read as other tensors; no foreign exception leaks."""
    damaged = bytearray(GOOD)
    damaged[position] ^= change
    try:
        state, untrained = unpack_state(bytes(damaged))
    except FrameError:
        return
    assert len(state) + len(untrained) == 2


@pytest.mark.parametrize(
    ("name", "hyper"),
    [
        ("Adam", {"lr": 0.1, "amsgrad": True}),
        ("SGD", {"lr": 0.1, "momentum": 0.9}),
        ("RMSprop", {"lr": 0.1, "centered": True, "momentum": 0.9}),
    ],
)
@pytest.mark.parametrize("shape", [(1,), (50, 20)])
def test_the_bound_lets_honest_states_through(name: str, hyper: dict[str, float], shape: tuple[int, ...]) -> None:
    """With every state an optimizer has, and buffers in their widest dtype, a file is below the bound."""
    layout = Layout((TensorSpec("w" * 200, shape, "float32"),), (TensorSpec("buffer", (7,), "float64"),))
    (piece,) = layout.slices(1)
    replica = Replica(piece, OptimizerSpec(name, (hyper,)), {PARAMETERS: torch.ones(piece.numel)})
    replica.apply(Update(1, 1, (0,), SparseGradient.dense(torch.ones(piece.numel)), (True,)))
    data = pack_state(replica.state(), {"buffer": torch.ones(7, dtype=torch.float64)})
    assert len(data) <= state_bytes_bound(layout, piece.numel)


def test_the_bound_grows_with_the_model_only() -> None:
    """What may be announced is proportional to the model: a few times its size, not more."""
    layout = Layout((TensorSpec("w", (1000,), "float32"),))
    assert state_bytes_bound(layout, 1000) < 20 * 4 * 1000


def test_tensors_that_share_memory_are_written() -> None:
    """Buffers may be views of one another; each is written whole."""
    base = torch.arange(4.0)
    _, untrained = unpack_state(pack_state({}, {"all": base, "half": base[:2]}))
    assert untrained["all"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert untrained["half"].tolist() == [0.0, 1.0]
