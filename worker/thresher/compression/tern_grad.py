"""TernGrad: each coordinate becomes minus the largest magnitude, zero or plus the largest magnitude."""

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from thresher.compression.base import FIRST_ROUND, Guarantee, Quantizer, Round, check_finite, check_flat, check_whole
from thresher.compression.stochastic_rounding import draws_for, nonzeros, rounded_at_random
from thresher.protos.errors import ConfigurationError
from thresher.protos.sparse import SparseGradient


@final
@dataclass(frozen=True, slots=True)
class TernGrad(Quantizer):
    """Clips the vector, and sends sign(x_j) · s with probability |x_j| / s, where s is the largest magnitude then.

    Zeros are left out of the message, and what remains takes one bit a value on the wire. Workers draw
    independently.

    Args:
        clip: clips at this many standard deviations, > 0; None: no clipping. They are taken about zero, as root mean
            squares: the same for the Gaussians of mean zero that the paper takes gradients for. About the mean,
            coordinates that are all alike would have no deviation and be clipped away.
        seed: chooses the draws; ≥ 0.

    Raises:
        ConfigurationError: a setting is out of its range.

    References:
        Wen et al., "TernGrad: ternary gradients to reduce communication in distributed deep learning",
        arXiv:1705.07878: Algorithm 1 and gradient clipping.

    Examples:
        >>> TernGrad(clip=None).compress(torch.tensor([-2.0, 0.0, 2.0])).values
        tensor([-2.,  2.])
    """

    clip: float | None = 2.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.clip is not None:
            if not (self.clip > 0 and math.isfinite(self.clip)):
                raise ConfigurationError(f"clip must be a finite number above 0, or None, not {self.clip}")
            object.__setattr__(self, "clip", float(self.clip))  # describe() must not depend on who computed it
        object.__setattr__(self, "seed", check_whole("seed", self.seed, least=0))

    @property
    def guarantee(self) -> Guarantee:
        """Without clipping unbiased, ω = (√numel - 1) / 2; with it, what is clipped off makes it biased: no bound.

        Derived here: E‖x - C(x)‖² = s‖x‖₁ - ‖x‖². For s = 1 the worst vector has one coordinate 1 and all others t, and
        (1 + (d - 1) t) / (1 + (d - 1) t²) is largest, (1 + √d) / 2, at t = 1 / (1 + √d). E C(x) = x to the resolution
        of the draws, 2⁻²⁴ · s.
        """
        omega = None if self.clip is not None else lambda numel: max(0.0, (math.sqrt(numel) - 1) / 2)
        return Guarantee(conserves=True, omega=omega)

    def compress(self, gradient: Tensor, round: Round = FIRST_ROUND) -> SparseGradient:
        """Values of one magnitude for ``gradient``, [numel] float32, without the zeros.

        Raises:
            ConfigurationError: ``gradient`` is not a flat float32 vector.
            NonFiniteGradientError: NaN or infinity in it.
        """
        check_flat(gradient)
        check_finite(gradient)
        clipped = gradient if self.clip is None else _clipped(gradient, self.clip)
        largest = float(clipped.abs().max()) if clipped.numel() else 0.0
        if largest == 0.0:
            return nonzeros(torch.zeros_like(gradient))
        return nonzeros(rounded_at_random(clipped, largest, draws_for(clipped, self.seed, round)))


def _clipped(vector: Tensor, deviations: float) -> Tensor:
    if not vector.numel():
        return vector
    norm = float(torch.linalg.vector_norm(vector, dtype=torch.float64))
    limit = deviations * norm / math.sqrt(vector.numel())
    return vector.clamp(-limit, limit)
