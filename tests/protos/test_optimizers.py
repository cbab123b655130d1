"""Optimizers as data: what torch's object says comes back as the same optimizer, and everything else is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from thresher.protos.errors import OptimizerError
from thresher.protos.optimizers import (
    SUPPORTED,
    Hyperparameters,
    OptimizerSpec,
    Override,
    Subtract,
    hyperparameters_of,
    spec_of,
)

OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "maximize": True}),
    ("Adam", {"lr": 0.01, "betas": (0.8, 0.99), "amsgrad": True}),
    ("Adam", {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-6}),
    ("AdamW", {"lr": 0.01, "weight_decay": 0.1}),
    ("AdamW", {"lr": 0.01, "fused": True}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.5}),
    ("RMSprop", {"lr": 0.01, "alpha": 0.9, "centered": True, "momentum": 0.5}),
]

each_optimizer = pytest.mark.parametrize(("name", "arguments"), OPTIMIZERS)


def leaves(*sizes: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(7)
    return [nn.Parameter(torch.randn(size, generator=generator)) for size in sizes]


def torch_optimizer(name: str, parameters: object, **arguments: object) -> torch.optim.Optimizer:
    made = getattr(torch.optim, name)(parameters, **arguments)
    assert isinstance(made, torch.optim.Optimizer)
    return made


def train(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


@each_optimizer
def test_a_built_optimizer_makes_the_same_steps(name: str, arguments: dict[str, Any]) -> None:
    """Describing an optimizer and building it again gives the same bits, step by step."""
    mine, theirs = leaves(3, 5), leaves(3, 5)
    original = torch_optimizer(name, mine, **arguments)
    rebuilt = spec_of(original).build([theirs])
    for one, other in zip(train(original, mine), train(rebuilt, theirs), strict=True):
        assert torch.equal(one, other)


@each_optimizer
def test_a_built_optimizer_has_the_same_description(name: str, arguments: dict[str, Any]) -> None:
    """The description survives the round trip, group by group."""
    first, second = leaves(2, 3)
    groups = [{"params": [first]}, {"params": [second], "lr": 0.5}]
    spec = spec_of(torch_optimizer(name, groups, **arguments))
    assert spec.name == name
    assert spec.groups[1]["lr"] == 0.5
    assert spec_of(spec.build([[first], [second]])) == spec


@pytest.mark.parametrize("name", sorted(SUPPORTED))
def test_a_description_holds_plain_values_only(name: str) -> None:
    """Numbers are floats, switches are bools: nothing that would need a pickle."""
    kwargs: dict[str, Any] = {} if name == "Subtract" else {"lr": 1}
    (group,) = hyperparameters_of(SUPPORTED[name](leaves(2), **kwargs))
    assert all(isinstance(value, float | bool | str | tuple) for value in group.values())
    assert all(type(item) is float for value in group.values() if isinstance(value, tuple) for item in value)
    assert None not in group.values()


@pytest.mark.parametrize(
    ("given", "described"),
    [(1, 1.0), (0.25, 0.25), (torch.tensor(0.25), 0.25)],
    ids=["int", "float", "tensor"],
)
def test_a_learning_rate_is_a_number_whatever_its_type(given: object, described: float) -> None:
    """Torch takes an int, a float or a tensor of one element; the shard is told the number."""
    (group,) = hyperparameters_of(torch_optimizer("Adam", leaves(2), lr=given))
    assert group["lr"] == described
    assert type(group["lr"]) is float


def test_a_switch_stays_a_switch_and_a_tuple_a_tuple() -> None:
    """A bool is no number, and betas given as a list or with tensors in it are two numbers."""
    optimizer = torch_optimizer("Adam", leaves(2), lr=0.1, amsgrad=True)
    optimizer.param_groups[0]["betas"] = [torch.tensor(0.5), 0.75]
    (group,) = hyperparameters_of(optimizer)
    assert group["amsgrad"] is True
    assert group["betas"] == (0.5, 0.75)


@pytest.mark.parametrize("value", [object(), {"a": 1}, torch.ones(2), ("a", "b")])
def test_a_value_that_is_not_plain_is_refused(value: object) -> None:
    """Its name and the value are shown."""
    optimizer = torch_optimizer("SGD", leaves(2), lr=0.1)
    optimizer.param_groups[0]["lr"] = value
    with pytest.raises(OptimizerError, match="hyper-parameter 'lr' is"):
        spec_of(optimizer)


def test_what_a_scheduler_or_a_user_adds_is_no_hyperparameter() -> None:
    """``initial_lr`` and names in a group are left out, so a schedule can be made before or after wrapping."""
    optimizer = torch_optimizer("SGD", [{"params": leaves(2), "comment": object()}], lr=0.1)
    before = spec_of(optimizer)
    torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)
    assert "initial_lr" in optimizer.param_groups[0]
    assert spec_of(optimizer) == before
    assert not {"initial_lr", "comment", "params"} & set(before.groups[0])


class _MySGD(torch.optim.SGD):
    """A subclass, which may do anything in its step."""


@pytest.mark.parametrize("make", [torch.optim.LBFGS, torch.optim.Rprop, _MySGD], ids=["LBFGS", "Rprop", "subclass"])
def test_an_unsupported_optimizer_is_refused_with_the_list(make: Callable[..., torch.optim.Optimizer]) -> None:
    """The message names the optimizer and lists those that the shards apply."""
    with pytest.raises(OptimizerError) as caught:
        spec_of(make(leaves(2), lr=0.1))
    assert type(make(leaves(2), lr=0.1)).__name__ in str(caught.value)
    assert "they apply SGD, Adam, AdamW, Adagrad, RMSprop" in str(caught.value)


def test_a_foreign_class_with_a_known_name_is_refused() -> None:
    """Only torch's own class counts, not its name."""
    imposter = type("SGD", (torch.optim.SGD,), {})
    with pytest.raises(OptimizerError, match="do not apply the optimizer"):
        spec_of(imposter(leaves(2), lr=0.1))


GROUPS: tuple[Hyperparameters, ...] = ({"lr": 0.1, "nesterov": False, "betas": (0.9, 0.99)}, {"lr": 0.2, "alpha": 1.0})
SPEC = OptimizerSpec("SGD", GROUPS)

changes = st.lists(
    st.sampled_from([Override(0, "lr", 0.3), Override(0, "nesterov", True), Override(0, "betas", (0.5, 0.6)),
                     Override(1, "lr", 0.4), Override(1, "alpha", 0.0)]),
    unique=True,
)  # fmt: skip


@given(changes)
def test_overrides_are_exactly_what_differs(changed: list[Override]) -> None:
    """Every changed value is told, no other, in an order that does not depend on who changed what first."""
    groups = [dict(group) for group in GROUPS]
    for one in changed:
        groups[one.group][one.name] = one.value
    told = SPEC.overrides(groups)
    assert set(told) == set(changed)
    assert list(told) == sorted(told, key=lambda one: (one.group, one.name))
    assert SPEC.checked(told) == told


@given(changes)
def test_configuring_puts_overrides_in_force_for_one_step(changed: list[Override]) -> None:
    """After `configure` the groups hold the registered values as changed by these overrides, whatever came before."""
    optimizer = SPEC.build([leaves(1), leaves(1)])
    SPEC.configure(optimizer, [Override(0, "lr", 99.0), Override(1, "alpha", 99.0)])
    SPEC.configure(optimizer, changed)
    for index, group in enumerate(GROUPS):
        for name, value in group.items():
            expected = next((o.value for o in changed if (o.group, o.name) == (index, name)), value)
            assert optimizer.param_groups[index][name] == expected


@pytest.mark.parametrize(
    "groups",
    [GROUPS[:1], (*GROUPS, {"lr": 0.1}), (GROUPS[0], {"lr": 0.2}), (GROUPS[0], {**GROUPS[1], "beta": 0.1})],
    ids=["group removed", "group added", "value removed", "value added"],
)
def test_added_or_removed_groups_are_refused(groups: tuple[Hyperparameters, ...]) -> None:
    """Shards build the optimizer once, so the message asks to build the groups before wrapping."""
    with pytest.raises(OptimizerError, match=r"were added or removed.*before wrapping"):
        SPEC.overrides(groups)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (Override(2, "lr", 0.1), "group 2 of SGD has no hyper-parameter 'lr'"),
        (Override(0, "momentum", 0.1), "group 0 of SGD has no hyper-parameter 'momentum'"),
        (Override(0, "lr", "fast"), "'lr' of group 0 is 0.1, it cannot be 'fast'"),
        (Override(0, "lr", True), "it cannot be True"),
        (Override(0, "nesterov", 1.0), "it cannot be 1.0"),
        (Override(0, "betas", (0.9,)), r"it cannot be \(0.9,\)"),
        (Override(0, "lr", float("nan")), "it cannot be nan"),
        (Override(0, "betas", (0.9, float("inf"))), "inf"),
    ],
)
def test_an_override_of_another_kind_is_refused(override: Override, said: str) -> None:
    """What names nothing that exists, or gives it a value of another kind, or no finite number, is refused."""
    with pytest.raises(OptimizerError, match=said):
        SPEC.checked([override])


def test_subtract_subtracts_and_leaves_the_rest() -> None:
    """The shard's side of a method whose workers send finished updates: x minus the mean, nothing else."""
    one, other = nn.Parameter(torch.tensor([3.0])), nn.Parameter(torch.tensor([5.0]))
    one.grad = torch.tensor([0.5])
    Subtract([one, other]).step()
    assert (one.item(), other.item()) == (2.5, 5.0)


def test_subtract_takes_no_closure() -> None:
    """There is no loss to evaluate where it runs."""
    with pytest.raises(OptimizerError, match="no closure"):
        Subtract(leaves(1)).step(lambda: 0.0)
