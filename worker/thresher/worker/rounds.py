"""Rounds with all shards: what this worker sends is cut along the slices, and what comes back is followed."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar, final

import torch
from torch import Tensor

from thresher.protos.bookmark import Bookmark
from thresher.protos.codec import decode, encode
from thresher.protos.consistency import Consistency
from thresher.protos.errors import BehindError, LostHistoryError, RoundFailedError
from thresher.protos.layout import Slice
from thresher.protos.messages import bookmark_to_message, overrides_to_messages
from thresher.protos.optimizers import OptimizerSpec, Override
from thresher.protos.sealed import membership_from_message, membership_to_message
from thresher.protos.snapshots import pack_state
from thresher.protos.sparse import SparseGradient
from thresher.protos.update import Membership, Presence, Update, pack_presence
from thresher.v1 import aggregation_pb2 as pb
from thresher.worker.calls import pauses
from thresher.worker.client import Returned, Settled, Told, push_bytes_of
from thresher.worker.joining import JoinedShard
from thresher.worker.reunion import catch_up, refill

_logger = logging.getLogger(__name__)

T = TypeVar("T")

Pending = tuple[bytes, bytes]
"""A push and its frame, as they are kept until they are answered."""


@final
@dataclass(slots=True)
class Outcome:
    """What a round came to, for this worker.

    Attributes:
        updates: Those that its pushes are in, shard by shard, as far as it has seen them.
        returned: Slices whose values come back, with the values.
        pulled_bytes: Bytes of exchange messages in which updates came.
    """

    updates: list[Update] = field(default_factory=list)
    returned: list[tuple[Slice, SparseGradient]] = field(default_factory=list)
    pulled_bytes: int = 0


@final
class Rounds:
    """This worker's part in the rounds of a run.

    Args:
        rank: This worker's.
        shards: As joined, in their order.
        consistency: When rounds close.
        optimizer: The one that shards and replicas run.
        untrained: Returns what goes with the model but is not trained, for a first shard that lost it.

    Attributes:
        number: How many rounds this worker has taken part in: what the protocol calls its step.
        membership: Who belongs to the run, as the first shard said last.
        follows: This worker goes on without the state of its schedule: the others say what is in force.
        said_before: Bytes of the pushes of the round that `resume` goes on with which need not be said again.
    """

    def __init__(
        self,
        rank: int,
        shards: Sequence[JoinedShard],
        consistency: Consistency,
        optimizer: OptimizerSpec,
        untrained: Callable[[], Mapping[str, Tensor]],
    ) -> None:
        """Begin where the shards are."""
        self.rank, self.shards = rank, tuple(shards)
        self._untrained = untrained
        self.consistency, self._optimizer = consistency, optimizer
        self._pending: list[Pending] = []
        self._settled: list[bool] = []
        self._pulled = 0  # bytes, when the round began
        self.number = 0
        self.follows = False
        self.said_before = 0
        self.membership = membership_from_message(shards[0].answer.membership) if shards else Membership(0, ())

    @property
    def pieces(self) -> list[tuple[Slice, Tensor]]:
        """The parameters that all workers share, slice by slice."""
        return [(shard.slice, shard.follower.parameters) for shard in self.shards]

    @property
    def _pull_bytes(self) -> int:
        return sum(shard.client.pull_bytes for shard in self.shards)

    @property
    def pending(self) -> list[Pending]:
        """The pushes of the round that is being made, for a memory that outlives this process."""
        return self._pending

    def prepare(
        self,
        sent: SparseGradient | None,
        presence: Presence,
        overrides: Sequence[Override],
        proposal: float | None,
        residual: Tensor,
        bookmark: Bookmark | None,
    ) -> None:
        """Make the pushes of the next round; `send` sends them.

        Args:
            sent: [numel], or None when this worker skips the round.
            presence: Which trained tensors it speaks of.
            overrides: Hyper-parameters in force that differ from the registered ones.
            proposal: λ for the next round; None from all but rank 0.
            residual: [numel] float32, what this worker keeps.
            bookmark: Where the loop is when this step is over, for the first shard.
        """
        self._pending = []
        for shard in self.shards:
            piece = shard.slice
            kept = residual[piece.begin : piece.end]
            push = pb.Push(
                step=self.number,
                version=shard.follower.version,
                skipped=sent is None,
                presence=pack_presence([presence[segment.tensor] for segment in piece.segments if presence]),
                overrides=overrides_to_messages(overrides),
                residual_squared=float(torch.dot(kept, kept)),
                next_threshold=proposal,
                follows=self.follows,
                forgot=shard.forgot,
                bookmark=None if bookmark is None or self._pending else bookmark_to_message(bookmark),
            )
            frame = b"" if sent is None else encode(sent.slice(piece.begin, piece.end))
            shard.forgot = False
            self._pending.append((push.SerializeToString(), frame))

    def send(self) -> None:
        """Push to all shards; returns before it has left."""
        self._settled = [False] * len(self.shards)
        self._pulled = self._pull_bytes
        for shard, (said, frame) in zip(self.shards, self._pending, strict=True):
            self._push(shard, pb.Push.FromString(said), frame)

    def finish(self) -> Outcome:
        """Wait for what each shard made of the round, and follow it."""
        outcome = Outcome()
        for index, shard in enumerate(self.shards):
            self._finish_one(index, shard, outcome)
        outcome.pulled_bytes = self._pull_bytes - self._pulled
        self.number += 1
        self._pending = []
        if self.consistency.lockstep and not self._is_next(self.number):
            self.await_admission()
        return outcome

    def mean(self, vector: Tensor) -> Tensor | None:
        """Return the mean of all workers' ``vector``, [numel] float32: a round that leaves the model as it is.

        All workers must take part; None for one whose round was closed without it, or is no longer remembered, because
        it was away for longer than its lease.
        """
        whole = SparseGradient.dense(vector)
        self._pending = []
        for shard in self.shards:
            push = pb.Push(step=self.number, version=self.number, only_mean=True)
            frame = encode(whole.slice(shard.slice.begin, shard.slice.end))
            self._pending.append((push.SerializeToString(), frame))
        self.send()
        means = [update.mean.densify() for update in self.finish().updates if update.mean is not None]
        return torch.cat(means) if len(means) == len(self.shards) else None

    # Leaving

    def leave(self, residual: Tensor, buffers: Mapping[str, Tensor], *, whole: bool) -> None:
        """Leave the run at all shards.

        Args:
            residual: [numel] float32, what is given up.
            buffers: What the model's buffers have become, for the first shard; empty from all but rank 0.
            whole: This worker has counted its bytes since it first joined. In lockstep the shards compare them with
                theirs; elsewhere updates are on their way whenever it leaves.
        """
        counted = whole and self.consistency.lockstep
        for index, shard in enumerate(self.shards):
            kept = residual[shard.slice.begin : shard.slice.end]
            leave = pb.Leave(abandoned_squared=float(torch.dot(kept, kept)), counted=counted)
            shard.client.leave(leave, pack_state({}, buffers) if buffers and index == 0 else b"")
            self._insist(shard, shard.client.wait_left)

    def abort(self, reason: str) -> None:
        """Give up: the run fails."""
        for shard in self.shards:
            shard.client.abort(reason)

    def close(self) -> None:
        """Close all conversations, as they are."""
        for shard in self.shards:
            shard.client.close()

    def agree(self, number: int, values: Mapping[str, float]) -> Mapping[str, float]:
        """Return the members' mean of ``values``. All shards are asked, so that none waits for a push meanwhile."""
        for shard in self.shards:
            shard.client.ask(number, values)
        first, *_ = [self._insist(shard, partial(shard.client.wait_agreed, number)) for shard in self.shards]
        return first

    def _insist(self, shard: JoinedShard, answer: Callable[[], T]) -> T:
        """Return a shard's answer; where it and this worker have to find together first, it is asked again."""
        while True:
            try:
                return answer()
            except (BehindError, LostHistoryError) as error:  # outside lockstep the others go on meanwhile
                self._find_together(shard, error)

    # Coming back

    def resume(self, step: int, pending: Sequence[Pending]) -> None:
        """Go on in the round in which this worker was ended: send what the shards have not heard.

        Args:
            step: Of the pushes.
            pending: As `pending` returned them.
        """
        self.number, self._pending = step, list(pending)
        self._settled = [shard.answer.settled_steps > step for shard in self.shards]
        known = [one for one, settled in zip(self._pending, self._settled, strict=True) if settled]
        self.said_before = sum(push_bytes_of(pb.Push.FromString(said), frame) for said, frame in known)
        for shard, settled, (said, frame) in zip(self.shards, self._settled, self._pending, strict=True):
            if not settled:
                self._push(shard, pb.Push.FromString(said), frame)

    def begin(self) -> None:
        """Begin without a memory: in a new run, as a newcomer, or after this worker's state was lost.

        In lockstep the first shard waits for this worker's next push afterwards.

        Where the shards have heard different numbers of this rank's pushes, those behind are told that one is lost.
        """
        answers = [shard.answer for shard in self.shards]
        self.number = max(answer.settled_steps + answer.in_open_round for answer in answers)
        if any(answer.settled_steps < self.number for answer in answers):
            lost = [
                pb.Push(step=self.number - 1, version=shard.follower.version, skipped=True, lost=True, forgot=True)
                for shard in self.shards
            ]
            self.resume(self.number - 1, [(push.SerializeToString(), b"") for push in lost])
            self.finish()
        elif self.consistency.lockstep and self.rank not in self.membership.ranks:
            self.await_admission()
        for shard in self.shards:
            shard.forgot = self.number > 0
        for shard in self.shards if self.consistency.lockstep else ():  # a round may have closed behind a snapshot
            while shard.follower.version < self.number:
                self._follow(shard)

    def _is_next(self, step: int) -> bool:
        """True when this worker is a member, and the first shard waits for this step of it.

        Who was away for longer than its lease may hear at once that it was dropped and that it is let in again.
        """
        return self.rank in self.membership.ranks and self.shards[0].follower.version == step

    def await_admission(self) -> None:
        """Follow until the first shard counts this worker among the members, and go on from that version.

        Raises:
            RoundFailedError: when that does not happen in time.
        """
        first, *others = self.shards
        begin, patience = time.monotonic(), first.client.longest_wait
        where = f"at version {first.follower.version} of {first.client}"
        _logger.warning("worker %d waits to be let in %s", self.rank, where)
        for pause in pauses():
            if self.rank in self.membership.ranks:
                break
            if time.monotonic() > begin + patience:
                raise RoundFailedError(
                    f"worker {self.rank} waits to be let in {where}, and no round has ended for {patience:.0f} s; look "
                    "at what the others do, whom the shard's log names"
                )
            if self._follow(first, pause) is None:  # who comes when all have left belongs to the run without an update
                answer = first.client.calls.register(first.client.registration)
                if answer.version == first.follower.version:
                    self._hear_of_members(membership_from_message(answer.membership), answer.version)
        for shard in others:
            while shard.follower.version < first.follower.version:
                self._follow(shard)
        self.number = first.follower.version
        _logger.warning("worker %d is let in from step %d on", self.rank, self.number)

    def _push(self, shard: JoinedShard, push: pb.Push, frame: bytes) -> None:
        if self.membership.epoch > shard.epoch:
            push.membership.CopyFrom(membership_to_message(self.membership))
            shard.epoch = self.membership.epoch  # the push is said until it is answered
        shard.client.push(push, frame)

    def _finish_one(self, index: int, shard: JoinedShard, outcome: Outcome) -> None:
        step, (said, frame) = self.number, self._pending[index]
        push = pb.Push.FromString(said)
        found: Update | None = None
        returned = self._settled[index] and self._was_returned(shard, step)
        while not self._is_done(index, shard):
            told = self._follow(shard)
            match told:
                case Returned(step=of, reason=reason) if of == step:  # an earlier one may be told twice
                    level = logging.WARNING if self.consistency.lockstep else logging.INFO
                    _logger.log(level, "worker %d has step %d back from %s: %s", self.rank, step, shard.client, reason)
                    returned = self._settled[index] = True
                case Settled(step=of) if of == step:
                    self._settled[index] = True
                case Update() if self._contains(told, push):
                    found, self._settled[index] = told, True
                case _:
                    pass
        shard.client.answered()
        if found is not None:
            outcome.updates.append(found)
        shard.forgot = returned and push.forgot  # nobody has heard it, then
        if returned and frame and not push.only_mean:
            outcome.returned.append((shard.slice, decode(frame, numel=shard.slice.numel)))

    def _is_done(self, index: int, shard: JoinedShard) -> bool:
        """True when the push has its verdict, and this worker is where the round has left the shard."""
        arrived = not self.consistency.lockstep or shard.follower.version > self.number
        return self._settled[index] and arrived and not shard.repeats

    def _was_returned(self, shard: JoinedShard, step: int) -> bool:
        answer = shard.answer
        return answer.settled_steps == step + 1 and answer.last_verdict == pb.VERDICT_RETURNED

    def _contains(self, update: Update, push: pb.Push) -> bool:
        if not self.consistency.lockstep:
            return (self.rank, push.step) in update.arrivals
        # A round may have been closed without this worker; then its push comes back.
        return update.version == push.step + 1 and (push.skipped or self.rank in update.contributors)

    def _follow(self, shard: JoinedShard, seconds: float = math.inf) -> Told | None:
        """Take what a shard says next; None where it says nothing for so long, or both had to find together first."""
        try:
            told = shard.client.wait(seconds)
        except (BehindError, LostHistoryError) as error:
            self._find_together(shard, error)
            return None
        if isinstance(told, Update):
            shard.repeats = False
            if told.version > shard.follower.version:
                shard.follower.apply(told)
                shard.overrides, shard.threshold = told.overrides, told.next_threshold
                shard.bookmark = told.bookmark
            if shard is self.shards[0]:
                self._hear_of_members(told.membership, told.version)
        return told

    def _hear_of_members(self, membership: Membership | None, version: int) -> None:
        """Take who belongs to the run from ``version`` of the first shard on, and say what is new about that."""
        if membership is None or membership.epoch <= self.membership.epoch:  # an update may be told once more
            return
        before, after, first = set(self.membership.ranks), set(membership.ranks), self.shards[0]
        self.membership = membership
        for rank in sorted(before - after):
            _logger.warning(
                "worker %d: worker %d does not belong to the run from version %d of %s on: it has left, or was away "
                "for longer than its lease of %g s, as the shard's log says; if it comes back, it is let in again",
                self.rank, rank, version, first.client, first.answer.lease,
            )  # fmt: skip
        for rank in sorted(after - before):
            _logger.info("worker %d: worker %d is let in at version %d of %s", self.rank, rank, version, first.client)

    def _find_together(self, shard: JoinedShard, error: BehindError | LostHistoryError) -> None:
        """Begin again with a shard: from its state, or from this worker's where the shard has lost its own."""
        is_first = shard is self.shards[0]
        if isinstance(error, LostHistoryError):
            untrained = self._untrained() if is_first else {}
            refill(shard, error, lockstep=self.consistency.lockstep, membership=self.membership, untrained=untrained)
            return
        snapshot = catch_up(shard, self._optimizer)
        if is_first:
            self._hear_of_members(snapshot.membership, snapshot.version)
