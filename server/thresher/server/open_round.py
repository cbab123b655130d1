"""The round that is open: whose pushes are in it, whose wait to be let in, and when it is to be closed."""

import math
from collections.abc import Collection, Mapping
from typing import final

from thresher.protos.consistency import Consistency
from thresher.server.events import Push
from thresher.server.members import Member, Waited


@final
class OpenRound:
    """Pushes that have come and have no verdict yet; at most one of each worker.

    Attributes:
        opened_at: When the first push of the open round was let in.
        waits: How many seconds the pushes of the round that was closed last had been here, by rank.
        waited: The same, of all rounds so far.
    """

    def __init__(self) -> None:
        """Begin empty."""
        self._pushes: dict[int, Push] = {}
        self._held: dict[int, Push] = {}  # in the order in which they came
        self._came_at: dict[int, float] = {}  # of each push, let in or held
        self._quorum_at = math.inf
        self.opened_at = 0.0
        self.waits: dict[int, float] = {}
        self.waited: dict[int, Waited] = {}

    @property
    def pushes(self) -> Mapping[int, Push]:
        """Those that the next close takes, by rank."""
        return self._pushes

    @property
    def waiting(self) -> dict[int, Push]:
        """All that have come, by rank."""
        return {**self._pushes, **self._held}

    def since(self) -> float:
        """Return when the oldest of them came; infinity when there is none."""
        held = [self._came_at[rank] for rank in self._held]
        return min(held + ([self.opened_at] if self._pushes else []), default=math.inf)

    def hold(self, push: Push, now: float) -> None:
        """Take a push that came; `let_in` says when it takes part."""
        self._held[push.worker.rank] = push
        self._came_at[push.worker.rank] = now

    def let_in(self, consistency: Consistency, awaited: Collection[Member], now: float) -> None:
        """Move held pushes into the round: in sync all, in async one, in ssp one that is not too far ahead."""
        slowest = min((member.pace for member in awaited), default=0)
        head_starts = {member.rank: member.head_start for member in awaited}
        for rank, push in list(self._held.items()):
            if self._pushes and consistency.mode != "sync":
                return
            ahead = push.step + head_starts.get(rank, 0) - slowest
            if consistency.mode == "ssp" and ahead > consistency.staleness:
                continue
            if not self._pushes:
                self.opened_at = now
            self._pushes[rank] = push
            del self._held[rank]

    def is_complete(self, consistency: Consistency, awaited: Collection[Member], now: float, lease: float) -> bool:
        """True when the round is to be closed.

        One that does not reach its quorum is closed when it has been open for a lease: shards close rounds of different
        members, and those whose push is open here may be the ones that others wait for elsewhere.
        """
        if not self._pushes:
            return False
        if consistency.mode != "sync" or {member.rank for member in awaited} <= set(self._pushes):
            return True
        if not consistency.quorum:
            return False
        if len(self._pushes) < consistency.quorum:
            return now - self.opened_at >= lease
        self._quorum_at = min(self._quorum_at, now)
        return now - self._quorum_at >= consistency.grace

    def take(self, now: float) -> list[Push]:
        """Close: return its pushes in rank order, and begin the next one."""
        ranks = sorted(self._pushes)
        pushes = [self._pushes[rank] for rank in ranks]
        self.waits = {rank: now - self._came_at.pop(rank) for rank in ranks}
        for rank, seconds in self.waits.items():
            before = self.waited.get(rank, Waited())
            self.waited[rank] = Waited(before.pushes + 1, before.seconds + seconds)
        self._pushes, self._quorum_at = {}, math.inf
        return pushes

    def clear(self) -> None:
        """Forget everything: the workers send it again."""
        self._pushes, self._held, self._came_at, self._quorum_at = {}, {}, {}, math.inf
