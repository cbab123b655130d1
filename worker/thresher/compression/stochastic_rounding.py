"""Stochastic rounding: to one of the two neighbours on a grid, right on average."""

import math
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from thresher.compression.base import FIRST_ROUND, Guarantee, Quantizer, Round, check_finite, check_flat, check_whole
from thresher.protos.errors import ConfigurationError
from thresher.protos.seeded import key_of, uniforms
from thresher.protos.sparse import SparseGradient

# Where all multiples that are needed are normal float32 numbers or the coordinate itself, whatever the coordinate is.
_LEAST_STEP: Final = 2.0**-126
_MOST_STEP: Final = 2.0**102

# The last word of the key. A sparsifier of the same seed chooses coordinates without it: were the two to draw the same
# numbers, the rounding would depend on the choice, and on average it would not be right for what was chosen.
_ROUNDING: Final = 1

# A dozen temporary values for each coordinate: a piece at a time, they stay in the processor's cache.
_PIECE: Final = 2**15


@final
@dataclass(frozen=True, slots=True)
class StochasticRounding(Quantizer):
    """Rounds each coordinate up or down to a multiple of ``step_size``, up as likely as it is near to the upper one.

    Coordinates that round to zero are left out of the message. A coordinate too large for float32 to tell neighbouring
    multiples apart is a multiple already, and stays as it is.

    Draws are a function of ``seed``, the step, the tensor and the worker: independent among workers, so that the error
    of their mean shrinks with their number.

    Args:
        step_size: ε, the distance of the grid's points, in [2⁻¹²⁶, 2¹⁰²], in the unit of the gradient. A power of two
            (2^-FL for FL fractional bits) makes all multiples exact in float32.
        seed: chooses the draws; ≥ 0.

    Raises:
        ConfigurationError: a setting is out of its range.

    References:
        Gupta et al., "Deep learning with limited numerical precision", arXiv:1502.02551, section 3.1.

    Examples:
        >>> StochasticRounding(0.5).compress(torch.tensor([0.5, -1.0, 0.0])).densify()
        tensor([ 0.5000, -1.0000,  0.0000])
        >>> float(StochasticRounding(0.5).compress(torch.tensor([0.7])).values) in {0.5, 1.0}
        True
    """

    step_size: float
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "step_size", check_step("step_size", self.step_size))
        object.__setattr__(self, "seed", check_whole("seed", self.seed, least=0))

    @property
    def guarantee(self) -> Guarantee:
        """Absolute and unbiased: κ = √numel · ε (the examples of absolute compressors in arXiv:2108.00951).

        If ε is a power of two, each coordinate's error is below ε with certainty. Else float32 rounds the multiples as
        well, by less than ε, and each coordinate's error is below 2ε; its mean square is at most ε² either way.

        E C(x) = x to the resolution of the draws, 2⁻²⁴ of a step. There is no ω: the variance of a coordinate much
        smaller than ε is much larger than its square.
        """
        return Guarantee(conserves=True, kappa=lambda numel: math.sqrt(numel) * self.step_size)

    def compress(self, gradient: Tensor, round: Round = FIRST_ROUND) -> SparseGradient:
        """The multiples of ε·scale that ``gradient``, [numel] float32, was rounded to, without the zeros.

        Raises:
            ConfigurationError: ``gradient`` is not a flat float32 vector, or ε·scale is out of range.
            NonFiniteGradientError: NaN or infinity in it.
        """
        check_flat(gradient)
        check_finite(gradient)
        step = check_step("step_size times scale", self.step_size * round.scale)
        return nonzeros(rounded_at_random(gradient, step, draws_for(gradient, self.seed, round)))


def draws_for(vector: Tensor, seed: int, round: Round) -> Tensor:
    """A draw from [0, 1) for each coordinate of ``vector``, [numel] float32 on its device; others for other workers."""
    key = key_of(seed, round.step, round.tensor, _ROUNDING, round.worker)
    return torch.from_numpy(uniforms(key, vector.numel())).to(vector.device)


def rounded_at_random(vector: Tensor, step: float | Tensor, draws: Tensor) -> Tensor:
    """Multiples of ``step``, as float32 has them: those next to each coordinate, of which the draw takes one.

    The one of larger magnitude is taken with the probability that makes the mean, over all draws, the coordinate.

    Args:
        vector: [numel] float32, finite.
        step: > 0; one for all, or [numel] float32.
        draws: [numel] float32 from [0, 1).

    Returns:
        [numel] float32.
    """
    rounded = torch.empty_like(vector)
    for begin in range(0, vector.numel(), _PIECE):
        piece = slice(begin, begin + _PIECE)
        steps = step[piece].double() if isinstance(step, Tensor) else step
        rounded[piece] = _piece_rounded_at_random(vector[piece], steps, draws[piece])
    return rounded


def _piece_rounded_at_random(vector: Tensor, step: float | Tensor, draws: Tensor) -> Tensor:
    # In float64, as a float32 quotient could be rounded to the wrong side of a whole number.
    magnitude = vector.abs().double()
    below = (magnitude / step).floor_()
    low = (below * step).float()
    high = (below.add_(1) * step).float()
    # Not "draw < share", as there may be nothing to share: low = magnitude = high. The products are exact.
    up = draws.double() * (high.double() - low) < magnitude - low
    return torch.where(up, high, low).copysign_(vector)


def nonzeros(values: Tensor) -> SparseGradient:
    """The coordinates of ``values``, [numel] float32, that are not zero."""
    indices = values.nonzero().squeeze(1)
    return SparseGradient(indices, values[indices], values.numel())


def check_step(name: str, step: float) -> float:
    """Return ``step`` if it can be the distance of a grid's points.

    Raises:
        ConfigurationError: it is outside [2⁻¹²⁶, 2¹⁰²], or NaN.
    """
    if not _LEAST_STEP <= step <= _MOST_STEP:
        raise ConfigurationError(f"{name} must be a number from 2**-126 to 2**102, not {step}")
    return float(step)
