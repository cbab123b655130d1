"""Placements: what is compressed, and what the shards are told."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from thresher.protos.errors import OptimizerError
from thresher.protos.layout import Layout, TensorSpec
from thresher.protos.optimizers import OptimizerSpec, Override
from thresher.worker.placement import GradientPlaced, UpdatePlaced

LAYOUT = Layout(
    (
        TensorSpec("a", (3,), "float32", group=0),
        TensorSpec("b", (2, 2), "float32", group=1),
        TensorSpec("c", (), "float32", group=0),
    )
)
NUMEL = LAYOUT.numel
GROUPS: tuple[dict[str, Any], ...] = ({"lr": 0.5, "weight_decay": 0.0}, {"lr": 0.5, "weight_decay": 0.25})
PLAIN = OptimizerSpec("SGD", GROUPS)

vectors = st.lists(st.integers(-16, 16), min_size=NUMEL, max_size=NUMEL).map(lambda found: torch.tensor(found).float())


@given(vectors, vectors, st.lists(st.booleans(), min_size=3, max_size=3), st.integers(1, NUMEL))
def test_updates_are_what_sgd_would_subtract(
    gradient: Tensor, parameters: Tensor, present: list[bool], shards: int
) -> None:
    """γ·(g + decay·x) of each tensor with a gradient, as torch's own SGD steps, wherever the shards cut; else zero."""
    leaves, begin = [], 0
    for spec, is_present in zip(LAYOUT.trained, present, strict=True):
        leaf = parameters[begin : begin + spec.numel].clone().requires_grad_()
        if is_present:
            leaf.grad = gradient[begin : begin + spec.numel].clone()
        else:
            gradient[begin : begin + spec.numel] = 0.0
        leaves.append(leaf)
        begin += spec.numel
    groups = [{"params": [leaves[0], leaves[2]], **GROUPS[0]}, {"params": [leaves[1]], **GROUPS[1]}]
    torch.optim.SGD(groups).step()
    pieces = [parameters[piece.begin : piece.end] for piece in LAYOUT.slices(shards)]
    message = UpdatePlaced(PLAIN, LAYOUT).message(gradient, tuple(present), pieces, GROUPS)
    assert torch.equal(parameters - message, torch.cat([leaf.detach() for leaf in leaves]))


def test_updates_carry_the_step_size() -> None:
    """The shards only subtract: they are told no rate, and thresholds are in units of it."""
    placement = UpdatePlaced(PLAIN, LAYOUT)
    later = tuple({**group, "lr": 0.125} for group in GROUPS)
    assert placement.shard_optimizer == OptimizerSpec("Subtract", ({}, {}))
    assert (placement.scale(GROUPS), placement.scale(later)) == (0.5, 0.125)
    assert placement.overrides(later) == ()


def test_gradients_are_left_to_the_shards() -> None:
    """The message is the gradient itself; the shards run the optimizer and hear of every changed hyper-parameter."""
    placement = GradientPlaced(PLAIN)
    gradient = torch.arange(float(NUMEL))
    assert placement.message(gradient, (True,) * 3, [gradient], GROUPS) is gradient
    assert placement.shard_optimizer is PLAIN
    assert placement.scale(GROUPS) == 1.0
    later = (GROUPS[0], {**GROUPS[1], "weight_decay": 1.0})
    assert placement.overrides(GROUPS) == ()
    assert placement.overrides(later) == (Override(1, "weight_decay", 1.0),)


@pytest.mark.parametrize(
    "spec",
    [
        OptimizerSpec("Adam", ({"lr": 1.0},)),
        OptimizerSpec("SGD", ({"lr": 1.0}, {"lr": 1.0, "momentum": 0.9})),
        OptimizerSpec("SGD", ({"lr": 1.0, "nesterov": True},)),
        OptimizerSpec("SGD", ({"lr": 1.0, "maximize": True},)),
    ],
)
def test_updates_need_plain_sgd(spec: OptimizerSpec) -> None:
    """State or signs on both sides would be applied twice or lost."""
    with pytest.raises(OptimizerError, match=r"plain torch\.optim\.SGD"):
        UpdatePlaced(spec, LAYOUT)


def test_plain_sgd_must_stay_plain() -> None:
    """Momentum that is switched on later is refused, as is a new group: neither would have an effect."""
    placement = UpdatePlaced(OptimizerSpec("SGD", ({"lr": 1.0, "momentum": 0.0},)), LAYOUT)
    with pytest.raises(OptimizerError, match=r"momentum=0\.5"):
        placement.overrides(({"lr": 1.0, "momentum": 0.5},))
    with pytest.raises(OptimizerError, match="added or removed"):
        placement.overrides(({"lr": 1.0, "momentum": 0.0}, {"lr": 1.0, "momentum": 0.0}))


def test_updates_need_one_rate() -> None:
    """One threshold γλ for the whole model needs one γ; a rate that is no finite number is none."""
    placement = UpdatePlaced(PLAIN, LAYOUT)
    for rates in ((0.5, 0.25), (float("nan"), float("nan")), (float("inf"), float("inf"))):
        with pytest.raises(OptimizerError, match="one learning rate for all parameter groups"):
            placement.scale(tuple({"lr": rate} for rate in rates))
