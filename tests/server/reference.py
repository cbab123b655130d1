"""What a shard does, once more and on a page: who is where, who has pushed what, when a round closes, and its sum.

Gradients are small integers, so that what was applied can be counted without error.
"""

import math
from dataclasses import dataclass, replace
from typing import Final

import pytest
import torch
from tests.server.dialogues import CONFIG, NUMEL, Journaled, picture

from thresher.protos.consistency import Consistency
from thresher.server import effects, events
from thresher.server.effects import Effect
from thresher.server.events import Event, Verdict
from thresher.server.facts import Closed

RANKS: Final = 4  # two of them are no members to begin with


@dataclass
class Seat:
    """One rank in the reference."""

    state: str = "waited for"
    life: int = 0
    lost_at: float = math.inf
    settled: int = 0
    head_start: int = 0
    last: events.Push | None = None
    verdict: Verdict = Verdict.APPLIED
    waiting: events.Push | None = None


class Reference:
    """A shard with its journal, and beside it what both should be; each event is held against it."""

    def start(self, mode: Consistency) -> None:
        self.mode = mode
        self.journal = Journaled(replace(CONFIG, start_timeout=1e6, round_timeout=1e6, checkpoint_every=4))
        self.follower = self.journal.replayed()
        self.folded = 0
        self.now = 0.0
        self.seats = [Seat() for _ in range(RANKS)]
        self.members = {0, 1}
        self.order: list[int] = []  # of the pushes that wait
        self.quorum_at = math.inf
        self.opened_at = 0.0
        self.said: dict[int, tuple[int, int]] = {}  # what, and in which life
        self.agreed: list[float] = []
        self.version = 0
        self.model: torch.Tensor | None = None
        self.gone: dict[tuple[int, int], Verdict] = {}
        self.failed = False

    def awaited(self) -> set[int]:
        return {rank for rank in self.members if self.now - self.seats[rank].lost_at < CONFIG.lease}

    def ready(self) -> list[int]:
        """Whose pushes the next round takes; nobody's while it stays open."""
        waiting, awaited = self.order, self.awaited()
        if not self.mode.lockstep:  # who waits for an agreement cannot push meanwhile
            awaited = awaited - set(self.said)
        if self.mode.mode != "sync":
            slowest = min((self.pace(rank) for rank in awaited), default=0)
            ahead = math.inf if self.mode.mode == "async" else self.mode.staleness
            given = {rank: self.seats[rank].head_start for rank in awaited}
            return [rank for rank in waiting if self.pushed(rank).step + given.get(rank, 0) - slowest <= ahead][:1]
        if waiting and awaited <= set(waiting):
            return sorted(waiting)
        if not self.mode.quorum or not waiting:
            return []
        if len(waiting) < self.mode.quorum:
            return sorted(waiting) if self.now - self.opened_at >= CONFIG.lease else []
        self.quorum_at = min(self.quorum_at, self.now)
        return sorted(waiting) if self.now - self.quorum_at >= self.mode.grace else []

    def pace(self, rank: int) -> int:
        return self.seats[rank].settled + self.seats[rank].head_start

    def let_in(self, members: set[int]) -> None:
        """Let these be the members; who is new among them begins at the pace of the slowest of the others."""
        slowest = min((self.pace(rank) for rank in members & self.members), default=0)
        for rank in members - self.members:
            self.seats[rank].head_start += max(0, slowest - self.pace(rank))
        self.members = members

    def pushed(self, rank: int) -> events.Push:
        found = self.seats[rank].waiting
        assert found is not None
        return found

    def settle(self, rank: int, one: events.Push, verdict: Verdict) -> None:
        assert (rank, one.step) not in self.gone, "a push got two verdicts"
        self.gone[rank, one.step] = verdict
        seat = self.seats[rank]
        seat.settled, seat.last, seat.verdict = one.step + 1, one, verdict

    def close(self, taken: list[int], closed: Closed) -> None:
        """Hold one round of the shard against the reference: who is in it, by what it was divided, what it sums to."""
        pushes = [self.pushed(rank) for rank in taken]
        update = closed.sealed.update
        assert [(one.rank, one.step) for one in closed.contributions] == [(p.worker.rank, p.step) for p in pushes]
        assert update.members == max(len(self.members), len(pushes))
        total = torch.zeros(NUMEL)
        for one in pushes:
            total += one.gradient.densify() if one.gradient is not None else 0.0
        mean = torch.zeros(NUMEL) if update.mean is None else update.mean.densify()
        assert torch.equal((mean * update.members).round(), total)
        assert self.model is not None
        self.model -= mean
        for rank, one in zip(taken, pushes, strict=True):
            self.settle(rank, one, Verdict.APPLIED)
            self.seats[rank].waiting = None
            self.order.remove(rank)
        self.quorum_at = math.inf
        self.version += 1
        self.let_in({rank for rank in self.members if rank in self.awaited()} | self.here())

    def here(self) -> set[int]:
        return {rank for rank, seat in enumerate(self.seats) if seat.state == "exchanging"}

    # Saying something, and what it leads to

    def tell(self, event: Event) -> list[Effect]:
        done = self.journal.say(event, self.now)
        closed = [e.record for e in done if isinstance(e, effects.Append) and isinstance(e.record, Closed)]
        while self.model is not None and (taken := self.ready()):
            assert closed, f"a round of {taken} should have closed"
            self.close(taken, closed.pop(0))
        assert not closed, "a round closed that should have stayed open"
        self.check_told(done)
        return done

    def check_told(self, done: list[Effect]) -> None:
        """Nobody is told what has not been appended, and each update goes to those who are there."""
        appended: set[int] = set()
        for effect in done:
            if isinstance(effect, effects.Append) and isinstance(effect.record, Closed):
                appended.add(effect.record.sealed.update.version)
            if isinstance(effect, effects.Publish):
                assert effect.sealed.update.version in appended
                assert set(effect.ranks) <= self.here()
                assert self.mode.downlink == "shadow" or set(effect.ranks) == self.here()

    def conclude(self, done: list[Effect]) -> None:
        """An agreement is the mean over those who are awaited, once they have all spoken."""
        told = [effect for effect in done if isinstance(effect, effects.Tell)]
        awaited = self.awaited()
        if awaited and self.said and awaited <= set(self.said):
            self.agreed.append(sum(self.said[rank][0] for rank in awaited) / len(awaited))
            self.said = {}
            assert [(one.agreed.number, one.agreed.values) for one in told] == [
                (len(self.agreed) - 1, {"loss": self.agreed[-1]})
            ]
        else:
            assert not told

    def cross(self, done: list[Effect]) -> None:
        """In lockstep the run fails where some wait for a round and all others for an agreement."""
        awaited, seats = self.awaited(), self.seats
        pushing = {
            rank for rank in awaited if (one := seats[rank].waiting) and one.worker.incarnation == seats[rank].life
        }
        asking = {rank for rank in awaited - pushing if rank in self.said and self.said[rank][1] == seats[rank].life}
        crossed = bool(self.mode.lockstep and pushing and asking and pushing | asking == awaited <= self.here())
        assert crossed == any(isinstance(effect, effects.Failed) for effect in done)
        self.failed = crossed

    def let_in_alone(self) -> None:
        if self.here() and not self.awaited():
            self.let_in(self.here())

    def refused(self, event: Event, *errors: type[Exception]) -> None:
        """Law 7: an exception leaves everything as it was."""
        before = picture(self.journal.shard)
        with pytest.raises(errors):
            self.journal.say(event, self.now)
        assert picture(self.journal.shard) == before

    def unchanged(self, event: Event) -> list[Effect]:
        """Law 7: a repetition leaves everything as it was."""
        before = picture(self.journal.shard)
        done = self.journal.say(event, self.now)
        assert picture(self.journal.shard) == before
        return done
