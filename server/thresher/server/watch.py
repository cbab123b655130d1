"""Who is missing: warnings while a round is open for long, and its deadline."""

from typing import final

from thresher.server.config import ShardConfig
from thresher.server.effects import Failed, Notice
from thresher.server.open_round import OpenRound
from thresher.server.state import RunState


@final
class Watch:
    """Looks at the round that is open. Times are in seconds."""

    def __init__(self, config: ShardConfig) -> None:
        """Begin without a warning."""
        self._config = config
        self._warned = 0.0

    def look(self, state: RunState, open_round: OpenRound, now: float) -> Notice | Failed | None:
        """Return what is to be said about pushes that wait: nothing, who is missing, or that the run has failed."""
        waiting, since = open_round.waiting, open_round.since()
        if not waiting:
            return None
        self._warned = max(self._warned, since)
        waited = now - since
        missing = [member for member in state.members.counted if member.rank not in waiting]
        names = "; ".join(member.whereabouts(now) for member in missing) or "its grace is not over"
        where = f"round {state.version} of shard {self._config.shard}"
        limit = self._config.round_timeout if state.members.complete else self._config.start_timeout
        if waited >= limit:
            return Failed(f"{where} was open for {waited:.1f} s, its deadline: {names}")
        if now - self._warned >= max(10.0, waited / 2):  # 10, 20, 40, … seconds: seen, but no flood
            self._warned = now
            return Notice(f"{where} has been open for {waited:.0f} s: {names}")
        return None
