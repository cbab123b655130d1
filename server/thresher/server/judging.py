"""What becomes of a push, before it takes part in a round. Nothing here changes."""

import math
from collections.abc import Iterable

from thresher.server.effects import Judged
from thresher.server.events import Push, Verdict
from thresher.server.members import Member
from thresher.server.state import RunState


def judge(push: Push, member: Member, state: RunState, waiting: Push | None, others: Iterable[Push]) -> Judged | None:
    """Return why a push changes nothing: it is refused, or repeated; None for one that is new and right.

    One that waits for its verdict is DUPLICATE; one that has it is told it once more, whoever missed it goes on then.

    Args:
        push: What came.
        member: Whose it is.
        state: Of the shard.
        waiting: The member's push that has come and has no verdict yet.
        others: The pushes of the open round.

    Raises:
        OptimizerError: for hyper-parameters that the optimizer does not have.
    """
    known = _judge_identity(push, member, waiting)
    if known is not None:
        return known
    reason = _misplaced(push, member, state) or _malformed(push, member, state)
    if not reason and not returned(push, member, state):  # what goes back to its worker meets nobody else's push
        reason = _disagreement(push, member, others)
    return Judged(push.step, Verdict.REJECTED, reason) if reason else None


def returned(push: Push, member: Member, state: RunState) -> str:
    """Return why a push that is right is not taken, and its values go back to the worker; empty when it is taken."""
    consistency = state.consistency
    if consistency.lockstep and push.step < state.version:
        return f"round {push.step} was closed without {member}, which was away for longer than its lease"
    if consistency.lockstep and not state.members.counts(member):
        return f"{member} does not belong to the run at version {state.version}"
    staleness = state.version - push.version
    if consistency.max_staleness and staleness > consistency.max_staleness:
        return f"it was computed {staleness} versions ago, {consistency.max_staleness} are allowed"
    return ""


def _judge_identity(push: Push, member: Member, waiting: Push | None) -> Judged | None:
    conflict = f"{member} pushed step {push.step} before, with other content"
    if push.step < member.settled - 1:  # its worker has gone on since; what it was is not known any more
        return Judged(push.step, Verdict.APPLIED)
    if push.step < member.settled:
        if member.content and not push.lost and push.content != member.content:
            return Judged(push.step, Verdict.REJECTED, conflict)
        return Judged(push.step, member.verdict)
    if waiting is None:
        return None
    if push.step == waiting.step and (push.lost or push.content == waiting.content):
        return Judged(push.step, Verdict.DUPLICATE)
    return Judged(push.step, Verdict.REJECTED, conflict if push.step == waiting.step else "one push at a time")


def _misplaced(push: Push, member: Member, state: RunState) -> str:
    """Return why a push does not follow the one before it.

    In lockstep its version is its step; but a worker that was cut from this shard only has followed rounds that were
    closed without it here, while the others still wait for it elsewhere.
    """
    version, lockstep = state.version, state.consistency.lockstep
    if push.version > version or (lockstep and push.version < push.step):
        return f"{member} pushed step {push.step} of version {push.version}; round {version} is open"
    if not lockstep and push.step != member.settled:
        return f"{member} pushed step {push.step}; its step {member.settled} is next"
    return ""


def _malformed(push: Push, member: Member, state: RunState) -> str:
    piece = state.slice
    state.spec.checked(push.overrides)
    if push.gradient is not None and push.gradient.numel != piece.numel:
        return f"{push.gradient.numel} elements pushed, not {piece.numel}"
    if push.gradient is not None and not bool(push.gradient.values.isfinite().all()):
        return f"{member} pushed NaN or infinity in step {push.step}"
    if push.next_threshold is not None and not 0 <= push.next_threshold < math.inf:  # NaN is not in there
        return f"{member} proposes {push.next_threshold} as the threshold"
    if len(push.presence) != len(piece.segments):
        return f"presence of {len(push.presence)} tensors pushed"
    return ""


def _disagreement(push: Push, member: Member, others: Iterable[Push]) -> str:
    for other in others:
        if push.lost or other.lost:
            continue
        if other.only_mean != push.only_mean:
            return f"{member} and worker {other.worker.rank} disagree in step {push.step}: one wants a mean only"
        follows = push.follows or other.follows
        if other.step == push.step and not follows and other.overrides != push.overrides:  # who is late has its step's
            return (
                f"members disagree on hyper-parameters in step {push.step}: {member} has {list(push.overrides)}, "
                f"worker {other.worker.rank} has {list(other.overrides)} (differences from the registered values); "
                "give every worker the same schedule"
            )
    return ""
