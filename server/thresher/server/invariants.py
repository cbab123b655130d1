"""What must hold of a shard after every event."""

from collections.abc import Mapping

from thresher.server.events import Push, Verdict
from thresher.server.state import RunState


def broken_invariants(state: RunState, waiting: Mapping[int, Push], told: int) -> list[str]:
    """Return those that do not hold, in words.

    Args:
        state: The lasting part of the shard.
        waiting: Pushes that have come and have no verdict yet, by rank.
        told: Version of the newest update that workers were told of.
    """
    version, lockstep = state.version, state.consistency.lockstep
    counted = {member.rank for member in state.members.counted}
    invariants = {
        "only members push": set(waiting) <= counted or not lockstep,
        "an open push has no verdict": all(p.step >= state.members.seat(r).settled for r, p in waiting.items()),
        "pushes belong to the open round": not lockstep or all(p.step == version for p in waiting.values()),
        "nobody is ahead": not lockstep
        or all(m.settled <= version + (m.verdict is Verdict.RETURNED) for m in state.members),
        "nobody knows the future": all(member.version <= version for member in state.members),
        "a slice comes with its model": (state.piece is None) == (state.opened is None),
        "the log ends at the version": told == version,
        "the newest round made the version": state.newest is None or state.newest.sealed.update.version == version,
        "a digest comes with a history": bool(state.digest) == (version > 0),
    }
    return [text for text, holds in invariants.items() if not holds]
