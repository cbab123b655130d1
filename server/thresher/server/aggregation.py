"""How the pushes of one round combine."""

from collections.abc import Sequence

from thresher.protos.mean import mean_of
from thresher.protos.optimizers import OptimizerSpec, Override
from thresher.protos.update import Update
from thresher.server.events import IterationRow, Push


def update_of(pushes: Sequence[Push], members: int, version: int, threshold: float | None) -> Update:
    """Return the update that a full round produces.

    Args:
        pushes: The round's, in rank order; at least one. Skipped ones arrive with weight 0.
        members: The divisor of the mean.
        version: The version the update creates.
        threshold: In force so far; it stays where no push proposes another.
    """
    heard = [(push, push.gradient) for push in pushes if push.gradient is not None]
    presence = tuple(any(flags) for flags in zip(*(push.presence for push, _ in heard), strict=True))
    proposals = [push.next_threshold for push in pushes if push.next_threshold is not None]
    return Update(
        version=version,
        members=members,
        contributors=tuple(push.worker.rank for push, _ in heard),
        mean=mean_of([gradient for _, gradient in heard], members) if heard else None,
        presence=presence if heard else (True,) * len(pushes[0].presence),
        overrides=pushes[0].overrides,
        next_threshold=proposals[0] if proposals else threshold,
        only_mean=pushes[0].only_mean,
        pushed_elements=sum(gradient.count for _, gradient in heard),
        push_bytes=sum(push.wire_bytes for push in pushes),
    )


def row_of(
    update: Update,
    pushes: Sequence[Push],
    *,
    shard: int,
    numel: int,
    threshold: float | None,
    learning_rate: float | None,
    round_seconds: float,
) -> IterationRow:
    """Return the round's line of the per-iteration file, as far as it is known before the update has been sent."""
    return IterationRow(
        shard=shard,
        numel=numel,
        version=update.version,
        members=update.members,
        contributors=update.contributors,
        skipped=update.mean is None,
        only_mean=update.only_mean,
        push_bytes=update.push_bytes,
        pull_bytes=0,
        pushed_elements=update.pushed_elements,
        push_density=update.pushed_elements / (update.members * numel),
        update_elements=update.mean.count if update.mean is not None else 0,
        update_density=update.mean.density if update.mean is not None else 0.0,
        residual_squared=sum(push.residual_squared for push in pushes) / len(pushes),
        threshold=threshold,
        learning_rate=learning_rate,
        round_seconds=round_seconds,
    )


def learning_rate_of(spec: OptimizerSpec, overrides: Sequence[Override]) -> float | None:
    """Return the first group's, the one people watch; None for an optimizer without one."""
    changed = [one.value for one in overrides if (one.group, one.name) == (0, "lr")]
    value = changed[0] if changed else spec.groups[0].get("lr")
    return value if isinstance(value, float) else None
