"""Strom's threshold quantisation: what is large enough is sent as plus or minus the threshold."""

from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from thresher.compression.base import FIRST_ROUND, Compressor, Guarantee, Round, check_finite, check_flat
from thresher.protos.errors import ConfigurationError
from thresher.protos.sparse import SparseGradient

_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


@final
@dataclass(frozen=True, slots=True)
class Strom(Compressor):
    """Sends ±threshold for each coordinate with |x_j| ≥ threshold, with the sign of x_j; the rest of it stays.

    A message is one number and the signed positions. A coordinate that is many times the threshold is sent in as many
    rounds, by error feedback, without which the rest would be lost.

    Args:
        threshold: τ > 0, finite, in the unit of the gradient.

    Raises:
        ConfigurationError: the threshold is not positive and finite.

    References:
        Strom, "Scalable distributed DNN training using commodity GPU cloud computing", Interspeech 2015,
        doi:10.21437/Interspeech.2015-354; equality is sent, as by the hard threshold of arXiv:2108.00951.

    Examples:
        >>> import torch
        >>> Strom(0.5).compress(torch.tensor([0.5, -0.25, -3.0])).densify()
        tensor([ 0.5000,  0.0000, -0.5000])
    """

    threshold: float

    def __post_init__(self) -> None:
        _sendable(self.threshold)
        object.__setattr__(self, "threshold", float(self.threshold))  # describe() must not depend on who computed it

    @property
    def guarantee(self) -> Guarantee:
        """Neither absolute nor relative: |x_j| - τ has no bound, and small vectors are not sent at all (baseline)."""
        return Guarantee(conserves=True)

    def compress(self, gradient: Tensor, round: Round = FIRST_ROUND) -> SparseGradient:
        """±τ·scale for each coordinate of ``gradient``, [numel] float32, that reaches it.

        Raises:
            ConfigurationError: ``gradient`` is not a flat float32 vector, or τ·scale is no positive float32.
            NonFiniteGradientError: ``gradient`` holds NaN or infinity.
        """
        check_flat(gradient)
        check_finite(gradient)
        threshold = _sendable(self.threshold * round.scale)
        indices = gradient.abs().ge(threshold).nonzero().squeeze(1)
        signs = gradient[indices]
        return SparseGradient(indices, torch.full_like(signs, threshold).copysign_(signs), gradient.numel())


def _sendable(threshold: float) -> float:
    """The float32 that is sent for ``threshold``, and that the gradient is compared with.

    Raises:
        ConfigurationError: that is zero, negative, infinite or NaN.
    """
    rounded = float(np.float32(threshold)) if 0.0 < threshold <= _LARGEST_FLOAT32 else 0.0
    if rounded == 0.0:
        raise ConfigurationError(f"threshold must be a finite float32 > 0, not {threshold}")
    return rounded
