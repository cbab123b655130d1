"""Who belongs to the run: one record per rank, as the shard sees it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, final

from thresher.protos.errors import FencedError, ProtocolError, RegistrationError
from thresher.protos.update import Membership
from thresher.server.events import Leave, Register, Verdict, Worker
from thresher.server.statistics import MemberStatistics

MOST_RANKS: Final = 65_536
"""Ranks are below this: a shard keeps a record of each that ever came, and workers may come that nobody announced."""

_REMEMBERED_LIVES: Final = 16
_MOST_EPOCHS_AHEAD: Final = 65_536  # a shard that was away hears of so many changes at once at most


class MemberState(StrEnum):
    """Where a worker stands."""

    WAITED_FOR = "waited for"
    REGISTERED = "registered"
    EXCHANGING = "exchanging"
    LEFT = "left"
    LOST = "lost"
    ABORTED = "aborted"


@final
@dataclass(slots=True)
class Member:
    """One rank. Counters cover the exchange only, not registration, seed and snapshots.

    Attributes:
        state: Where it stands. After a recovery every worker that had come is lost until it comes back.
        incarnation: Its newest life; 0 when it has never come.
        retired: Its earlier lives, which are fenced.
        lost_at: When it stopped to exchange; infinity while it exchanges or has never begun to.
        version: The newest version it is known to hold.
        told: The newest version it was sent.
        settled: One more than the step of its last push that has a verdict.
        content: Digest of that push.
        verdict: What became of it.
        steps: Pushes applied.
        head_start: Steps it was given when it was let in: of ssp, where others had made more by then.
        residual_squared: Sum of squares of what it kept back on this slice, with its last push.
        among: How many workers there are, as it was told; 0 where shards were, or that was another life of this shard.
    """

    rank: int
    state: MemberState = MemberState.WAITED_FOR
    incarnation: int = 0
    retired: list[int] = field(default_factory=list)
    origin: str = ""
    metrics_address: str = ""
    lost_at: float = math.inf
    version: int = 0
    told: int = 0
    settled: int = 0
    content: int = 0
    verdict: Verdict = Verdict.APPLIED
    steps: int = 0
    head_start: int = 0
    residual_squared: float = 0.0
    among: int = 0
    push_bytes: int = 0
    pull_bytes: int = 0
    pushed_elements: int = 0
    pushable_elements: int = 0
    density: float = 0.0

    @property
    def pace(self) -> int:
        """How far it is, among the members: in ssp nobody may be much further than the slowest."""
        return self.settled + self.head_start

    def absent(self, now: float, lease: float) -> bool:
        """True when it has been gone for longer than its lease: rounds no longer wait for it."""
        return now - self.lost_at >= lease

    def settle(self, step: int, content: int, verdict: Verdict) -> None:
        """Book the verdict on a push."""
        self.settled, self.content, self.verdict = step + 1, content, verdict

    def miscounted(self, leave: Leave) -> str:
        """Say how its own count of the exchange differs from the shard's; empty where it does not, or cannot know."""
        if not leave.counted or (leave.push_bytes, leave.pull_bytes) == (self.push_bytes, self.pull_bytes):
            return ""
        return (
            f"{self} counts {leave.push_bytes} bytes pushed and {leave.pull_bytes} pulled, "
            f"this shard {self.push_bytes} and {self.pull_bytes}"
        )

    def statistics(self, *, counts: bool) -> MemberStatistics:
        """Return a frozen picture of the member; ``counts`` says whether it belongs to the run."""
        return MemberStatistics(
            rank=self.rank,
            state=self.state,
            steps=self.steps,
            push_bytes=self.push_bytes,
            pull_bytes=self.pull_bytes,
            pushed_elements=self.pushed_elements,
            pushable_elements=self.pushable_elements,
            density=self.density,
            origin=self.origin,
            metrics_address=self.metrics_address,
            counts=counts,
        )

    def __str__(self) -> str:
        """For people: ``worker 2 (host:pid)``."""
        return f"worker {self.rank} ({self.origin})" if self.origin else f"worker {self.rank}"

    def whereabouts(self, now: float) -> str:
        """Say why a round may be waiting for it."""
        match self.state:
            case MemberState.WAITED_FOR:
                return f"{self} has never registered"
            case MemberState.REGISTERED:
                return f"{self} has registered but not begun to exchange"
            case MemberState.LOST:
                return f"{self} lost its connection {now - self.lost_at:.1f} s ago, after {self.steps} steps"
            case _:
                return f"{self} is connected but has not pushed, after {self.steps} steps"


@final
class Members:
    """All ranks that ever came, and which of them count.

    Attributes:
        membership: Whose pushes rounds are made of; its size, less those who have left since, is the divisor.
    """

    def __init__(self, workers: int) -> None:
        """Wait for ranks 0 … ``workers`` - 1."""
        self._by_rank = {rank: Member(rank) for rank in range(workers)}
        self.membership = Membership(0, tuple(range(workers)))

    def __iter__(self) -> Iterator[Member]:
        """Yield every rank, ascending."""
        return iter([self._by_rank[rank] for rank in sorted(self._by_rank)])

    def seat(self, rank: int) -> Member:
        """Return the record of a rank; a new one where it has never been heard of."""
        return self._by_rank.setdefault(rank, Member(rank))

    @property
    def counted(self) -> list[Member]:
        """Those that belong to the run now, by rank. Their number is the divisor."""
        return [self.seat(rank) for rank in self.membership.ranks]

    @property
    def exchanging(self) -> list[Member]:
        """Those that are connected, by rank, whether they belong to the run or want to."""
        return [member for member in self if member.state is MemberState.EXCHANGING]

    def awaited(self, now: float, lease: float) -> list[Member]:
        """Return those for whose pushes a round waits, by rank."""
        return [member for member in self.counted if not member.absent(now, lease)]

    def miss(self, now: float) -> None:
        """Begin the lease of every member that is not here: it has been here before, and has to come back."""
        for member in self.counted:
            if member.state is MemberState.WAITED_FOR:
                member.state = MemberState.LOST
            if member.state is not MemberState.EXCHANGING:
                member.lost_at = min(member.lost_at, now)

    def expect(self, workers: int, now: float) -> None:
        """Begin the lease of members beyond ``workers``, whom a group of workers before this one has promised."""
        for member in self.counted:
            if member.rank >= workers and member.state is not MemberState.EXCHANGING:
                member.lost_at = min(member.lost_at, now)

    @property
    def complete(self) -> bool:
        """True once every member has come and opened its stream."""
        return all(
            member.state not in (MemberState.WAITED_FOR, MemberState.REGISTERED) or member.lost_at < math.inf
            for member in self.counted
        )

    def counts(self, member: Member) -> bool:
        """True when the member belongs to the run."""
        return member.rank in self.membership.ranks

    def wanted(self, now: float, lease: float) -> Membership:
        """Return who should belong to the run: without those gone for longer than their lease, with those who came."""
        gone = {member.rank for member in self.counted if member.absent(now, lease)}
        come = {member.rank for member in self.exchanging}
        ranks = tuple(sorted((set(self.membership.ranks) - gone) | come))
        return self.membership if ranks == self.membership.ranks else Membership(self.membership.epoch + 1, ranks)

    def adopt(self, membership: Membership) -> None:
        """Take what the first shard says; it may not have heard of a leave that came here already.

        Who is let in begins at the pace of the slowest: its own steps would hold everybody up.

        Raises:
            ProtocolError: when it cannot be what the first shard says; nothing changes.
        """
        if membership.epoch > self.membership.epoch + _MOST_EPOCHS_AHEAD:
            raise ProtocolError(f"membership {membership.epoch} is told; here it is {self.membership.epoch}")
        if max(membership.ranks, default=0) >= MOST_RANKS:
            raise ProtocolError(f"rank {membership.ranks[-1]} in a membership; ranks are below {MOST_RANKS}")
        here = tuple(rank for rank in membership.ranks if self.seat(rank).state is not MemberState.LEFT)
        slowest = min((self.seat(rank).pace for rank in here if rank in self.membership.ranks), default=0)
        for rank in set(here) - set(self.membership.ranks):
            seat = self.seat(rank)
            seat.head_start += max(0, slowest - seat.pace)
        self.membership = Membership(membership.epoch, here)

    def dismiss(self, rank: int, *, decides: bool) -> None:
        """Let a rank belong to the run no more.

        Args:
            rank: Of a worker that leaves.
            decides: This is the first shard, which says which epoch that is; the others go on in the one they know.
        """
        if rank in self.membership.ranks:
            left = tuple(other for other in self.membership.ranks if other != rank)
            self.membership = Membership(self.membership.epoch + decides, left)

    def known(self, worker: Worker) -> Member:
        """Return the record of a worker that has registered and has not been replaced.

        Raises:
            FencedError: when another life of this rank has taken its place.
            ProtocolError: when it never registered; nothing it says is believed.
        """
        member = self._by_rank.get(worker.rank)
        if member is not None and member.incarnation == worker.incarnation and member.incarnation:
            return member
        if member is not None and worker.incarnation in member.retired:
            raise FencedError(_fenced(member, worker))
        raise ProtocolError(f"worker {worker.rank} is not registered under this incarnation; register first")

    def check_admission(self, request: Register, announced: int) -> None:
        """Refuse a registration that cannot be let in; nothing changes.

        Args:
            request: What the worker says.
            announced: Number of workers that shards and workers were started with; 0 where the workers alone say it,
                who may all be started again with another number before the first round.

        Raises:
            RegistrationError: when its rank is none, or it was told another number of workers than is announced, or
                than one that exchanges: once rounds have been closed, there may be more or fewer.
            FencedError: when another life of its rank has taken its place.
        """
        rank = request.worker.rank
        if rank >= MOST_RANKS:
            raise RegistrationError(f"worker {rank} cannot join: ranks are below {MOST_RANKS}; give it another")
        if request.workers > MOST_RANKS:
            raise RegistrationError(f"worker {rank} of {request.workers} cannot join: {MOST_RANKS} are the most")
        if rank < announced != request.workers and not any(member.settled for member in self):
            raise RegistrationError(
                f"worker {rank} of {request.workers} asks to join a run that began with {announced} workers; "
                "start shards and workers with the same number of workers"
            )
        self.check_company(rank, 0 if announced else request.workers)
        member = self._by_rank.get(rank)
        if member is not None and request.worker.incarnation in member.retired:
            raise FencedError(_fenced(member, request.worker))

    def check_company(self, rank: int, among: int) -> None:
        """Refuse a worker that was told another number of workers than one that exchanges, before any round is closed.

        Each would take another share of the data. Who does not exchange may be of a group that is gone.

        Args:
            rank: The worker's.
            among: How many workers there are, as it was told; 0 where nobody is refused for that.

        Raises:
            RegistrationError: it names both.
        """
        if not among or any(member.settled for member in self):
            return
        for one in self:
            if one.state is MemberState.EXCHANGING and one.rank != rank and one.among not in (0, among):
                raise RegistrationError(
                    f"worker {rank} was told that it is one of {among}, {one} that it is one of {one.among}; start all "
                    "workers with the same number of workers"
                )

    def admit(self, worker: Worker, origin: str, metrics_address: str) -> None:
        """Let a life of a worker in; an earlier one of its rank is fenced from now on."""
        member = self.seat(worker.rank)
        if member.incarnation and member.incarnation != worker.incarnation:
            member.retired = [*member.retired, member.incarnation][-_REMEMBERED_LIVES:]
        member.incarnation, member.origin, member.metrics_address = worker.incarnation, origin, metrics_address
        member.state = MemberState.REGISTERED


def _fenced(member: Member, worker: Worker) -> str:
    return (
        f"worker {worker.rank} was replaced by {member}: two workers cannot have one rank. Give this one another, or "
        "end it if it was meant to be replaced"
    )
