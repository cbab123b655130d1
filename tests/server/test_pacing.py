"""What decays once per round in sync decays as much in N pushes, and a gradient moves the model as far in the end."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.protos.layout import Layout, TensorSpec
from thresher.protos.optimizers import OptimizerSpec, Override
from thresher.protos.replica import PARAMETERS, Replica
from thresher.protos.sparse import SparseGradient
from thresher.protos.update import Update
from thresher.server.pacing import per_push

PIECE = Layout((TensorSpec("w", (1,), "float32"),)).shard_slice(0, 1)
ADAM = OptimizerSpec("Adam", ({"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8},))

momenta = st.floats(0.05, 0.9)
members = st.integers(1, 8)


def displacement(spec: OptimizerSpec, overrides: tuple[Override, ...], gradient: float, steps: int) -> float:
    """How far one gradient has moved a parameter after it and further steps without any; older ones came before it."""
    replica = Replica(PIECE, spec, {PARAMETERS: torch.zeros(1)})
    means = [0.0, gradient] + [0.0] * steps  # the first step of torch's momentum knows no dampening
    for version, mean in enumerate(means, 1):
        update = Update(version, 1, (0,), SparseGradient.dense(torch.tensor([mean])), (True,), overrides)
        replica.apply(update)
    return replica.parameters.item()


@settings(max_examples=30)
@given(momentum=momenta, workers=members, variant=st.sampled_from(["plain", "nesterov", "dampening"]))
def test_a_gradient_moves_the_model_as_far_as_in_sync(momentum: float, workers: int, variant: str) -> None:
    """Law: the whole displacement of one of N gradients is lr·g/(N·(1 - β)), as in a round of all N."""
    dampening = 0.25 if variant == "dampening" else 0.0
    hyper = {"lr": 0.5, "momentum": momentum, "dampening": dampening, "nesterov": variant == "nesterov"}
    spec = OptimizerSpec("SGD", (hyper,))
    steps = int(14 / (1 - momentum))  # what is left is below exp(-14)
    expected = -0.5 * (1 - dampening) * 4.0 / (workers * (1 - momentum))
    assert displacement(spec, (), 4.0 / workers, steps) == pytest.approx(expected, rel=1e-4)
    slowed = per_push((), spec, workers)
    assert displacement(spec, slowed, 4.0 / workers, steps * workers) == pytest.approx(expected, rel=1e-4)


@given(momentum=momenta, workers=members)
def test_n_pushes_decay_by_what_one_round_does(momentum: float, workers: int) -> None:
    """Law: the momentum of a push, to the power N, is the user's; that of Adam's and RMSprop's averages too."""
    sgd = OptimizerSpec("SGD", ({"lr": 0.1, "momentum": 0.0},))
    changed = {one.name: one.value for one in per_push((Override(0, "momentum", momentum),), sgd, workers)}
    assert isinstance(changed["momentum"], float)
    assert changed["momentum"] ** workers == pytest.approx(momentum)
    rmsprop = OptimizerSpec("RMSprop", ({"lr": 0.1, "alpha": momentum, "momentum": 0.0},))
    for one in per_push((), rmsprop, workers):
        assert one.name == "alpha"
        assert isinstance(one.value, float)
        assert one.value**workers == pytest.approx(momentum)
    for one in per_push((), ADAM, workers):
        assert one.name == "betas"
        assert isinstance(one.value, tuple)
        assert [beta**workers for beta in one.value] == pytest.approx([0.9, 0.999])


@given(momentum=st.floats(0, 1.5), rate=st.floats(0, 10), beta=st.floats(0, 1, exclude_max=True))
def test_alone_nothing_changes(momentum: float, rate: float, beta: float) -> None:
    """Law: with one member the numbers are the push's own, bit for bit."""
    spec = OptimizerSpec("SGD", ({"lr": 0.1, "momentum": 0.5}, {"lr": rate, "momentum": momentum}))
    pushed = spec.overrides([{"lr": rate, "momentum": momentum}, {"lr": 0.1, "momentum": 0.5}])
    assert per_push(pushed, spec, 1) == pushed
    betas = ADAM.overrides([{"lr": rate, "betas": (beta, 0.5), "eps": 1e-8}])
    assert per_push(betas, ADAM, 1) == betas


@given(members)
def test_adams_correction_after_n_pushes_is_that_of_a_round(workers: int) -> None:
    """What is divided by 1 - β^t counts pushes, and N of them are a round: a steady gradient is seen whole at once."""
    spec = OptimizerSpec("Adam", ({"lr": 0.01, "betas": (0.9, 0.999), "eps": 0.0},))
    replica = Replica(PIECE, spec, {PARAMETERS: torch.zeros(1)})
    for version in range(1, 4):
        mean = SparseGradient.dense(torch.tensor([2.0]))
        replica.apply(Update(version, 1, (0,), mean, (True,), per_push((), spec, workers)))
        assert replica.parameters.item() == pytest.approx(-0.01 * version, rel=1e-4)


@pytest.mark.parametrize(
    "spec",
    [
        OptimizerSpec("Subtract", ({},)),
        OptimizerSpec("Adagrad", ({"lr": 0.1, "lr_decay": 0.0},)),
        OptimizerSpec("SGD", ({"lr": 0.1, "momentum": 1.0},)),
        OptimizerSpec("SGD", ({"lr": 0.1, "momentum": 0.0},)),
    ],
    ids=["finished-updates", "adagrad", "no-decay", "no-momentum"],
)
def test_what_does_not_decay_is_left_alone(spec: OptimizerSpec) -> None:
    """No rate changes where no momentum does, and a momentum of 1 has no end that could stay the same."""
    assert per_push((), spec, 4) == ()


def test_each_group_has_its_own_momentum_and_the_schedule_of_the_push() -> None:
    """The rate that is scaled is the one the push came with; a group without momentum keeps its own."""
    spec = OptimizerSpec("SGD", ({"lr": 1.0, "momentum": 0.25}, {"lr": 1.0, "momentum": 0.0}))
    changed = per_push((Override(0, "lr", 3.0), Override(1, "lr", 5.0)), spec, 2)
    assert changed == (Override(0, "lr", 3.0 * (0.5 / 0.75)), Override(0, "momentum", 0.5), Override(1, "lr", 5.0))
