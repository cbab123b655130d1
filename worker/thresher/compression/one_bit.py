"""1-bit SGD: one bit a coordinate, and the means of the two groups it makes."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from thresher.compression.base import FIRST_ROUND, Guarantee, Quantizer, Round, check_finite, check_flat
from thresher.protos.sparse import SparseGradient


@final
@dataclass(frozen=True, slots=True)
class OneBit(Quantizer):
    """Sends for each coordinate the mean of the negative ones or of the others, whichever it belongs to.

    In :class:`~thresher.compression.layer_wise.LayerWise` each tensor has means of its own, as in the paper each column
    of a weight matrix.

    References:
        Seide et al., "1-bit stochastic gradient descent and its application to data-parallel distributed training of
        speech DNNs", Interspeech 2014, doi:10.21437/Interspeech.2014-274.

    Examples:
        >>> OneBit().compress(torch.tensor([-1.0, 0.0, 3.0, -2.0])).densify()
        tensor([-1.5000,  1.5000,  1.5000, -1.5000])
    """

    @property
    def guarantee(self) -> Guarantee:
        """Relative: δ = 1 / numel, as derived here.

        For sums S, T and numbers n, m of the two groups, ‖x - C(x)‖² = ‖x‖² - S² / n - T² / m, and
        S² / n + T² / m ≥ (|S| + |T|)² / (n + m) = ‖x‖₁² / numel ≥ ‖x‖² / numel. So it never does worse than
        :class:`~thresher.compression.scaled_sign.ScaledSign`. It presumes that the means are no subnormal numbers.
        """
        return Guarantee(conserves=True, delta=lambda numel: 1 / max(1, numel))

    def compress(self, gradient: Tensor, round: Round = FIRST_ROUND) -> SparseGradient:
        """The means that stand for ``gradient``, [numel] float32.

        Raises:
            ConfigurationError: ``gradient`` is not a flat float32 vector.
            NonFiniteGradientError: NaN or infinity in it.
        """
        check_flat(gradient)
        check_finite(gradient)
        negative = gradient < 0
        low = _mean(gradient.clamp(max=0), int(negative.count_nonzero()))
        high = _mean(gradient.clamp(min=0), gradient.numel() - int(negative.count_nonzero()))
        return SparseGradient.dense(torch.where(negative, low, high).float())


def _mean(group: Tensor, count: int) -> Tensor:
    """The mean of a group's ``count`` members, where all others are zero; 0 for an empty group."""
    return group.sum(dtype=torch.float64) / max(1, count)
