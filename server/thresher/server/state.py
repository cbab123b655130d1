"""Everything a shard must never forget, and the one function that changes it.

A record is what happened; folding all records in order gives this state, whether they were just made or have been read
back from the journal. So a shard that was killed is the shard that was not (design law 8).
"""

from collections.abc import Mapping
from typing import Final, Self, assert_never, final

from google.protobuf.message import DecodeError
from torch import Tensor

from thresher.protos.bookmark import Bookmark
from thresher.protos.consistency import Consistency
from thresher.protos.errors import DataLossError, ProtocolError
from thresher.protos.layout import Slice
from thresher.protos.messages import (
    bookmark_from_message,
    bookmark_to_message,
    overrides_from_messages,
    overrides_to_messages,
)
from thresher.protos.optimizers import OptimizerSpec, Override
from thresher.protos.replica import Replica
from thresher.protos.sealed import membership_from_message, membership_to_message
from thresher.protos.update import Membership
from thresher.server.effects import Snapshot
from thresher.server.events import History, Refill, Verdict
from thresher.server.facts import (
    VERDICTS,
    Admitted,
    Agreed,
    Closed,
    Contribution,
    Departed,
    Opened,
    Record,
    Returned,
    closed_from_message,
    closed_to_message,
    opened_from_message,
    opened_to_message,
)
from thresher.server.members import Member, Members, MemberState
from thresher.server.shadow import Shadow
from thresher.v1 import aggregation_pb2 as pb
from thresher.v1 import records_pb2 as disk

_SHADOW: Final = "shadow"
_UNTRAINED: Final = "untrained."
_AGREEMENTS: Final = 64  # a worker that was killed asks again for those of its last step


@final
class RunState:
    """The lasting part of a shard.

    Attributes:
        run: Random number of the run.
        opened: The registration that all others must agree with; None before the first.
        piece: The slice this shard owns; None before the first registration.
        replica: Parameters and optimizer state; None before the seed.
        shadow: The model as all workers see it, where they copy assignments.
        untrained: Tensors that go with the model but are not trained, by name.
        members: Every rank that ever came.
        overrides: Hyper-parameters in force since the last update.
        threshold: For the round that is open.
        bookmark: Where the members' loops are; None where nobody has told.
        digest: Of the history so far.
        newest: The round that was closed last; None before the first, and while a refill is all that is known.
        agreements: The newest agreements, by number.
        verdicts: How often each was given.
    """

    def __init__(self, run: int, workers: int) -> None:
        """Begin with nothing."""
        self.run = run
        self.opened: Opened | None = None
        self.piece: Slice | None = None
        self.replica: Replica | None = None
        self.shadow: Shadow | None = None
        self.untrained: dict[str, Tensor] = {}
        self.members = Members(workers)
        self.overrides: tuple[Override, ...] = ()
        self.threshold: float | None = None
        self.bookmark: Bookmark | None = None
        self.digest = b""
        self.newest: Closed | None = None
        self.agreements: dict[int, Agreed] = {}
        self.verdicts = dict.fromkeys(Verdict, 0)
        self.residual_squared_total = 0.0
        self.abandoned_squared_total = 0.0
        self.lost_squared_total = 0.0

    @property
    def version(self) -> int:
        """Number of updates applied."""
        return self.replica.version if self.replica is not None else 0

    @property
    def consistency(self) -> Consistency:
        """When rounds close."""
        return Consistency() if self.opened is None else self.opened.registration.consistency

    @property
    def phase(self) -> str:
        """What the run is doing, for people."""
        members = self.members.counted
        if self.opened is None:
            return "waiting for workers"
        if not members:
            return "finished"
        if any(member.state is MemberState.WAITED_FOR for member in members):
            return "waiting for workers"
        return "training" if self.replica else "waiting for the seed"

    @property
    def decides(self) -> bool:
        """True at the first shard, which says who belongs to the run."""
        return self.opened is not None and self.opened.registration.shard == 0

    @property
    def agreed(self) -> int:
        """How many agreements there have been; after a refill, which brings none of them, the bookmark says so."""
        told = self.bookmark.agreements if self.bookmark is not None else 0
        return max(max(self.agreements, default=-1) + 1, told)

    @property
    def spec(self) -> OptimizerSpec:
        """The optimizer. Raises ProtocolError before the first registration."""
        if self.opened is None:
            raise ProtocolError("no worker has registered a model yet")
        return self.opened.registration.optimizer

    @property
    def slice(self) -> Slice:
        """The slice. Raises ProtocolError before the first registration."""
        if self.piece is None:
            raise ProtocolError("no worker has registered a model yet")
        return self.piece

    def fold(self, record: Record) -> None:
        """Take what happened.

        Raises:
            OptimizerError: when torch refuses the step of a closed round; the state is spoilt then.
            ProtocolError: when a closed round does not follow the last one.
        """
        match record:
            case Opened():
                self._open(record)
            case Admitted(worker, origin, metrics_address):
                self.members.admit(worker, origin, metrics_address)
            case Closed():
                self._close(record)
            case Returned(rank, step, content):
                self.members.seat(rank).settle(step, content, Verdict.RETURNED)
                self.verdicts[Verdict.RETURNED] += 1
            case Departed(rank, abandoned_squared, buffers):
                self.members.seat(rank).state = MemberState.LEFT
                self.members.dismiss(rank, decides=self.decides)
                self.abandoned_squared_total += abandoned_squared
                self.members.seat(rank).residual_squared = 0.0
                self.untrained.update(buffers)
            case Membership():
                self.members.adopt(record)
            case Agreed(number):
                self.agreements = {**self.agreements, number: record}
                self.agreements.pop(number - _AGREEMENTS, None)
            case _:
                assert_never(record)

    def seed(self, state: Mapping[str, Tensor], untrained: Mapping[str, Tensor]) -> None:
        """Begin with starting values. Raises LayoutError when they do not fit."""
        self.replica = Replica(self.slice, self.spec, state)
        self.untrained = dict(untrained)
        self._begin_shadow(None)

    def refill(self, refill: Refill) -> None:
        """Go on from a worker's replica: in lockstep every member has pushed exactly what the version says.

        Raises:
            LayoutError: when the replica does not fit the slice; nothing changes.
            ProtocolError: when the membership cannot be; nothing changes.
        """
        history = refill.history
        replica = Replica(self.slice, self.spec, refill.state, history.version)
        self.members.adopt(refill.membership)
        self.replica = replica
        self.untrained = {**self.untrained, **refill.untrained}
        self.run, self.digest = history.run, history.digest
        self.overrides, self.threshold = refill.overrides, refill.threshold
        self.newest, self.bookmark = None, refill.bookmark
        for member in self.members.counted:
            member.settle(history.version - 1, 0, Verdict.APPLIED)

    def _open(self, opened: Opened) -> None:
        said = opened.registration
        self.run, self.opened = opened.run, opened
        self.piece = said.layout.shard_slice(said.shard, said.shards)
        if not self.members.membership.ranks:  # only its workers know how many they are
            self.members = Members(said.workers)

    def _begin_shadow(self, values: Tensor | None) -> None:
        if self.replica is not None and self.consistency.downlink == "shadow":
            begin = self.replica.parameters if values is None else values
            self.shadow = Shadow(begin, self.consistency.shadow_threshold, self.version)

    def _close(self, closed: Closed) -> None:
        if self.replica is None:
            raise ProtocolError("a round was closed before the shard was seeded")
        update = closed.sealed.update
        self.replica.apply(update)
        if self.shadow is not None:
            self.shadow.advance(self.replica.parameters, self.version)
        self.digest = update.digest
        self.overrides, self.threshold = update.overrides, update.next_threshold
        self.bookmark = update.bookmark
        for one in closed.contributions:
            self._count(one, only_mean=update.only_mean)
        self.deliver(closed)
        if not update.only_mean:
            self.residual_squared_total += closed.residual_squared
        if update.membership is not None:
            self.members.adopt(update.membership)

    def deliver(self, closed: Closed) -> None:
        """Count to whom the newest round was sent; its record says so too."""
        self.newest = closed
        for rank, wire_bytes in closed.deliveries:
            self.members.seat(rank).pull_bytes += wire_bytes

    def _count(self, one: Contribution, *, only_mean: bool) -> None:
        member = self.members.seat(one.rank)
        member.settle(one.step, one.content, Verdict.APPLIED)
        member.steps += 1
        member.push_bytes += one.wire_bytes
        self.verdicts[Verdict.APPLIED] += 1
        if one.forgot:
            self.lost_squared_total += member.residual_squared
        if not only_mean:  # what is pushed for a mean only is no part of densities, and says nothing of residuals
            member.residual_squared = one.residual_squared
            numel = self.slice.numel
            member.pushed_elements += one.elements
            member.pushable_elements += numel
            member.density = one.elements / numel if numel else 0.0

    # Checkpoints

    def tensors(self) -> dict[str, Tensor]:
        """Return copies of all tensors, for a checkpoint."""
        replica = self.replica.state() if self.replica is not None else {}
        shadow = {_SHADOW: self.shadow.values.clone()} if self.shadow is not None else {}
        return {**replica, **shadow, **{_UNTRAINED + name: value.clone() for name, value in self.untrained.items()}}

    def table(self) -> bytes:
        """Return everything that is no tensor, for a checkpoint."""
        return disk.Table(
            opened=opened_to_message(self.opened) if self.opened is not None else None,
            history=pb.History(run=self.run, version=self.version, digest=self.digest),
            overrides=overrides_to_messages(self.overrides),
            next_threshold=self.threshold,
            membership=membership_to_message(self.members.membership),
            seats=[_seat_to_message(member) for member in self.members],
            verdicts={str(verdict): count for verdict, count in self.verdicts.items()},
            residual_squared_total=self.residual_squared_total,
            abandoned_squared_total=self.abandoned_squared_total,
            lost_squared_total=self.lost_squared_total,
            newest=closed_to_message(self.newest) if self.newest is not None else None,
            agreements=[pb.Agreed(number=one.number, values=one.values) for one in self.agreements.values()],
            bookmark=None if self.bookmark is None else bookmark_to_message(self.bookmark),
        ).SerializeToString(deterministic=True)

    def snapshot(self) -> Snapshot:
        """Return everything that a worker needs to begin. Raises ProtocolError before the seed."""
        if self.replica is None or self.opened is None:
            raise ProtocolError("the shard has not been seeded yet")
        groups = [dict(group) for group in self.spec.groups]
        for one in self.overrides:
            groups[one.group][one.name] = one.value
        return Snapshot(
            history=self.history,
            tensors=self.tensors(),
            layout=self.opened.registration.layout,
            optimizer=OptimizerSpec(self.spec.name, tuple(groups)),
            threshold=self.threshold,
            membership=self.members.membership,
            bookmark=self.bookmark,
        )

    @classmethod
    def restored(cls, table: bytes, tensors: Mapping[str, Tensor]) -> Self:
        """Return the state of which a checkpoint was made.

        Raises:
            DataLossError: when it cannot be read.
        """
        message = disk.Table()
        try:
            message.ParseFromString(table)
            opened = opened_from_message(message.opened)
            state = cls(opened.run, opened.registration.workers)
            state._open(opened)
            state._restore(message, tensors)
        except (DecodeError, ValueError, ProtocolError) as error:
            raise DataLossError(f"a checkpoint cannot be read: {error}") from error
        return state

    def _restore(self, message: disk.Table, tensors: Mapping[str, Tensor]) -> None:
        replica = {name: value for name, value in tensors.items() if not name.startswith((_UNTRAINED, _SHADOW))}
        self.replica = Replica(self.slice, self.spec, replica, message.history.version)
        self.untrained = {
            name.removeprefix(_UNTRAINED): value for name, value in tensors.items() if name.startswith(_UNTRAINED)
        }
        self._begin_shadow(tensors.get(_SHADOW))
        self.run, self.digest = message.history.run, message.history.digest
        self.overrides = overrides_from_messages(message.overrides)
        self.threshold = message.next_threshold if message.HasField("next_threshold") else None
        self.members.membership = membership_from_message(message.membership)
        for seat in message.seats:
            _seat_from_message(seat, self.members.seat(seat.rank))
        self.verdicts.update({Verdict(name): count for name, count in message.verdicts.items()})
        self.residual_squared_total = message.residual_squared_total
        self.abandoned_squared_total = message.abandoned_squared_total
        self.lost_squared_total = message.lost_squared_total
        if message.HasField("newest"):
            self.newest = closed_from_message(message.newest, self.slice)
        self.agreements = {one.number: Agreed(one.number, dict(one.values)) for one in message.agreements}
        self.bookmark = bookmark_from_message(message.bookmark) if message.HasField("bookmark") else None

    @property
    def history(self) -> History:
        """Where this shard is."""
        return History(self.run, self.version, self.digest)


def _seat_to_message(member: Member) -> disk.Seat:
    return disk.Seat(
        rank=member.rank, incarnation=member.incarnation, retired=member.retired, origin=member.origin,
        metrics_address=member.metrics_address, left=member.state is MemberState.LEFT, settled_steps=member.settled,
        last_content=member.content, last_verdict=VERDICTS[member.verdict], steps=member.steps,
        push_bytes=member.push_bytes, pull_bytes=member.pull_bytes, pushed_elements=member.pushed_elements,
        pushable_elements=member.pushable_elements, density=member.density, head_start=member.head_start,
        residual_squared=member.residual_squared,
    )  # fmt: skip


def _seat_from_message(seat: disk.Seat, member: Member) -> None:
    if seat.incarnation:
        member.retired, member.incarnation = list(seat.retired), seat.incarnation
        member.origin, member.metrics_address = seat.origin, seat.metrics_address
    if seat.left:
        member.state = MemberState.LEFT
    by_number = {number: verdict for verdict, number in VERDICTS.items()}
    member.settled, member.content, member.verdict = seat.settled_steps, seat.last_content, by_number[seat.last_verdict]
    member.steps, member.push_bytes, member.pull_bytes = seat.steps, seat.push_bytes, seat.pull_bytes
    member.pushed_elements, member.pushable_elements = seat.pushed_elements, seat.pushable_elements
    member.density, member.head_start = seat.density, seat.head_start
    member.residual_squared = seat.residual_squared
