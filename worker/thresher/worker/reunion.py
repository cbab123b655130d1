"""How a worker and a shard find together again, when one of them lacks what the other knows."""

from collections.abc import Mapping

from torch import Tensor

from thresher.protos.errors import DataLossError, LostHistoryError
from thresher.protos.messages import bookmark_to_message, overrides_to_messages
from thresher.protos.optimizers import OptimizerSpec
from thresher.protos.replica import Replica
from thresher.protos.sealed import membership_to_message
from thresher.protos.snapshots import pack_state
from thresher.protos.update import Membership
from thresher.v1 import aggregation_pb2 as pb
from thresher.worker.following import following
from thresher.worker.joining import JoinedShard
from thresher.worker.snapshot import Snapshot


def catch_up(shard: JoinedShard, optimizer: OptimizerSpec) -> Snapshot:
    """Begin again from a snapshot, and return it: what this worker lacks is no longer in the shard's log.

    Args:
        shard: Whose updates are lacking.
        optimizer: As this worker registered it.
    """
    client, shard.repeats = shard.client, False
    snapshot = client.calls.snapshot(client.longest_wait)
    shard.follower = following(shard.slice, optimizer, snapshot)
    shard.overrides, shard.threshold = optimizer.overrides(snapshot.optimizer.groups), snapshot.threshold
    shard.bookmark = snapshot.bookmark
    shard.answer = client.reopen(snapshot.history)
    return snapshot


def refill(
    shard: JoinedShard,
    lost: LostHistoryError,
    *,
    lockstep: bool,
    membership: Membership,
    untrained: Mapping[str, Tensor],
) -> None:
    """Give a shard that has lost its state this worker's replica.

    Args:
        shard: That has lost it.
        lost: How this worker was told.
        lockstep: The run is in lockstep.
        membership: Who belongs to the run.
        untrained: What goes with the model but is not trained, for the first shard.

    Raises:
        DataLossError: where a replica is not all that the shard knew.
    """
    client, follower, shard.repeats = shard.client, shard.follower, False
    if not lockstep or not isinstance(follower, Replica):
        raise DataLossError(
            f"{lost}. Only in lockstep, with updates downlink, a worker's replica replaces it; restore its state "
            "folder, or start anew from the last model"
        ) from lost
    message = pb.Refill(
        history=client.history,
        overrides=overrides_to_messages(shard.overrides),
        next_threshold=shard.threshold,
        membership=membership_to_message(membership),
        bookmark=None if shard.bookmark is None else bookmark_to_message(shard.bookmark),
    )
    data = pack_state(follower.state(), untrained)
    while True:
        client.calls.seed(client.registration, data, message)  # another worker's may have come before
        try:
            shard.answer = client.reopen(client.history)
        except LostHistoryError:  # once more, just now
            if not client.history.version:  # of which a shard takes no replica
                raise
        else:
            return
