"""The replica: law 8 as a property, and the same bits as torch's own optimizer however the vector is cut."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from thresher.protos.errors import LayoutError, OptimizerError, ProtocolError
from thresher.protos.layout import Layout, Slice, TensorSpec
from thresher.protos.optimizers import OptimizerSpec, Override, Subtract, spec_of
from thresher.protos.replica import PARAMETERS, Replica, optimizer_state, state_name
from thresher.protos.snapshots import pack_state, unpack_state
from thresher.protos.sparse import SparseGradient
from thresher.protos.update import Update

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1},
    "SGD momentum": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "SGD foreach": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "foreach": True},
    "Adam": {"lr": 0.01, "amsgrad": True, "weight_decay": 0.01},
    "AdamW": {"lr": 0.01, "weight_decay": 0.1},
    "Adagrad": {"lr": 0.1, "lr_decay": 0.01, "initial_accumulator_value": 0.1},
    "RMSprop": {"lr": 0.01, "centered": True, "momentum": 0.5, "weight_decay": 0.01},
    "Subtract": {},
}

each_optimizer = pytest.mark.parametrize("kind", sorted(OPTIMIZERS))

SHAPES = ((2, 3), (), (4,), (3, 1, 2))
LAYOUT = Layout(tuple(TensorSpec(f"t{index}", shape, "float32", index % 2) for index, shape in enumerate(SHAPES)))
SIZES = [spec.numel for spec in LAYOUT.trained]


def torch_optimizer(kind: str, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """Torch's own over shaped parameters, in two groups as `LAYOUT` says; the second has half the rate."""
    arguments = OPTIMIZERS[kind]
    groups: list[dict[str, Any]] = [{"params": parameters[0::2]}, {"params": parameters[1::2]}]
    if kind == "Subtract":
        return Subtract(groups)
    groups[1]["lr"] = arguments["lr"] / 2
    made = getattr(torch.optim, kind.split(maxsplit=1)[0])(groups, **arguments)
    assert isinstance(made, torch.optim.Optimizer)
    return made


def spec(kind: str) -> OptimizerSpec:
    return spec_of(torch_optimizer(kind, [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]))


def start() -> Tensor:
    return torch.randn(LAYOUT.numel, generator=torch.Generator().manual_seed(1))


@st.composite
def steps(draw: st.DrawFn, kind: str) -> list[tuple[Tensor | None, tuple[bool, ...], float]]:
    """Some training steps: the flat gradient or None for a skipped one, presence by tensor, and the learning rate."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    made: list[tuple[Tensor | None, tuple[bool, ...], float]] = []
    for _ in range(draw(st.integers(1, 6))):
        gradient = torch.randn(LAYOUT.numel, generator=generator)
        if draw(st.booleans()):
            gradient[torch.rand(LAYOUT.numel, generator=generator) < draw(st.sampled_from([0.5, 0.95, 1.0]))] = 0.0
        presence = draw(st.tuples(*[st.booleans()] * len(SHAPES)))
        skipped = draw(st.integers(0, 4)) == 0
        made.append((None if skipped else gradient, presence, draw(st.sampled_from([0.1, 0.05, 0.2]))))
    return made


def update_for(piece: Slice, version: int, step: tuple[Tensor | None, tuple[bool, ...], float], kind: str) -> Update:
    """The step as the shard that owns ``piece`` would log it: only coordinates that are not zero travel."""
    gradient, present, rate = step
    segments = tuple(present[segment.tensor] for segment in piece.segments)
    overrides = () if kind == "Subtract" else (Override(0, "lr", rate),)
    if gradient is None:
        return Update(version, 2, (), None, (True,) * len(segments), overrides)
    values = gradient[piece.begin : piece.end].clone()
    for segment, flag in zip(piece.segments, segments, strict=True):
        if not flag:
            values[segment.begin : segment.end] = 0.0
    indices = values.nonzero().view(-1)
    mean = SparseGradient(indices, values[indices], piece.numel)
    return Update(version, 2, (0, 1), mean, segments, overrides)


def run(replica: Replica, piece: Slice, made: list[tuple[Tensor | None, tuple[bool, ...], float]], kind: str) -> None:
    for step in made:
        replica.apply(update_for(piece, replica.version + 1, step, kind))


def equal_states(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@each_optimizer
@settings(max_examples=15)
@given(st.data())
def test_snapshot_and_log_give_the_later_snapshot(kind: str, data: st.DataObject) -> None:
    """Law 8: snapshot(v) + log(v..w) = snapshot(w), bit for bit, through a file and at any v."""
    shards = data.draw(st.integers(1, 7))
    piece = LAYOUT.shard_slice(data.draw(st.integers(0, shards - 1)), shards)
    made = data.draw(steps(kind))
    cut = data.draw(st.integers(0, len(made)))
    shard = Replica(piece, spec(kind), {PARAMETERS: start()[piece.begin : piece.end]})
    run(shard, piece, made[:cut], kind)
    snapshot, _ = unpack_state(pack_state(shard.state(), {}))
    joiner = Replica(piece, spec(kind), snapshot, version=shard.version)
    assert equal_states(joiner.state(), shard.state())
    run(shard, piece, made[cut:], kind)
    run(joiner, piece, made[cut:], kind)
    assert joiner.version == shard.version == len(made)
    assert equal_states(joiner.state(), shard.state())


def train_shaped(kind: str, made: list[tuple[Tensor | None, tuple[bool, ...], float]]) -> Tensor:
    """One process with torch's own optimizer on shaped parameters; a skipped step is no step."""
    pieces = zip(torch.split(start(), SIZES), SHAPES, strict=True)
    parameters = [nn.Parameter(flat.clone().view(shape)) for flat, shape in pieces]
    optimizer = torch_optimizer(kind, parameters)
    for gradient, present, rate in made:
        if gradient is None:
            continue
        grads = torch.split(gradient, SIZES)
        for parameter, grad, flag in zip(parameters, grads, present, strict=True):
            parameter.grad = grad.clone().view(parameter.shape) if flag else None
        if kind != "Subtract":
            optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    return torch.cat([parameter.detach().view(-1) for parameter in parameters])


@each_optimizer
@settings(max_examples=10)
@given(st.data())
def test_any_number_of_slices_gives_the_bits_of_one_process(kind: str, data: st.DataObject) -> None:
    """1, 2, 3 and 7 slices of the flat vector train exactly as torch does on the shaped parameters."""
    made = data.draw(steps(kind))
    expected = train_shaped(kind, made)
    for shards in (1, 2, 3, 7):
        replicas = [
            (piece, Replica(piece, spec(kind), {PARAMETERS: start()[piece.begin : piece.end]}))
            for piece in LAYOUT.slices(shards)
        ]
        for piece, replica in replicas:
            run(replica, piece, made, kind)
        assert torch.equal(torch.cat([replica.parameters for _, replica in replicas]), expected), shards


PIECE = LAYOUT.shard_slice(0, 1)


def dense(version: int, presence: tuple[bool, ...] = (True,) * 4, numel: int = PIECE.numel) -> Update:
    return Update(version, 1, (0,), SparseGradient.dense(torch.full((numel,), 0.5)), presence)


@each_optimizer
def test_an_absent_tensor_is_left_alone(kind: str) -> None:
    """Parameter, momentum, decay and step count of a tensor that nobody had a gradient for stay as they are."""
    replica = Replica(PIECE, spec(kind), {PARAMETERS: start()})
    replica.apply(dense(1))
    before = replica.state()
    replica.apply(dense(2, presence=(True, False, True, True)))
    after = replica.state()
    segment = PIECE.segments[1]
    assert torch.equal(after[PARAMETERS][segment.begin : segment.end], before[PARAMETERS][segment.begin : segment.end])
    assert not torch.equal(after[PARAMETERS][: segment.begin], before[PARAMETERS][: segment.begin])
    own = [name for name in before if name.endswith(".1")]
    assert equal_states({name: after[name] for name in own}, {name: before[name] for name in own})


@each_optimizer
def test_a_skipped_update_moves_the_version_only(kind: str) -> None:
    """When all workers skip, parameters and optimizer state stay, and the next update follows."""
    replica = Replica(PIECE, spec(kind), {PARAMETERS: start()})
    replica.apply(dense(1))
    before = replica.state()
    replica.apply(Update(2, 3, (), None, (True,) * 4))
    assert replica.version == 2
    assert equal_states(replica.state(), before)


@each_optimizer
def test_a_mean_alone_moves_the_version_only(kind: str) -> None:
    """A mean that the members only wanted to know is no gradient."""
    replica = Replica(PIECE, spec(kind), {PARAMETERS: start()})
    replica.apply(dense(1))
    before = replica.state()
    replica.apply(replace(dense(2), only_mean=True))
    assert replica.version == 2
    assert equal_states(replica.state(), before)


@each_optimizer
@pytest.mark.parametrize(
    ("update", "said"),
    [
        (dense(1), "update 1 cannot follow version 1"),
        (dense(3), "update 3 cannot follow version 1"),
        (dense(2, numel=5), f"update has 5 elements, the slice has {PIECE.numel}"),
        (dense(2, presence=(True, True)), "update speaks of 2 tensors, the slice has 4"),
        (Update(2, 1, (), None, (True,)), "update speaks of 1 tensors"),
    ],
    ids=["again", "gap", "size", "presence", "presence of a skipped one"],
)
def test_an_update_that_does_not_fit_changes_nothing(kind: str, update: Update, said: str) -> None:
    """A wrong version or size is refused before anything is touched, and the right update still follows."""
    replica = Replica(PIECE, spec(kind), {PARAMETERS: start()})
    replica.apply(dense(1))
    before = replica.state()
    with pytest.raises(ProtocolError, match=said):
        replica.apply(update)
    assert replica.version == 1
    assert equal_states(replica.state(), before)
    replica.apply(dense(2))
    assert replica.version == 2


def test_an_override_holds_for_its_own_update_only() -> None:
    """Each update carries all that differs from the registered values, so the next one starts from those again."""
    one = Layout((TensorSpec("w", (1,), "float32"),)).shard_slice(0, 1)
    replica = Replica(one, OptimizerSpec("SGD", ({"lr": 1.0},)), {PARAMETERS: torch.zeros(1)})
    gradient = SparseGradient.dense(torch.ones(1))
    replica.apply(Update(1, 1, (0,), gradient, (True,), (Override(0, "lr", 0.25),)))
    replica.apply(Update(2, 1, (0,), gradient, (True,)))
    assert replica.parameters.item() == -1.25


def test_a_switch_that_the_optimizer_cannot_take_midway_is_an_error_that_names_it() -> None:
    """Torch makes state for amsgrad in the first step only; asking for it later is no foreign KeyError."""
    one = Layout((TensorSpec("w", (1,), "float32"),)).shard_slice(0, 1)
    replica = Replica(one, OptimizerSpec("Adam", ({"lr": 1.0, "amsgrad": False},)), {PARAMETERS: torch.zeros(1)})
    gradient = SparseGradient.dense(torch.ones(1))
    replica.apply(Update(1, 1, (0,), gradient, (True,)))
    with pytest.raises(OptimizerError, match=r"Adam cannot take the step to version 2 with .*amsgrad"):
        replica.apply(Update(2, 1, (0,), gradient, (True,), (Override(0, "amsgrad", True),)))


def test_a_replica_keeps_its_own_copy() -> None:
    """Neither the caller's tensors nor a state that was handed out change with later updates."""
    mine = start()
    replica = Replica(PIECE, spec("SGD momentum"), {PARAMETERS: mine})
    replica.apply(dense(1))
    kept = replica.state()
    again = {name: value.clone() for name, value in kept.items()}
    replica.apply(dense(2))
    assert torch.equal(mine, start())
    assert equal_states(kept, again)


@pytest.mark.parametrize(
    "parameters",
    [None, torch.zeros(PIECE.numel + 1), torch.zeros(PIECE.numel, dtype=torch.float64), torch.zeros(1, PIECE.numel)],
    ids=["missing", "length", "dtype", "shape"],
)
def test_parameters_that_do_not_fit_are_refused(parameters: Tensor | None) -> None:
    """A seed for another slice is told what is needed and what came."""
    state = {} if parameters is None else {PARAMETERS: parameters}
    with pytest.raises(LayoutError, match=rf"needs float32 parameters \[{PIECE.numel}\], found"):
        Replica(PIECE, spec("SGD"), state)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (state_name("exp_avg", 0), torch.zeros(5)),
        (state_name("exp_avg", 0), torch.zeros(2, 3)),
        (state_name("exp_avg", 0), torch.zeros(6, dtype=torch.int64)),
        (state_name("exp_avg", 9), torch.zeros(6)),
    ],
    ids=["length", "shape", "dtype", "tensor"],
)
def test_optimizer_state_that_does_not_fit_is_refused(name: str, value: Tensor) -> None:
    """State of another length, shape or dtype, or of a tensor not in the slice, would fail at the first step."""
    with pytest.raises(LayoutError, match=r"optimizer state exp_avg of tensor . does not fit the slice"):
        Replica(PIECE, spec("Adam"), {PARAMETERS: start(), name: value})


@given(st.text("abc._1", min_size=1, max_size=8), st.integers(0, 99))
def test_state_names_round_trip(key: str, tensor: int) -> None:
    """Whatever a key is called, dots included, its name gives it back."""
    assert [(k, t) for k, t, _ in optimizer_state({state_name(key, tensor): torch.zeros(1)})] == [(key, tensor)]
