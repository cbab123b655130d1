"""Who belongs to the run: one record per rank, as the shard sees it."""

from dataclasses import dataclass
from enum import StrEnum
from typing import final

from thresher.protos.errors import ProtocolError, RegistrationError
from thresher.server.events import Push, Register, Worker
from thresher.server.statistics import MemberStatistics


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

    Invariants: ``steps`` is the number of pushes taken; ``version`` the newest version its replica is known to hold.
    """

    rank: int
    state: MemberState = MemberState.WAITED_FOR
    incarnation: int = 0
    origin: str = ""
    metrics_address: str = ""
    lost_at: float = 0.0
    version: int = 0
    steps: int = 0
    last_content: int = 0
    push_bytes: int = 0
    pull_bytes: int = 0
    pushed_elements: int = 0
    pushable_elements: int = 0
    density: float = 0.0

    @property
    def takes_part(self) -> bool:
        """True until it has left: rounds wait for it and it counts in the divisor."""
        return self.state is not MemberState.LEFT

    def count(self, push: Push, numel: int) -> None:
        """Book a push that was taken; what is pushed for a mean only is no part of densities."""
        self.steps, self.version, self.last_content = push.step + 1, push.version, push.content
        self.push_bytes += push.wire_bytes
        if not push.only_mean:
            elements = push.gradient.count if push.gradient is not None else 0
            self.pushed_elements += elements
            self.pushable_elements += numel
            self.density = elements / numel

    def statistics(self) -> MemberStatistics:
        """Return a frozen picture of the member."""
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
    """All ranks of a run, in order."""

    def __init__(self, workers: int) -> None:
        """Wait for ranks 0 … ``workers`` - 1."""
        self.all = [Member(rank) for rank in range(workers)]

    @property
    def present(self) -> list[Member]:
        """Those that take part now, by rank. Their number is the divisor."""
        return [member for member in self.all if member.takes_part]

    @property
    def complete(self) -> bool:
        """True once every rank has come and opened its stream."""
        return all(member.state not in (MemberState.WAITED_FOR, MemberState.REGISTERED) for member in self.all)

    def known(self, worker: Worker) -> Member:
        """Return the record of a worker that has registered and has not been replaced.

        Raises:
            ProtocolError: otherwise; nothing it says is believed.
        """
        member = self.all[worker.rank] if worker.rank < len(self.all) else None
        if member is None or member.state is MemberState.WAITED_FOR or member.incarnation != worker.incarnation:
            raise ProtocolError(f"worker {worker.rank} is not registered under this incarnation; register first")
        return member

    def admit(self, request: Register) -> None:
        """Record a registration; the same one again changes nothing.

        Raises:
            RegistrationError: when the rank does not exist or is taken.
        """
        worker = request.worker
        if request.workers != len(self.all) or worker.rank >= len(self.all):
            raise RegistrationError(
                f"worker {worker.rank} of {request.workers} asks to join a run of {len(self.all)} workers "
                f"(ranks 0 to {len(self.all) - 1}); start shards and workers with the same number of workers"
            )
        member = self.all[worker.rank]
        if member.state is MemberState.WAITED_FOR:
            member.state = MemberState.REGISTERED
            member.incarnation = worker.incarnation
            member.origin, member.metrics_address = request.origin, request.metrics_address
        elif member.incarnation != worker.incarnation:
            raise RegistrationError(
                f"rank {worker.rank} is taken by {member}, which is {member.state}; "
                f"two workers cannot have one rank: give {request.origin or 'this one'} another"
            )
