"""Placements: what is compressed, what the shards are told, and where the model goes on."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from thresher.protos.errors import OptimizerError
from thresher.protos.layout import Layout, TensorSpec
from thresher.protos.optimizers import OptimizerSpec, Override
from thresher.worker.outer import outer_spec
from thresher.worker.placement import GradientPlaced, UpdatePlaced

LAYOUT = Layout(
    (
        TensorSpec("a", (3,), "float32", group=0),
        TensorSpec("b", (2, 2), "float32", group=1),
        TensorSpec("nothing", (0,), "float32", group=1),
        TensorSpec("c", (), "float32", group=0),
    )
)
NUMEL = LAYOUT.numel
GROUPS: tuple[dict[str, Any], ...] = (
    {"lr": 0.5, "momentum": 0.5, "weight_decay": 0.0},
    {"lr": 0.5, "momentum": 0.5, "weight_decay": 0.25},
)
SPEC = OptimizerSpec("SGD", GROUPS)
EVERYTHING = (True,) * 4

vectors = st.lists(st.integers(-16, 16), min_size=NUMEL, max_size=NUMEL).map(lambda found: torch.tensor(found).float())
presences = st.lists(st.booleans(), min_size=4, max_size=4).map(tuple)


def placed(parameters: Tensor, detached: float = 0.0, outer: str = "") -> UpdatePlaced:
    (whole,) = LAYOUT.slices(1)
    return UpdatePlaced(SPEC, outer_spec(outer, 2), whole, {"parameters": parameters}, detached)


def pieces(parameters: Tensor, shards: int = 2) -> list[tuple[Any, Tensor]]:
    return [(piece, parameters[piece.begin : piece.end]) for piece in LAYOUT.slices(shards)]


@given(vectors, st.lists(st.tuples(vectors, presences), min_size=1, max_size=4))
def test_updates_are_what_the_optimizer_has_moved(parameters: Tensor, steps: list[tuple[Tensor, Any]]) -> None:
    """Any number of local steps with torch's own optimizer, momentum and decay and absent tensors included."""
    placement = placed(parameters)
    leaves = [
        parameters[low:high].clone().requires_grad_() for low, high in ((0, 3), (3, 7), (7, 7), (7, 8))
    ]  # fmt: skip
    optimizer = torch.optim.SGD(
        [{"params": [leaves[0], leaves[3]], **GROUPS[0]}, {"params": [leaves[1], leaves[2]], **GROUPS[1]}]
    )
    for gradient, presence in steps:
        for leaf, present, (low, high) in zip(leaves, presence, ((0, 3), (3, 7), (7, 7), (7, 8)), strict=True):
            leaf.grad = gradient[low:high].clone() if present else None
        optimizer.step()
        flat = gradient.clone()
        for present, (low, high) in zip(presence, ((0, 3), (3, 7), (7, 7), (7, 8)), strict=True):
            flat[low:high] *= present
        placement.take(flat, presence, GROUPS)
    message = placement.message()
    assert message is not None
    moved = torch.cat([leaf.detach() for leaf in leaves])
    assert torch.equal(message.vector, parameters - moved)
    assert torch.equal(torch.cat([values for _, values in placement.point(pieces(parameters))]), moved)
    assert message.presence == tuple(map(any, zip(*(presence for _, presence in steps), strict=True)))


@given(vectors, vectors, st.sampled_from([0.0, 0.25, 1.0]), st.integers(1, NUMEL))
def test_the_next_gradient_is_taken_at_the_detached_point(
    parameters: Tensor, residual: Tensor, detached: float, shards: int
) -> None:
    """After a round the model goes on from x - c·residual, wherever the shards cut (arXiv:2004.05298)."""
    placement = placed(torch.zeros(NUMEL), detached)
    placement.begin(pieces(parameters, shards), residual)
    ((_, point),) = placement.point(pieces(parameters, shards))
    assert torch.equal(point, parameters - detached * residual)
    assert placement.message() is None


def test_updates_carry_the_step_size() -> None:
    """The shards only subtract: they are told no rate, and thresholds are in units of the largest on the way."""
    placement = placed(torch.zeros(NUMEL))
    assert placement.shard_optimizer == OptimizerSpec("Subtract", ({}, {}))
    for rate in (0.125, 0.25, 0.0):
        groups = tuple({**group, "lr": rate} for group in GROUPS)
        placement.take(torch.ones(NUMEL), EVERYTHING, groups)
        assert placement.overrides(groups) == ()
    message = placement.message()
    assert message is not None
    assert message.scale == 0.25


def test_steps_of_size_zero_say_nothing() -> None:
    """A warm-up that begins at 0 moves nothing, and a threshold of γλ = 0 would send all of the residual."""
    placement = placed(torch.ones(NUMEL))
    placement.take(torch.ones(NUMEL), EVERYTHING, tuple({**group, "lr": 0.0} for group in GROUPS))
    assert placement.message() is None


def test_the_outer_optimizer_is_the_shards() -> None:
    """With an outer optimizer the shards step along the mean, and rank 0 seeds them without the inner state."""
    placement = placed(torch.zeros(NUMEL), outer="SGD(lr=0.7, momentum=0.9)")
    assert placement.shard_optimizer.name == "SGD"
    assert placement.shard_optimizer.groups[1]["lr"] == 0.7
    state = {"parameters": torch.zeros(1), "state.momentum_buffer.0": torch.ones(1)}
    assert placement.seed(state).keys() == {"parameters"}
    assert GradientPlaced(SPEC).seed(state).keys() == state.keys()


def test_gradients_are_left_to_the_shards() -> None:
    """The message is the gradient itself; the shards run the optimizer and hear of every changed hyper-parameter."""
    placement = GradientPlaced(SPEC)
    gradient, x = torch.arange(float(NUMEL)), pieces(torch.zeros(NUMEL))
    assert placement.message() is None
    placement.take(gradient, EVERYTHING, GROUPS)
    message = placement.message()
    assert message is not None
    assert message.vector is gradient
    assert (message.presence, message.scale) == (EVERYTHING, 1.0)
    assert placement.shard_optimizer is SPEC
    later = (GROUPS[0], {**GROUPS[1], "weight_decay": 1.0})
    assert placement.overrides(GROUPS) == ()
    assert placement.overrides(later) == (Override(1, "weight_decay", 1.0),)
    placement.begin(x, gradient)
    assert placement.message() is None
    assert placement.point(x) is x


@pytest.mark.parametrize("spec", [SPEC, OptimizerSpec("Adam", ({"lr": 1.0},))])
def test_momentum_on_both_sides_is_refused(spec: OptimizerSpec) -> None:
    """A method that keeps a momentum needs plain SGD behind it, from the start and for ever."""
    with pytest.raises(OptimizerError, match=r"keeps a momentum of 0\.9 at the workers.*set momentum=0"):
        GradientPlaced(spec, momentum=0.9)
    plain = GradientPlaced(OptimizerSpec("SGD", ({"lr": 1.0, "momentum": 0.0},)), momentum=0.9)
    with pytest.raises(OptimizerError, match="set momentum=0"):
        plain.overrides(({"lr": 1.0, "momentum": 0.5},))


def test_groups_must_stay() -> None:
    """A group that is added later would have no effect at the worker's optimizer."""
    with pytest.raises(OptimizerError, match="added or removed"):
        placed(torch.zeros(NUMEL)).overrides((*GROUPS, GROUPS[0]))


def test_updates_need_one_rate() -> None:
    """One threshold γλ for the whole model needs one γ; a rate that is no finite number is none."""
    placement = placed(torch.zeros(NUMEL))
    for rates in ((0.5, 0.25), (float("nan"), float("nan")), (float("inf"), float("inf"))):
        groups = tuple({**group, "lr": rate} for group, rate in zip(GROUPS, rates, strict=True))
        with pytest.raises(OptimizerError, match="one learning rate for all parameter groups"):
            placement.take(torch.zeros(NUMEL), EVERYTHING, groups)
