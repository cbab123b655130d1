"""Who is missing: warnings while a round or an agreement waits for long, its deadline, and who came or was dropped."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

from thresher.server.agreeing import OpenAgreement
from thresher.server.config import ShardConfig
from thresher.server.effects import Failed, Notice
from thresher.server.events import Worker
from thresher.server.members import Member, MemberState
from thresher.server.open_round import OpenRound
from thresher.server.state import RunState

_FIRST_NOTICE: Final = 10.0


@final
@dataclass(slots=True)
class _Wait:
    """Something that waits for members.

    Attributes:
        what: For people: ``round 3 of shard 0``.
        missing: Whom it waits for.
        doing: Why, one for each of them.
        advice: What to do about it.
    """

    what: str
    since: float
    missing: Sequence[Member]
    doing: Sequence[str]
    advice: str


@final
class Watch:
    """Looks at what is open, and at who belongs to the run. Times are in seconds.

    Args:
        config: Of the shard.
        state: Of the shard; only read here.
    """

    def __init__(self, config: ShardConfig, state: RunState) -> None:
        """Begin without a warning."""
        self._config, self._state = config, state
        self._members = set(state.members.membership.ranks)
        self._warned = [0.0, 0.0]  # of the round, and of the agreement

    def look(self, open_round: OpenRound, agreement: OpenAgreement, now: float) -> list[Notice | Failed]:
        """Return what is to be said: who is missing, or that the run has failed."""
        crossing = self._crossing(open_round, agreement, now)
        if crossing:
            return [Failed(crossing)]
        said: list[Notice | Failed] = []
        waits = self._round(open_round, agreement, now), self._agreement(open_round, agreement, now)
        for kind, wait in enumerate(waits):
            if wait is not None:
                said += self._said_of_wait(kind, wait, now)
        return said

    def changes(self, now: float) -> list[Notice]:
        """Return who was dropped and who was let in since the last time; ask when that may have been."""
        members, where = self._state.members, f"shard {self._config.shard} at version {self._state.version}"
        before, self._members = self._members, set(members.membership.ranks)
        dropped = [one for rank in before - self._members if (one := members.seat(rank)).state is not MemberState.LEFT]
        said = [
            Notice(
                f"{where} goes on without {member}, which was lost {now - member.lost_at:.1f} s ago, after "
                f"{member.steps} steps: its lease is {self._config.lease:g} s. Look at its log; if it comes back, it "
                "is let in again"
            )
            for member in dropped
        ]
        come = [members.seat(rank) for rank in sorted(self._members - before)]
        return [*said, *(Notice(f"{where} lets in {member}, after {member.steps} steps of its own") for member in come)]

    def _crossing(self, open_round: OpenRound, agreement: OpenAgreement, now: float) -> str:
        """Say who pushes where others ask, once nobody can go on for that; empty while somebody may.

        In lockstep a worker that waits for its push does not ask before it is answered, nor the other way round; so
        where each member does one of them, and not all the same, both wait until the deadline. What an earlier life
        of a worker said does not count: this one may do something else.
        """
        members = self._state.members
        awaited = members.awaited(now, self._config.lease)
        if not self._state.consistency.lockstep or any(one.state is not MemberState.EXCHANGING for one in awaited):
            return ""
        workers = {Worker(one.rank, one.incarnation): one for one in awaited}
        pushers = {push.worker for push in open_round.waiting.values()}
        pushing = [one for worker, one in workers.items() if worker in pushers]
        asking = [one for worker, one in workers.items() if agreement.is_asked_by(worker) and one not in pushing]
        if not pushing or not asking or len(pushing) + len(asking) < len(awaited):
            return ""
        version, number = self._state.version, self._state.agreed
        here, there = (", ".join(map(str, group)) for group in (pushing, asking))
        return (
            f"round {version} and agreement {number} of shard {self._config.shard} wait for each other: {here} pushed "
            f"step {version}, {there} asks for agreement {number}. All must call mean() and stop() at the same place "
            "of their loop; after a restart an enumerate() begins anew: count with session.step"
        )

    def _round(self, open_round: OpenRound, agreement: OpenAgreement, now: float) -> _Wait | None:
        waiting = open_round.waiting
        if not waiting:
            return None
        missing = [member for member in self._state.members.counted if member.rank not in waiting]
        doing = [
            f"{one} waits for agreement {self._state.agreed} instead, after {one.steps} steps"
            if agreement.asks(one.rank)
            else one.whereabouts(now)
            for one in missing
        ]
        what = f"round {self._state.version} of shard {self._config.shard}"
        return _Wait(what, open_round.since(), missing, doing, self._advice("--round-timeout"))

    def _agreement(self, open_round: OpenRound, agreement: OpenAgreement, now: float) -> _Wait | None:
        if agreement.since == math.inf:
            return None
        missing = [member for member in self._state.members.counted if not agreement.asks(member.rank)]
        doing = [
            f"{one} is connected but has not asked{_instead(one, open_round)}, after {one.steps} steps"
            if one.state is MemberState.EXCHANGING
            else one.whereabouts(now)
            for one in missing
        ]
        what = f"agreement {self._state.agreed} of shard {self._config.shard}"
        advice = self._advice("--round-timeout")
        return _Wait(what, agreement.since, missing, doing, f"All must ask alike, in mean() and stop(). {advice}")

    def _advice(self, option: str) -> str:
        if not self._state.members.complete:
            return "Start who is missing, or look at its log; --start-timeout gives it longer"
        return f"Look at the log of who is missing; {option} gives it longer"

    def _said_of_wait(self, kind: int, wait: _Wait, now: float) -> list[Notice | Failed]:
        self._warned[kind] = max(self._warned[kind], wait.since)
        waited = now - wait.since
        limit = self._config.round_timeout if self._state.members.complete else self._config.start_timeout
        names = "; ".join(wait.doing) or "its grace is not over"
        leased = wait.missing and all(member.lost_at < math.inf for member in wait.missing)
        if waited >= limit and not leased:  # at the end of a lease the others go on
            return [Failed(f"{wait.what} was open for {waited:.1f} s, its deadline: {names}. {wait.advice}")]
        if now - self._warned[kind] >= max(_FIRST_NOTICE, waited / 2):  # 10, 20, 40, … seconds: seen, but no flood
            self._warned[kind] = now
            return [Notice(f"{wait.what} has been open for {waited:.0f} s: {names}. {wait.advice}")]
        return []


def _instead(member: Member, open_round: OpenRound) -> str:
    push = open_round.waiting.get(member.rank)
    return "" if push is None else f" and waits for its push of step {push.step} instead"
