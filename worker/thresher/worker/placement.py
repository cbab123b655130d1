"""Where the optimizer runs: at the shards (gradient-placed) or beside the model (update-placed)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from torch import Tensor

from thresher.compression import Feedback
from thresher.protos.errors import OptimizerError
from thresher.protos.layout import Slice
from thresher.protos.optimizers import Hyperparameters, OptimizerSpec, Override
from thresher.protos.replica import PARAMETERS, Replica
from thresher.protos.sparse import SparseGradient
from thresher.protos.update import Presence, Update
from thresher.worker.following import Following
from thresher.worker.method import Method
from thresher.worker.outer import outer_spec
from thresher.worker.parameters import ModelParameters

Pieces = Sequence[tuple[Slice, Tensor]]
"""Flat float32 parameters of all the model, slice by slice."""


@final
@dataclass(frozen=True, slots=True)
class Message:
    """What one worker has to say in a round, before it is compressed.

    Attributes:
        vector: [numel] float32.
        presence: Which trained tensors it speaks of; it is zero in the others.
        scale: Its unit in units of gradients, > 0: absolute compressors are scaled by it (arXiv:2108.00951, C_γ).
        rate: The learning rate in force, of the first parameter group.
        finite: Whether it is known to hold neither NaN nor infinity: a gradient is, an optimizer may overflow.
    """

    vector: Tensor
    presence: Presence
    scale: float
    rate: float
    finite: bool


class Placement(Protocol):
    """What is compressed, what the shards do with its mean, and where the model takes its next gradient."""

    @property
    def shard_optimizer(self) -> OptimizerSpec:
        """The optimizer that shards and replicas run."""
        ...

    def seed(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what rank 0 seeds a shard with, of ``state`` as `ModelParameters.state` returns it."""
        ...

    def overrides(self, groups: Sequence[Hyperparameters]) -> tuple[Override, ...]:
        """Return what the shards must know about changed hyper-parameters.

        Raises:
            OptimizerError: when they have become ones that cannot be placed so.
        """
        ...

    def take(self, gradient: Tensor, presence: Presence, groups: Sequence[Hyperparameters]) -> None:
        """Take the model's flat gradient, [numel] float32 and finite, of one optimizer step; it may be overwritten.

        Args:
            gradient: Zero in tensors without gradient.
            presence: Which trained tensors have one.
            groups: Hyper-parameters of each parameter group, as they stand.
        """
        ...

    def message(self) -> Message | None:
        """Return what was taken since `begin`, ready to be compressed; None when nothing was. Once a round."""
        ...

    def begin(self, pieces: Pieces, residual: Tensor) -> None:
        """Go on from the shards' parameters ``pieces`` after a round that left ``residual``, [numel] float32."""
        ...

    def point(self, pieces: Pieces) -> Pieces:
        """Return where the model takes its next gradient; ``pieces`` are the shards' parameters."""
        ...

    def state(self, followers: Sequence[Following]) -> list[dict[str, Tensor]]:
        """Return the optimizer state that stands for the user's own, in slices as `Replica.state` returns it."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what only this worker knows between two rounds."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the one whose state this is."""
        ...


@final
class GradientPlaced:
    """The gradient itself is compressed; shards and replicas run the user's optimizer on the mean.

    Source: arXiv:2108.00951, Algorithms 2 and 3. The residual is in gradient units.

    Args:
        spec: The user's optimizer.
        momentum: Of a method that keeps one at the workers (Algorithm 3), else 0.

    Raises:
        OptimizerError: when the method keeps a momentum, and ``spec`` has another.
    """

    def __init__(self, spec: OptimizerSpec, momentum: float = 0.0) -> None:
        """Place ``spec`` at the shards."""
        self.shard_optimizer = spec
        self._momentum = momentum
        self._taken: Message | None = None
        self._refuse_momentum_twice(spec.groups)

    def seed(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return parameters and optimizer state."""
        return dict(state)

    def overrides(self, groups: Sequence[Hyperparameters]) -> tuple[Override, ...]:
        """Return every hyper-parameter that differs from the registered one."""
        self._refuse_momentum_twice(groups)
        return self.shard_optimizer.overrides(groups)

    def take(self, gradient: Tensor, presence: Presence, groups: Sequence[Hyperparameters]) -> None:
        """Keep the gradient as it is: messages are gradients."""
        self._taken = Message(gradient, presence, 1.0, _number(groups[0], "lr"), finite=True)

    def message(self) -> Message | None:
        """Return the gradient."""
        return self._taken

    def begin(self, pieces: Pieces, residual: Tensor) -> None:  # noqa: ARG002 - for the other placement
        """Forget the gradient."""
        self._taken = None

    def point(self, pieces: Pieces) -> Pieces:
        """Return the shards' parameters."""
        return pieces

    def state(self, followers: Sequence[Following]) -> list[dict[str, Tensor]]:
        """Return the followers' optimizer state; there is none where they copy a shadow."""
        return [follower.state() for follower in followers]

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: parameters and optimizer state are the shards'."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Do nothing."""

    def _refuse_momentum_twice(self, groups: Sequence[Hyperparameters]) -> None:
        name = self.shard_optimizer.name
        if self._momentum and (name != "SGD" or any(group.get("momentum") for group in groups)):
            raise OptimizerError(
                f"the method keeps a momentum of {self._momentum} at the workers, so the shards apply plain "
                f"torch.optim.SGD, not {name} with a momentum of its own; set momentum=0 in your optimizer"
            )


@final
class UpdatePlaced:
    """What the optimizer has moved the model by is compressed; the shards subtract the mean, or step along it.

    Each worker runs the user's optimizer on a copy of its own, y, for a number of steps; y - start, where start is
    where it began, goes through the method's feedback; the shards' mean moves x, which all workers share; y begins
    anew at x - c·residual, with the feedback's own c.

    Source: arXiv:2108.00951, Algorithm 1 (c = 0, one step); arXiv:2004.05298 (DEF, c = 0.3); with several steps and
    an outer optimizer: Stich, "Local SGD converges fast", arXiv:1805.09767, and Douillard et al., "DiLoCo",
    arXiv:2311.08105.

    Args:
        spec: The user's optimizer.
        outer: What the shards run, with the mean of what moved as its gradient.
        whole: All of the model, as one slice.
        state: Parameters and optimizer state to begin with, as `Replica.state` returns them.
        detached: c, in [0, 1].
    """

    def __init__(
        self, spec: OptimizerSpec, outer: OptimizerSpec, whole: Slice, state: Mapping[str, Tensor], detached: float
    ) -> None:
        """Begin at the parameters of ``state``."""
        self.shard_optimizer = outer
        self._spec = spec
        self._whole = whole
        self._detached = detached
        self._local = Replica(whole, spec, state)
        self._start = self._local.parameters.clone()  # [numel] float32
        self._presence: Presence | None = None
        self._scale = self._rate = 0.0

    def seed(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the parameters: optimizer state is each worker's own."""
        return {PARAMETERS: state[PARAMETERS]}

    def overrides(self, groups: Sequence[Hyperparameters]) -> tuple[Override, ...]:
        """Return nothing: the workers' optimizers have made their steps already."""
        self._spec.overrides(groups)
        return ()

    def take(self, gradient: Tensor, presence: Presence, groups: Sequence[Hyperparameters]) -> None:
        """Make one step with the user's optimizer here.

        Raises:
            OptimizerError: when groups were added, have different learning rates, or the optimizer refuses the step.
        """
        self._rate = _rate(groups)
        self._scale = max(self._scale, self._rate)
        segments = [segment.tensor for segment in self._whole.segments]  # a tensor without elements has none
        self._local.apply(
            Update(
                version=self._local.version + 1,
                members=1,
                contributors=(0,),
                mean=SparseGradient.dense(gradient),
                presence=tuple(presence[tensor] for tensor in segments),
                overrides=self._spec.overrides(groups),
            )
        )
        before = self._presence or (False,) * len(presence)
        self._presence = tuple(one or other for one, other in zip(before, presence, strict=True))

    def message(self) -> Message | None:
        """Return start - y; its unit is the largest learning rate on the way.

        Nothing where that is 0: with no step size nothing has moved.
        """
        if self._presence is None or self._scale == 0.0:
            return None
        return Message(self._start.sub_(self._local.parameters), self._presence, self._scale, self._rate, finite=False)

    def begin(self, pieces: Pieces, residual: Tensor) -> None:
        """Go on from x - c·residual."""
        for piece, parameters in pieces:
            here = slice(piece.begin, piece.end)
            torch.sub(parameters, residual[here], alpha=self._detached, out=self._start[here])
        self._local.parameters.copy_(self._start)
        self._presence, self._scale = None, 0.0

    def point(self, pieces: Pieces) -> Pieces:  # noqa: ARG002 - for the other placement
        """Return y."""
        return [(self._whole, self._local.parameters)]

    def state(self, followers: Sequence[Following]) -> list[dict[str, Tensor]]:  # noqa: ARG002 - likewise
        """Return this worker's optimizer state."""
        return [self._local.state()]

    def state_dict(self) -> dict[str, Any]:
        """Return the state of this worker's optimizer, and how many steps it has made."""
        return {"local": self._local.state(), "version": self._local.version}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the one whose state this is, before a round has begun."""
        self._local = Replica(self._whole, self._spec, state["local"], state["version"])


def placed(spec: OptimizerSpec, method: Method, model: ModelParameters, feedback: Feedback) -> Placement:
    """Return where an optimizer runs.

    Args:
        spec: The user's.
        method: Says which placement, and what the shards run in the one beside the model.
        model: Which it trains.
        feedback: Of the method, whose momentum and detachment matter here.

    Raises:
        OptimizerError: when the two do not go together.
    """
    if method.placement == "gradient":
        return GradientPlaced(spec, getattr(feedback, "momentum", 0.0))
    (whole,) = model.layout.slices(1)
    outer = outer_spec(method.outer, len(spec.groups))
    return UpdatePlaced(spec, outer, whole, model.state(whole), feedback.detached)


def _rate(groups: Sequence[Hyperparameters]) -> float:
    """Return the learning rate γ of all groups. Raises OptimizerError when there are several: γλ needs one."""
    rates = {_number(group, "lr") for group in groups}
    if len(rates) != 1 or not math.isfinite(min(rates)):
        raise OptimizerError(
            f"update-placed exchange needs one learning rate for all parameter groups, not {sorted(rates)}"
        )
    return rates.pop()


def _number(group: Hyperparameters, name: str) -> float:
    value = group.get(name, 0.0)
    return value if isinstance(value, float) else math.nan
