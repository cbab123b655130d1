"""Scaled sign: one bit a coordinate, and their mean magnitude."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from thresher.compression.base import FIRST_ROUND, Guarantee, Quantizer, Round, check_finite, check_flat
from thresher.protos.sparse import SparseGradient


@final
@dataclass(frozen=True, slots=True)
class ScaledSign(Quantizer):
    """Sends (‖x‖₁ / numel) · sign(x_j) for every coordinate; the sign of zero is plus, as there is no third value.

    References:
        Karimireddy et al., "Error feedback fixes SignSGD and other gradient compression schemes", arXiv:1901.09847,
        Algorithm 1 (EF-signSGD).

    Examples:
        >>> ScaledSign().compress(torch.tensor([-3.0, 0.0, 1.5])).densify()
        tensor([-1.5000,  1.5000,  1.5000])
    """

    @property
    def guarantee(self) -> Guarantee:
        """Relative: ‖x - C(x)‖² = (1 - ‖x‖₁² / (d‖x‖₂²))‖x‖₂² for d = numel, and ‖x‖₁ ≥ ‖x‖₂, so δ = 1 / d.

        Lemma 8 of arXiv:1901.09847. A dense vector does far better than this, which is for a single coordinate that
        is not zero. It presumes that ‖x‖₁ / d is no subnormal number.
        """
        return Guarantee(conserves=True, delta=lambda numel: 1 / max(1, numel))

    def compress(self, gradient: Tensor, round: Round = FIRST_ROUND) -> SparseGradient:
        """The signs of ``gradient``, [numel] float32, times its mean magnitude.

        Raises:
            ConfigurationError: ``gradient`` is not a flat float32 vector.
            NonFiniteGradientError: NaN or infinity in it.
        """
        check_flat(gradient)
        check_finite(gradient)
        if not gradient.numel():
            return SparseGradient.empty(0)
        magnitude = torch.linalg.vector_norm(gradient, ord=1, dtype=torch.float64) / gradient.numel()
        return SparseGradient.dense(torch.where(gradient < 0, -magnitude, magnitude).float())
