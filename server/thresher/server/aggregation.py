"""How the pushes of one round combine."""

from collections.abc import Sequence

import torch

from thresher.protos.optimizers import OptimizerSpec, Override
from thresher.protos.sparse import SparseGradient
from thresher.protos.update import Update
from thresher.server.events import IterationRow, Push


def mean_of(pushes: Sequence[SparseGradient], members: int) -> SparseGradient:
    """Return the sum of ``pushes``, in the order given, divided by ``members``.

    The support is the union of theirs. A coordinate that a push does not hold counts as zero, so a push is weighted
    1/members whoever else sent the coordinate (design §6; arXiv:2108.00951, Algorithm 1).

    Law: with every coordinate in every push this equals ``(p0 + p1 + …) / members`` of the dense vectors, bit for bit.

    Args:
        pushes: At least one, all of the same numel, in rank order.
        members: The divisor, at least ``len(pushes)``.

    Examples:
        >>> one, other = SparseGradient.empty(3), SparseGradient.dense(torch.tensor([2.0, 4.0, 0.0]))
        >>> mean_of([one, other], members=2).densify()
        tensor([1., 2., 0.])
    """
    if all(push.count == push.numel for push in pushes):
        total = pushes[0].values.clone()
        for push in pushes[1:]:
            total.add_(push.values)
        return SparseGradient.dense(total.div_(members))
    numel = pushes[0].numel
    total = torch.full((numel,), -0.0)  # the identity of IEEE addition: 0.0 would turn a sum of -0.0 into 0.0
    touched = torch.zeros(numel, dtype=torch.bool)
    for push in pushes:
        total[push.indices] += push.values
        touched[push.indices] = True
    indices = touched.nonzero().view(-1)
    return SparseGradient(indices, total[indices].div_(members), numel)


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
    elements = sum(push.gradient.count for push in pushes if push.gradient is not None)
    return IterationRow(
        shard=shard,
        numel=numel,
        version=update.version,
        members=update.members,
        contributors=update.contributors,
        skipped=update.mean is None,
        push_bytes=sum(push.wire_bytes for push in pushes),
        pull_bytes=0,
        pushed_elements=elements,
        push_density=elements / (update.members * numel),
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
