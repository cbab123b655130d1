"""Where the optimizer runs: at the shards (gradient-placed) or beside the model (update-placed)."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol, final

import torch
from torch import Tensor

from thresher.protos.errors import OptimizerError
from thresher.protos.layout import Layout
from thresher.protos.optimizers import Hyperparameters, OptimizerSpec, Override, Subtract
from thresher.protos.update import Presence


class Placement(Protocol):
    """What is compressed, and what the shards do with its mean."""

    @property
    def shard_optimizer(self) -> OptimizerSpec:
        """The optimizer that shards and replicas run."""
        ...

    def message(
        self,
        gradient: Tensor,
        presence: Presence,
        parameters: Sequence[Tensor],
        groups: Sequence[Hyperparameters],
    ) -> Tensor:
        """Turn the flat gradient [numel] into what is compressed; ``gradient`` may be overwritten.

        Args:
            gradient: [numel] float32.
            presence: Which trained tensors have a gradient; that of the others is zero.
            parameters: The replicas' parameters, shard by shard; together [numel].
            groups: Hyper-parameters of each parameter group, as they stand.
        """
        ...

    def scale(self, groups: Sequence[Hyperparameters]) -> float:
        """Return the unit of messages in units of gradients: thresholds are multiplied by it."""
        ...

    def overrides(self, groups: Sequence[Hyperparameters]) -> tuple[Override, ...]:
        """Return what the shards must know about changed hyper-parameters."""
        ...


@final
class GradientPlaced:
    """The gradient itself is compressed; shards and replicas run the user's optimizer on the mean.

    Source: arXiv:2108.00951, Algorithm 2. The residual is in gradient units.
    """

    def __init__(self, spec: OptimizerSpec) -> None:
        """Place ``spec`` at the shards."""
        self.shard_optimizer = spec

    def message(
        self,
        gradient: Tensor,
        presence: Presence,  # noqa: ARG002 - as are the next two, for the other placement
        parameters: Sequence[Tensor],  # noqa: ARG002
        groups: Sequence[Hyperparameters],  # noqa: ARG002
    ) -> Tensor:
        """Return the gradient as it is."""
        return gradient

    def scale(self, groups: Sequence[Hyperparameters]) -> float:  # noqa: ARG002 - for the other placement
        """Return 1: messages are gradients."""
        return 1.0

    def overrides(self, groups: Sequence[Hyperparameters]) -> tuple[Override, ...]:
        """Return every hyper-parameter that differs from the registered one."""
        return self.shard_optimizer.overrides(groups)


@final
class UpdatePlaced:
    """The finished step γ·(g + decay·x) is compressed; the shards only subtract the mean.

    Source: arXiv:2108.00951, Algorithm 1: plain SGD with the step size inside, residual in update units, threshold γλ
    (C_γ(x) = γ·C(x/γ)).

    Raises:
        OptimizerError: for anything but plain SGD, whose state would then live on both sides.
    """

    def __init__(self, spec: OptimizerSpec, layout: Layout) -> None:
        """Check that ``spec`` is plain SGD."""
        _refuse_more_than_plain_sgd(spec.name, spec.groups)
        self.shard_optimizer = OptimizerSpec(Subtract.__name__, tuple({} for _ in spec.groups))
        self._spec = spec
        self._layout = layout

    def message(
        self,
        gradient: Tensor,
        presence: Presence,
        parameters: Sequence[Tensor],
        groups: Sequence[Hyperparameters],
    ) -> Tensor:
        """Return γ·(g + decay·x), in place of the gradient; a tensor without gradient does not decay."""
        decays = [_number(group, "weight_decay") for group in groups]
        if any(decays):
            self._add_decay(gradient, presence, torch.cat(list(parameters)), decays)
        return gradient.mul_(self.scale(groups))

    def scale(self, groups: Sequence[Hyperparameters]) -> float:
        """Return the learning rate γ.

        Raises:
            OptimizerError: when the groups have different ones; a threshold γλ needs one γ.
        """
        rates = {_number(group, "lr") for group in groups}
        if len(rates) != 1 or not math.isfinite(min(rates)):
            raise OptimizerError(
                f"update-placed exchange needs one learning rate for all parameter groups, not {sorted(rates)}"
            )
        return rates.pop()

    def overrides(self, groups: Sequence[Hyperparameters]) -> tuple[Override, ...]:
        """Return nothing: the step size is inside the message.

        Raises:
            OptimizerError: when groups were added, or the optimizer is no longer plain SGD.
        """
        self._spec.overrides(groups)
        _refuse_more_than_plain_sgd(self._spec.name, groups)
        return ()

    def _add_decay(self, gradient: Tensor, presence: Presence, parameters: Tensor, decays: Sequence[float]) -> None:
        bounds = pairwise(self._layout.offsets)
        for spec, present, (low, high) in zip(self._layout.trained, presence, bounds, strict=True):
            if present:
                gradient[low:high].add_(parameters[low:high], alpha=decays[spec.group])


def _refuse_more_than_plain_sgd(name: str, groups: Sequence[Hyperparameters]) -> None:
    stateful = [
        f"{option}={group[option]}"
        for group in groups
        for option in ("momentum", "dampening", "nesterov", "maximize")
        if group.get(option)
    ]
    if name != "SGD" or stateful:
        what = ", ".join(stateful) or name
        raise OptimizerError(
            f"update-placed exchange applies plain torch.optim.SGD (lr and weight_decay) at the worker, not {what}; "
            "use plain SGD, or gradient-placed exchange, which runs your optimizer at the shards"
        )


def _number(group: Hyperparameters, name: str) -> float:
    value = group.get(name, 0.0)
    return value if isinstance(value, float) else math.nan
