"""A replica: parameters and optimizer state of one slice that follow a log of updates.

The shard owns one, each worker holds one per shard, and both run this very code, so that equal logs give equal bits
(design law 8). Nothing else changes parameters.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import final

import torch
from torch import Tensor, nn

from thresher.protos.errors import LayoutError, OptimizerError, ProtocolError
from thresher.protos.layout import Layout, Slice
from thresher.protos.optimizers import OptimizerSpec, Override
from thresher.protos.sparse import SparseGradient
from thresher.protos.update import Update

PARAMETERS = "parameters"
_STATE = "state"


@final
class Replica:
    """Float32 parameters [slice.numel] and torch's own optimizer over them.

    Law: ``state(v)`` followed by the updates ``v+1 … w`` equals ``state(w)``, bit for bit.

    Args:
        piece: The slice and its segments.
        spec: The optimizer to run.
        state: As `state` returns it: the parameters, and optimizer state where there is some.
        version: Number of updates that ``state`` contains.

    Raises:
        LayoutError: when ``state`` does not fit the slice.
    """

    def __init__(self, piece: Slice, spec: OptimizerSpec, state: Mapping[str, Tensor], version: int = 0) -> None:
        """Copy ``state``; the caller's tensors stay untouched."""
        self._slice = piece
        self._spec = spec
        self.version = version
        self.parameters = _flat_parameters(piece, state)  # [slice.numel] float32
        self._gradient = torch.zeros(piece.numel)  # all zero between updates
        self._leaves = [nn.Parameter(self.parameters[s.begin : s.end]) for s in piece.segments]
        by_group: list[list[Tensor]] = [[] for _ in spec.groups]
        for segment, leaf in zip(piece.segments, self._leaves, strict=True):
            by_group[segment.group].append(leaf)
        self._optimizer = spec.build(by_group)
        self._load_optimizer_state(state)

    def apply(self, update: Update) -> None:
        """Feed one update to the optimizer.

        Raises:
            ProtocolError: when it is not the next version, or does not fit the slice; nothing has changed then.
            OptimizerError: when torch refuses the step (amsgrad switched on midway); the replica is spoilt then.
        """
        self._check(update)
        if update.mean is not None and not update.only_mean:
            self._step(update.mean, update.presence, update.overrides)
        self.version = update.version

    def state(self) -> dict[str, Tensor]:
        """Return copies of the parameters ("parameters") and of the optimizer state ("state.<key>.<tensor>")."""
        tensors = {PARAMETERS: self.parameters.clone()}
        for segment, leaf in zip(self._slice.segments, self._leaves, strict=True):
            for key, value in self._optimizer.state.get(leaf, {}).items():
                if isinstance(value, Tensor):
                    tensors[state_name(key, segment.tensor)] = value.detach().clone()
        return tensors

    def _check(self, update: Update) -> None:
        if update.version != self.version + 1:
            raise ProtocolError(f"update {update.version} cannot follow version {self.version}")
        if update.mean is not None and update.mean.numel != self._slice.numel:
            raise ProtocolError(f"update has {update.mean.numel} elements, the slice has {self._slice.numel}")
        if len(update.presence) != len(self._leaves):
            raise ProtocolError(f"update speaks of {len(update.presence)} tensors, the slice has {len(self._leaves)}")

    def _step(self, mean: SparseGradient, presence: Sequence[bool], overrides: Sequence[Override]) -> None:
        # A copy: torch may overwrite what it is given as a gradient, and the update still has to be sent.
        self._gradient.index_copy_(0, mean.indices, mean.values)
        for segment, leaf, present in zip(self._slice.segments, self._leaves, presence, strict=True):
            leaf.grad = self._gradient[segment.begin : segment.end] if present else None
        self._spec.configure(self._optimizer, overrides)
        try:
            self._optimizer.step()
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:  # torch's own
            raise OptimizerError(
                f"{self._spec.name} cannot take the step to version {self.version + 1} with "
                f"{list(overrides)} changed: {type(error).__name__}: {error}; set it before training begins"
            ) from error
        for leaf in self._leaves:
            leaf.grad = None
        self._gradient.zero_()

    def _load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        leaves = {segment.tensor: leaf for segment, leaf in zip(self._slice.segments, self._leaves, strict=True)}
        for key, tensor, value in optimizer_state(state):
            leaf = leaves.get(tensor)
            if leaf is None or (value.dim() and (value.shape, value.dtype) != (leaf.shape, leaf.dtype)):
                raise LayoutError(f"optimizer state {key} of tensor {tensor} does not fit the slice")
            self._optimizer.state[leaf][key] = value.clone()


def state_name(key: str, tensor: int) -> str:
    """Return the name under which optimizer state ``key`` of trained tensor number ``tensor`` is stored."""
    return f"{_STATE}.{key}.{tensor}"


def optimizer_state(state: Mapping[str, Tensor]) -> Iterator[tuple[str, int, Tensor]]:
    """Yield (key, number of the trained tensor, value) for what `state_name` named.

    >>> list(optimizer_state({"parameters": torch.zeros(1), "state.step.3": torch.tensor(7.0)}))
    [('step', 3, tensor(7.))]
    """
    for name, value in state.items():
        kind, _, rest = name.partition(".")
        key, _, tensor = rest.rpartition(".")
        if kind == _STATE and tensor.isdigit():
            yield key, int(tensor), value


def whole_optimizer_state(layout: Layout, states: Sequence[Mapping[str, Tensor]]) -> dict[tuple[int, str], Tensor]:
    """Put the slices of optimizer state together again.

    Args:
        layout: The model.
        states: As `Replica.state` returns them, shard by shard.

    Returns:
        By (number of the trained tensor, key): the value in the tensor's shape, or a scalar such as a step count.
    """
    parts: dict[tuple[int, str], list[Tensor]] = {}
    for state in states:
        for key, tensor, value in optimizer_state(state):
            parts.setdefault((tensor, key), []).append(value)
    return {
        (tensor, key): values[0] if values[0].dim() == 0 else torch.cat(values).view(layout.trained[tensor].shape)
        for (tensor, key), values in parts.items()
    }


def _flat_parameters(piece: Slice, state: Mapping[str, Tensor]) -> Tensor:
    parameters = state.get(PARAMETERS)
    if parameters is None or parameters.shape != (piece.numel,) or parameters.dtype != torch.float32:
        found = "none" if parameters is None else f"{parameters.dtype} {list(parameters.shape)}"
        raise LayoutError(f"the slice needs float32 parameters [{piece.numel}], found {found}")
    return parameters.detach().clone()
