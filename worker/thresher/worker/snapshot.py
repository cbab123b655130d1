"""A shard's state as a worker reads it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, final

from torch import Tensor

from thresher.protos.bookmark import Bookmark
from thresher.protos.errors import FrameError
from thresher.protos.layout import Layout
from thresher.protos.messages import Payload, bookmark_from_message, layout_from_message, optimizer_from_message
from thresher.protos.optimizers import OptimizerSpec
from thresher.protos.replica import PARAMETERS
from thresher.protos.sealed import membership_from_message
from thresher.protos.snapshots import state_bytes_bound, unpack_state
from thresher.protos.update import Membership
from thresher.v1 import aggregation_pb2 as pb

_SHADOW: Final = "shadow"


@final
@dataclass(frozen=True, slots=True)
class Snapshot:
    """A shard's state: what `Replica` takes, untrained tensors by name, and what they belong to.

    Attributes:
        history: Where in the shard's history this is.
        layout: Of the whole model.
        optimizer: With the hyper-parameters of the last update.
        state: Parameters and optimizer state.
        untrained: By name.
        shadow: The model as workers see it, where they copy assignments: [numel] float32.
        threshold: Of the coming round; None for methods without one.
        membership: Who belongs to the run.
        bookmark: Where the members' loops are; None where nobody has told, and from other than the first shard.
    """

    history: pb.History
    layout: Layout
    optimizer: OptimizerSpec
    state: Mapping[str, Tensor]
    untrained: Mapping[str, Tensor]
    shadow: Tensor | None
    threshold: float | None
    membership: Membership
    bookmark: Bookmark | None

    @property
    def version(self) -> int:
        """Number of updates in it."""
        return self.history.version

    @property
    def visible(self) -> Tensor:
        """The parameters that workers take gradients at, [numel] float32."""
        return self.state[PARAMETERS] if self.shadow is None else self.shadow


def snapshot_from_parts(parts: Sequence[pb.SnapshotResponse], where: str) -> tuple[Snapshot, int]:
    """Put the parts of one answer together; also return how many bytes they were.

    Raises:
        FrameError: when they are no state of a model.
    """
    if not parts:
        raise FrameError(f"the snapshot of {where} is empty")
    first = parts[0]
    layout, optimizer = layout_from_message(first.layout), optimizer_from_message(first.optimizer)
    payload = Payload(first.total_bytes, state_bytes_bound(layout, layout.numel))
    complete = False
    for part in parts:
        complete = payload.add(part.chunk)
    if not complete:
        raise FrameError(f"the snapshot of {where} broke off")
    state, untrained = unpack_state(bytes(payload.data))
    shadow = state.pop(_SHADOW, None)
    snapshot = Snapshot(
        history=first.history,
        layout=layout,
        optimizer=optimizer,
        state=state,
        untrained=untrained,
        shadow=shadow,
        threshold=first.next_threshold if first.HasField("next_threshold") else None,
        membership=membership_from_message(first.membership),
        bookmark=bookmark_from_message(first.bookmark) if first.HasField("bookmark") else None,
    )
    return snapshot, len(payload.data)
