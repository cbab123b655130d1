"""How the pushes of one round combine."""

from collections.abc import Mapping, Sequence

from thresher.protos.consistency import Consistency
from thresher.protos.mean import mean_of
from thresher.protos.optimizers import OptimizerSpec, Override
from thresher.protos.sealed import SealedUpdate
from thresher.protos.update import Membership, Update
from thresher.server.events import IterationRow, Push
from thresher.server.facts import Closed, Contribution
from thresher.server.pacing import per_push


def update_of(
    pushes: Sequence[Push],
    members: int,
    version: int,
    threshold: float | None,
    membership: Membership | None,
    *,
    overrides: tuple[Override, ...],
    consistency: Consistency,
    spec: OptimizerSpec,
) -> Update:
    """Return the update that a round produces.

    The mean is divided by the number of members. Where that is asked for, a push that is a round of its own and staler
    than that is divided by its staleness τ, the number of versions since the one it was computed on: it weighs
    1/max(N, τ). This is the rate of Zhang et al., "Staleness-aware Async-SGD for distributed deep learning",
    arXiv:1511.05950, which is α/τ for one gradient, put where it holds for a gradient's whole effect: with momentum a
    rate of one step would scale what earlier gradients still move, and not what this one moves later.

    Args:
        pushes: The round's, in rank order; at least one. Skipped ones arrive with weight 0.
        members: How many there are.
        version: The version the update creates.
        threshold: In force so far; it stays where no push proposes another.
        membership: Who belongs to the run from now on, where that changes.
        overrides: Hyper-parameters in force so far; they stay where no push says what comes next.
        consistency: When rounds close, and how a push that is a round of its own counts.
        spec: The optimizer as it was registered.
    """
    heard = [(push, push.gradient) for push in pushes if push.gradient is not None]
    presence = tuple(any(flags) for flags in zip(*(push.presence for push, _ in heard), strict=True))
    proposals = [push.next_threshold for push in pushes if push.next_threshold is not None]
    # Who is late may still be at earlier hyper-parameters; in lockstep all have the same.
    newest = max(pushes, key=lambda push: (not push.lost, not push.follows, push.version))
    counted = max(members, len(pushes))  # more push than there are members while somebody is being let in
    if not (newest.lost or newest.follows):
        slowed = consistency.momentum_per_push
        overrides = per_push(newest.overrides, spec, counted) if slowed else newest.overrides
    divisor = max(counted, version - 1 - newest.version) if consistency.staleness_aware else counted
    return Update(
        version=version,
        members=divisor,
        contributors=tuple(push.worker.rank for push, _ in heard),
        arrivals=() if consistency.lockstep else tuple((push.worker.rank, push.step) for push in pushes),
        mean=mean_of([gradient for _, gradient in heard], divisor) if heard else None,
        presence=presence if heard else (True,) * len(pushes[0].presence),
        overrides=overrides,
        next_threshold=proposals[0] if proposals else threshold,
        only_mean=newest.only_mean,
        pushed_elements=sum(gradient.count for _, gradient in heard),
        push_bytes=sum(push.wire_bytes for push in pushes),
        membership=membership,
    )


def closed_round(
    sealed: SealedUpdate,
    pushes: Sequence[Push],
    threshold: float | None,
    version: int,
    round_seconds: float,
) -> Closed:
    """Return the record of a round.

    Args:
        sealed: Its update.
        pushes: In rank order.
        threshold: The one it was computed with.
        version: The version before it.
        round_seconds: From the first push to the close.
    """
    return Closed(
        sealed=sealed,
        contributions=tuple(
            Contribution(
                rank=push.worker.rank,
                step=push.step,
                content=push.content,
                wire_bytes=push.wire_bytes,
                elements=push.gradient.count if push.gradient is not None else 0,
                staleness=version - push.version,
                heard=push.gradient is not None,
                residual_squared=push.residual_squared,
                forgot=push.forgot,
            )
            for push in pushes
        ),
        threshold=threshold,
        residual_squared=sum(push.residual_squared for push in pushes) / len(pushes),
        round_seconds=round_seconds,
    )


def row_of(
    closed: Closed, shard: int, numel: int, spec: OptimizerSpec, waits: Mapping[int, float] | None = None
) -> IterationRow:
    """Return the round's line of the per-iteration file.

    Args:
        closed: The round.
        shard: Where it was closed.
        numel: Of the shard's slice.
        spec: The optimizer as it was registered.
        waits: Seconds that each push had been there, by rank; empty or None where that is not known any more.
    """
    update = closed.sealed.update
    return IterationRow(
        shard=shard,
        numel=numel,
        version=update.version,
        members=update.members,
        contributors=update.contributors,
        skipped=update.mean is None,
        only_mean=update.only_mean,
        push_bytes=update.push_bytes,
        pull_bytes=sum(wire_bytes for _, wire_bytes in closed.deliveries),
        pushed_elements=update.pushed_elements,
        push_density=update.pushed_elements / (len(closed.contributions) * numel),
        update_elements=update.mean.count if update.mean is not None else 0,
        update_density=update.mean.density if update.mean is not None else 0.0,
        residual_squared=closed.residual_squared,
        threshold=closed.threshold,
        learning_rate=learning_rate_of(spec, update.overrides),
        round_seconds=closed.round_seconds,
        staleness=max(one.staleness for one in closed.contributions),
        barrier_seconds=tuple(waits[rank] for rank in update.contributors) if waits else None,
    )


def learning_rate_of(spec: OptimizerSpec, overrides: Sequence[Override]) -> float | None:
    """Return the first group's, the one people watch; None for an optimizer without one."""
    changed = [one.value for one in overrides if (one.group, one.name) == (0, "lr")]
    value = changed[0] if changed else spec.groups[0].get("lr")
    return value if isinstance(value, float) else None
