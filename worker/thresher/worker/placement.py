"""Where the optimizer runs: at the shards (gradient-placed) or beside the model (update-placed). The seam of design §10."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol, final

from torch import Tensor

from thresher.protos.errors import OptimizerError
from thresher.protos.layout import Layout
from thresher.protos.optimizers import Hyperparameters, OptimizerSpec, Override, Subtract


class Placement(Protocol):
    """What is compressed, and what the shards do with its mean."""

    @property
    def name(self) -> str:
        """For people and for registration."""
        ...

    @property
    def shard_optimizer(self) -> OptimizerSpec:
        """The optimizer that shards and replicas run."""
        ...

    def message(self, gradient: Tensor, parameters: Sequence[Tensor], groups: Sequence[Hyperparameters]) -> Tensor:
        """Turn the flat gradient [numel] into what is compressed; ``gradient`` may be overwritten.

        Args:
            gradient: [numel] float32.
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

    name = "gradient-placed"

    def __init__(self, spec: OptimizerSpec) -> None:
        """Place ``spec`` at the shards."""
        self.shard_optimizer = spec

    def message(self, gradient: Tensor, parameters: Sequence[Tensor], groups: Sequence[Hyperparameters]) -> Tensor:
        """Return the gradient as it is."""
        return gradient

    def scale(self, groups: Sequence[Hyperparameters]) -> float:
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

    name = "update-placed"

    def __init__(self, spec: OptimizerSpec, layout: Layout) -> None:
        """Check that ``spec`` is plain SGD."""
        stateful = [
            f"{name}={group[name]}"
            for group in spec.groups
            for name in ("momentum", "dampening", "nesterov", "maximize")
            if group.get(name)
        ]
        if spec.name != "SGD" or stateful:
            what = ", ".join(stateful) or spec.name
            raise OptimizerError(
                f"update-placed exchange applies plain torch.optim.SGD (lr and weight_decay) at the worker, not {what}; "
                "use plain SGD, or gradient-placed exchange, which runs your optimizer at the shards"
            )
        self.shard_optimizer = OptimizerSpec(Subtract.__name__, tuple({} for _ in spec.groups))
        self._layout = layout

    def message(self, gradient: Tensor, parameters: Sequence[Tensor], groups: Sequence[Hyperparameters]) -> Tensor:
        """Return γ·(g + decay·x), in place of the gradient."""
        decays = [_number(group, "weight_decay") for group in groups]
        if any(decays):
            self._add_decay(gradient, parameters, decays)
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
        """Return nothing: the step size is inside the message."""
        return ()

    def _add_decay(self, gradient: Tensor, parameters: Sequence[Tensor], decays: Sequence[float]) -> None:
        begin = 0
        bounds = list(zip(self._layout.trained, pairwise(self._layout.offsets), strict=True))
        for piece in parameters:
            end = begin + piece.numel()
            for spec, (low, high) in bounds:
                low, high = max(low, begin), min(high, end)
                if low < high:
                    gradient[low:high].add_(piece[low - begin : high - begin], alpha=decays[spec.group])
            begin = end


def _number(group: Hyperparameters, name: str) -> float:
    value = group.get(name, 0.0)
    return value if isinstance(value, float) else math.nan
