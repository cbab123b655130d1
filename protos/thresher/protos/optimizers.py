"""Torch's own optimizers by name and plain hyper-parameters: what shards and replicas run, never pickled."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from thresher.protos.errors import OptimizerError

Hyperparameter = float | bool | str | tuple[float, ...]
Hyperparameters = Mapping[str, Hyperparameter]


@final
class Subtract(torch.optim.Optimizer):
    """x ← x - mean: the shard's side of an update-placed method, whose workers send finished updates.

    Source: arXiv:2108.00951, Algorithm 1 (the step size is inside the message).
    """

    def __init__(self, params: ParamsT) -> None:
        """Take parameters or parameter groups as every torch optimizer does."""
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Subtract each parameter's gradient from it; a parameter without one stays as it is."""
        if closure is not None:
            raise OptimizerError("Subtract takes no closure")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad)


SUPPORTED: Final[Mapping[str, type[torch.optim.Optimizer]]] = {
    "SGD": torch.optim.SGD,
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "Adagrad": torch.optim.Adagrad,
    "RMSprop": torch.optim.RMSprop,
    "Subtract": Subtract,
}

# They choose between implementations. Shards and replicas run the plain loop: its bits do not depend on how tensors are
# cut, and it leaves the gradients as they are.
_IGNORED = frozenset({"capturable", "differentiable", "foreach", "fused"})


@final
@dataclass(frozen=True, slots=True)
class Override:
    """A hyper-parameter of one group whose value differs from the one in the `OptimizerSpec`."""

    group: int
    name: str
    value: Hyperparameter


@final
@dataclass(frozen=True, slots=True)
class OptimizerSpec:
    """A torch optimizer as data: the ``name`` of its class and the hyper-parameters of each parameter group.

    Raises:
        OptimizerError: for a name that is not in `SUPPORTED`; the message lists those that are.
    """

    name: str
    groups: tuple[Hyperparameters, ...]

    def __post_init__(self) -> None:
        """Refuse what the shards cannot apply."""
        if self.name not in SUPPORTED:
            known = ", ".join(name for name in SUPPORTED if name != Subtract.__name__)
            raise OptimizerError(f"the shards do not apply the optimizer {self.name!r}; they apply {known}")

    def overrides(self, groups: Sequence[Hyperparameters]) -> tuple[Override, ...]:
        """Return what in ``groups`` differs from this spec, in a fixed order.

        Raises:
            OptimizerError: when groups or hyper-parameters were added or removed.
        """
        if [sorted(group) for group in groups] != [sorted(group) for group in self.groups]:
            raise OptimizerError(
                "parameter groups or hyper-parameters were added or removed after the optimizer was wrapped; "
                "change the values of existing ones, or build the groups before wrapping"
            )
        return tuple(
            Override(index, name, now[name])
            for index, (then, now) in enumerate(zip(self.groups, groups, strict=True))
            for name in sorted(now)
            if now[name] != then[name]
        )

    def checked(self, overrides: Sequence[Override]) -> tuple[Override, ...]:
        """Return ``overrides`` when each names an existing hyper-parameter by a finite value of its kind.

        Raises:
            OptimizerError: naming the first that does not.
        """
        for one in overrides:
            if one.group >= len(self.groups) or one.name not in self.groups[one.group]:
                raise OptimizerError(f"parameter group {one.group} of {self.name} has no hyper-parameter {one.name!r}")
            registered = self.groups[one.group][one.name]
            if not _same_kind(registered, one.value):
                raise OptimizerError(f"{one.name!r} of group {one.group} is {registered!r}, it cannot be {one.value!r}")
        return tuple(overrides)

    def build(self, parameters: Sequence[Sequence[Tensor]]) -> torch.optim.Optimizer:
        """Return a fresh torch optimizer over ``parameters``, one sequence of leaf tensors per group."""
        construct: Callable[..., torch.optim.Optimizer] = SUPPORTED[self.name]  # each has other arguments
        groups = [{"params": list(members), **hyper} for members, hyper in zip(parameters, self.groups, strict=True)]
        # Some constructors (Adagrad) read an argument once and never look into the group.
        accepted = set(inspect.signature(construct).parameters) & set(self.groups[0])
        keywords: dict[str, Any] = {name: self.groups[0][name] for name in accepted}
        return construct(groups, **keywords)

    def configure(self, optimizer: torch.optim.Optimizer, overrides: Sequence[Override]) -> None:
        """Put the spec's values, as changed by ``overrides``, into the groups of an optimizer that `build` returned."""
        for group, hyper in zip(optimizer.param_groups, self.groups, strict=True):
            group.update(hyper)
        for one in overrides:
            optimizer.param_groups[one.group][one.name] = one.value


def hyperparameters_of(optimizer: torch.optim.Optimizer) -> tuple[Hyperparameters, ...]:
    """Return the plain hyper-parameters of each parameter group of a torch optimizer, as they stand now.

    What a scheduler or a user adds to a group (``initial_lr``, names) is not a hyper-parameter and is left out.

    Raises:
        OptimizerError: for a value that is not a number, a switch, a word or a tuple of numbers.
    """
    names = [name for name in optimizer.defaults if name not in _IGNORED]
    return tuple(
        {name: _plain(name, group[name]) for name in names if group.get(name) is not None}
        for group in optimizer.param_groups
    )


def spec_of(optimizer: torch.optim.Optimizer) -> OptimizerSpec:
    """Describe a torch optimizer as data.

    Raises:
        OptimizerError: when its exact class is not one of `SUPPORTED` (a subclass may do anything), or when a
            hyper-parameter is not a plain value.
    """
    name = type(optimizer).__name__
    if SUPPORTED.get(name) is not type(optimizer):
        name = f"{type(optimizer).__module__}.{name}"
    return OptimizerSpec(name, hyperparameters_of(optimizer))


def _plain(name: str, value: object) -> Hyperparameter:
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value.item())
    if isinstance(value, bool | str):
        return value
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, tuple | list) and all(isinstance(item, int | float | Tensor) for item in value):
        return tuple(float(item) for item in value)
    raise OptimizerError(f"hyper-parameter {name!r} is {value!r}; only numbers, switches and words can be sent")


def _same_kind(registered: Hyperparameter, value: Hyperparameter) -> bool:
    if isinstance(registered, tuple) and isinstance(value, tuple):
        return len(registered) == len(value) and all(math.isfinite(item) for item in value)
    return type(registered) is type(value) and not (isinstance(value, float) and not math.isfinite(value))
