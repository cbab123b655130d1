"""Rounds with all shards: what this worker sends is cut along the slices, and what comes back is replayed."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from thresher.protos.codec import encode
from thresher.protos.layout import Slice
from thresher.protos.messages import overrides_to_messages
from thresher.protos.optimizers import Override
from thresher.protos.sparse import SparseGradient
from thresher.protos.update import Presence, Update, pack_presence
from thresher.v1 import aggregation_pb2 as pb
from thresher.worker.joining import JoinedShard


@final
class Rounds:
    """This worker's part in the rounds of a run.

    Attributes:
        shards: As joined, in their order.
        number: How many rounds this worker has taken part in: what the protocol calls its step.
    """

    def __init__(self, shards: Sequence[JoinedShard]) -> None:
        """Begin at the first round."""
        self.shards = tuple(shards)
        self.number = 0

    @property
    def pieces(self) -> list[tuple[Slice, Tensor]]:
        """The parameters that all workers share, x, slice by slice."""
        return [(shard.slice, shard.replica.parameters) for shard in self.shards]

    def exchange(
        self,
        sent: SparseGradient | None,
        presence: Presence,
        overrides: Sequence[Override],
        proposal: float | None,
        residual: Tensor,
    ) -> tuple[list[Update], int]:
        """Push to all shards, then wait for what each made of the round, and follow it.

        Returns:
            The updates, shard by shard, and the bytes of exchange messages in which they came.

        Args:
            sent: [numel], or None when this worker skips the round.
            presence: Which trained tensors it speaks of.
            overrides: Hyper-parameters in force that differ from the registered ones.
            proposal: λ for the next round; None from all but rank 0.
            residual: [numel] float32, what this worker keeps.
        """
        for shard in self.shards:
            piece = shard.slice
            kept = residual[piece.begin : piece.end]
            push = pb.Push(
                step=self.number,
                version=shard.replica.version,
                skipped=sent is None,
                presence=pack_presence([presence[segment.tensor] for segment in piece.segments if presence]),
                overrides=overrides_to_messages(overrides),
                residual_squared=float(torch.dot(kept, kept)),
                next_threshold=proposal,
            )
            shard.client.push(push, b"" if sent is None else encode(sent.slice(piece.begin, piece.end)))
        before = sum(shard.client.pull_bytes for shard in self.shards)
        updates = self._follow()
        return updates, sum(shard.client.pull_bytes for shard in self.shards) - before

    def mean(self, vector: Tensor) -> Tensor:
        """Return the mean of all workers' ``vector``, [numel] float32: a round that leaves the model as it is.

        All workers must take part.
        """
        whole = SparseGradient.dense(vector)
        for shard in self.shards:
            push = pb.Push(step=self.number, version=shard.replica.version, only_mean=True)
            shard.client.push(push, encode(whole.slice(shard.slice.begin, shard.slice.end)))
        return torch.cat([update.mean.densify() for update in self._follow() if update.mean is not None])

    def _follow(self) -> list[Update]:
        updates = []
        for shard in self.shards:
            update = shard.client.wait_update(shard.slice)
            shard.replica.apply(update)
            updates.append(update)
        self.number += 1
        return updates
