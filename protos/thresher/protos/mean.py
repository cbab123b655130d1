"""How the messages of one round combine, wherever that happens: at a shard, in a collective, in the simulator."""

from collections.abc import Sequence

import torch

from thresher.protos.sparse import SparseGradient


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
