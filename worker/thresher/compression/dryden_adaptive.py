"""Dryden's adaptive quantisation: of each sign a fixed share is sent, as its mean."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from thresher.compression.base import (
    FIRST_ROUND,
    Compressor,
    Guarantee,
    Round,
    check_density,
    check_finite,
    check_flat,
    kept,
)
from thresher.compression.top_k import TopK
from thresher.protos.sparse import SparseGradient


@final
@dataclass(frozen=True, slots=True)
class DrydenAdaptive(Compressor):
    """Sends the largest positive and the largest negative coordinates, as the mean of those sent of that sign.

    Of n coordinates of a sign k = max(1, ⌊density · n⌋) are sent; of equal ones, the first. Zeros have no sign. A
    message is two numbers and the signed positions. In :class:`~thresher.compression.layer_wise.LayerWise` each tensor
    has its own two, as in the paper.

    Args:
        density: share of the positive and of the negative coordinates that is sent, in (0, 1].

    Raises:
        ConfigurationError: the density is outside (0, 1].

    References:
        Dryden et al., "Communication quantization for data-parallel training of deep neural networks", MLHPC 2016,
        doi:10.1109/MLHPC.2016.004; the default as in its authors' library LBANN.

    Examples:
        >>> import torch
        >>> DrydenAdaptive(0.5).compress(torch.tensor([1.0, 5.0, -2.0, 3.0, 0.0, 0.5])).densify()
        tensor([ 0.,  4., -2.,  4.,  0.,  0.])
    """

    density: float = 1 / 64

    def __post_init__(self) -> None:
        check_density(self.density)
        object.__setattr__(self, "density", float(self.density))  # describe() must not depend on who computed it

    @property
    def guarantee(self) -> Guarantee:
        """Relative: δ = min(1 / k, max(density / 2, 1 / numel)) with k = max(1, ⌊density · numel⌋).

        Baseline: derived here, for each sign by itself. Let x be its n coordinates, with sum S of the k largest. What
        is sent takes S²/k off ‖x‖². For given S, ‖x‖² is largest where all is in one coordinate, S², or spread evenly
        over all n, n·S²/k². Hence δ ≥ min(1/k, k/n); and k/n is neither below 1/n nor, since density · n < k + 1,
        below density/2.
        """
        return Guarantee(conserves=True, delta=self._delta)

    def compress(self, gradient: Tensor, round: Round = FIRST_ROUND) -> SparseGradient:
        """Means in place of the largest coordinates of ``gradient``, [numel] float32, of each sign.

        Raises:
            ConfigurationError: ``gradient`` is not a flat float32 vector.
            NonFiniteGradientError: it holds NaN or infinity.
        """
        check_flat(gradient)
        check_finite(gradient)
        sides = [self._sent(gradient, gradient > 0), self._sent(gradient, gradient < 0)]
        indices, order = torch.cat([indices for indices, _ in sides]).sort()
        values = torch.cat([means for _, means in sides])[order]
        return SparseGradient(indices, values, gradient.numel())

    def _sent(self, gradient: Tensor, of_this_sign: Tensor) -> tuple[Tensor, Tensor]:
        """Indices, [k] int64, of the largest coordinates of one sign, and their mean as often."""
        candidates = of_this_sign.nonzero().squeeze(1)
        largest = TopK(self.density).compress(gradient[candidates])
        # In float64, because a sum of float32 numbers may overflow where their mean does not.
        mean = largest.values.double().mean().float()
        return candidates[largest.indices], mean.expand(largest.count)

    def _delta(self, numel: int) -> float:
        if numel == 0:
            return 1.0
        return min(1 / kept(self.density, numel), max(self.density / 2, 1 / numel))
