"""How a worker follows a shard: by replaying its updates, or by copying its shadow (design §7)."""

from collections.abc import Mapping
from typing import Protocol, final

from torch import Tensor

from thresher.protos.errors import ProtocolError
from thresher.protos.layout import Slice
from thresher.protos.optimizers import OptimizerSpec
from thresher.protos.replica import PARAMETERS, Replica
from thresher.protos.update import Update
from thresher.worker.snapshot import Snapshot


class Following(Protocol):
    """One slice of the model as this worker knows it."""

    @property
    def parameters(self) -> Tensor:
        """[slice.numel] float32."""
        ...

    @property
    def version(self) -> int:
        """Number of updates in it."""
        ...

    def apply(self, update: Update) -> None:
        """Follow one update. Raises ProtocolError when it does not follow."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return copies, named as `Replica.state` names them; with optimizer state as far as this worker has it."""
        ...


@final
class Copying:
    """Assignments to the shadow are copied: no arithmetic, no optimizer state."""

    def __init__(self, piece: Slice, values: Tensor, version: int) -> None:
        """Begin at ``values``, [slice.numel] float32."""
        self._slice = piece
        self.parameters = values.clone()
        self.version = version

    def apply(self, update: Update) -> None:
        """Copy what has changed since this worker's version."""
        assignments, begin = update.assignments, update.version - update.assigned_versions
        if assignments is None or begin > self.version:
            raise ProtocolError(f"assignments since version {begin} cannot follow version {self.version}")
        self.parameters[assignments.indices] = assignments.values
        self.version = update.version

    def state(self) -> dict[str, Tensor]:
        """Return a copy of the parameters."""
        return {PARAMETERS: self.parameters.clone()}


def following(piece: Slice, optimizer: OptimizerSpec, snapshot: Snapshot) -> Following:
    """Return what follows a shard from a snapshot on.

    Args:
        piece: The shard's slice.
        optimizer: As this worker registered it.
        snapshot: Of the shard.
    """
    if snapshot.shadow is not None:
        return Copying(piece, snapshot.shadow, snapshot.version)
    state: Mapping[str, Tensor] = snapshot.state
    return Replica(piece, optimizer, state, snapshot.version)
