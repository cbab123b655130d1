"""Shorter floating-point numbers: sixteen bits a value."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from thresher.compression.base import FIRST_ROUND, Guarantee, Quantizer, Round, check_finite, check_flat
from thresher.protos.sparse import SparseGradient


@final
@dataclass(frozen=True, slots=True)
class BFloat16(Quantizer):
    """Rounds each coordinate to the nearest bfloat16, ties to even: the range of float32, eight significant bits.

    The few float32 numbers above the largest bfloat16, 3.39e38, become that one and not infinity.

    References:
        Kalamkar et al., "A study of BFLOAT16 for deep learning training", arXiv:1905.12322.

    Examples:
        >>> BFloat16().compress(torch.tensor([1.0, 1.001])).densify()
        tensor([1., 1.])
    """

    @property
    def guarantee(self) -> Guarantee:
        """Relative: an error is at most 2⁻⁸|x_j|, so δ = 1 - 2⁻¹⁶ (rounding to nearest with eight significant bits).

        That is for zero and normal numbers. A coordinate below 2⁻¹²⁶ in magnitude can lose up to 2⁻¹³⁴, and so all of
        itself.
        """
        return Guarantee(conserves=True, delta=lambda _: 1 - 2.0**-16)

    def compress(self, gradient: Tensor, round: Round = FIRST_ROUND) -> SparseGradient:
        """All of ``gradient``, [numel] float32, rounded.

        Raises:
            ConfigurationError: ``gradient`` is not a flat float32 vector.
            NonFiniteGradientError: NaN or infinity in it.
        """
        return _rounded(gradient, torch.bfloat16)


@final
@dataclass(frozen=True, slots=True)
class Float16(Quantizer):
    """Rounds each coordinate to the nearest IEEE binary16, ties to even: eleven significant bits, up to 65504.

    A larger coordinate becomes 65504 and not infinity: under error feedback the rest of it is sent later.

    References:
        Micikevicius et al., "Mixed precision training", arXiv:1710.03740.

    Examples:
        >>> Float16().compress(torch.tensor([1.0, -1e6, 1e-9])).densify()
        tensor([ 1.0000e+00, -6.5504e+04,  0.0000e+00])
    """

    @property
    def guarantee(self) -> Guarantee:
        """It conserves, and has no bound for every vector: not absolute above 65504, not relative below 2⁻¹⁴.

        In between, an error is at most 2⁻¹¹|x_j| (rounding to nearest with eleven significant bits), and at most 2⁻²⁵
        for a smaller coordinate.
        """
        return Guarantee(conserves=True)

    def compress(self, gradient: Tensor, round: Round = FIRST_ROUND) -> SparseGradient:
        """All of ``gradient``, [numel] float32, rounded.

        Raises:
            ConfigurationError: ``gradient`` is not a flat float32 vector.
            NonFiniteGradientError: NaN or infinity in it.
        """
        return _rounded(gradient, torch.float16)


def _rounded(gradient: Tensor, dtype: torch.dtype) -> SparseGradient:
    check_flat(gradient)
    check_finite(gradient)
    largest = torch.finfo(dtype).max
    return SparseGradient.dense(gradient.clamp(-largest, largest).to(dtype).float())
