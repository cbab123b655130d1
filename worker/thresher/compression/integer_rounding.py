"""Integer rounding: multiples of one over a factor, which a switch or a server can add up as integers."""

import math
from dataclasses import dataclass
from typing import Final, final

from torch import Tensor

from thresher.compression.base import FIRST_ROUND, Guarantee, Quantizer, Round, check_finite, check_flat, check_whole
from thresher.compression.stochastic_rounding import check_step, nonzeros
from thresher.protos.errors import ConfigurationError
from thresher.protos.sparse import SparseGradient

_INT32_END: Final = 2**31


@final
@dataclass(frozen=True, slots=True)
class IntegerRounding(Quantizer):
    """Rounds each coordinate to the nearest q / factor, q an integer; of two equally near ones, the even q.

    Coordinates that round to zero are left out of the message. With a factor that is a power of two, sums of what was
    sent are those of the integers, in any order, as long as they stay below 2²⁴ in units of 1 / factor.

    Args:
        factor: f, how many steps make up one unit of the gradient, in [2⁻¹⁰², 2¹²⁶].
        workers: how many vectors are added up. Their sum must fit an int32 in units of 1 / factor, so a gradient with
            workers · f · max|x| ≥ 2³¹ is refused.

    Raises:
        ConfigurationError: a setting is out of its range.

    References:
        Sapio et al., "Scaling distributed machine learning with in-network aggregation" (SwitchML), arXiv:1903.06701.

    Examples:
        >>> import torch
        >>> IntegerRounding(4).compress(torch.tensor([0.3, 0.1, -1.0])).densify()
        tensor([ 0.2500,  0.0000, -1.0000])
    """

    factor: float
    workers: int = 1

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise ConfigurationError(f"factor must be a number above 0, not {self.factor}")
        check_step("1 / factor", 1 / self.factor)
        object.__setattr__(self, "factor", float(self.factor))  # describe() must not depend on who computed it
        object.__setattr__(self, "workers", check_whole("workers", self.workers, least=1))

    @property
    def guarantee(self) -> Guarantee:
        """Absolute: no error is above half a step, so κ = √numel / (2 f) (arXiv:2108.00951, absolute compressors).

        That is for an f that is a power of two. For another one float32 rounds q / f as well, by no more than the error
        so far, and κ = √numel / f is what holds for every vector.
        """
        mantissa, _ = math.frexp(self.factor)
        most = (0.5 if mantissa == 0.5 else 1.0) / self.factor
        return Guarantee(conserves=True, kappa=lambda numel: math.sqrt(numel) * most)

    def compress(self, gradient: Tensor, round: Round = FIRST_ROUND) -> SparseGradient:
        """The nearest multiples of scale / f to ``gradient``, [numel] float32, without the zeros.

        Raises:
            ConfigurationError: ``gradient`` is not a flat float32 vector, or it is too large for the factor.
            NonFiniteGradientError: NaN or infinity in it.
        """
        check_flat(gradient)
        check_finite(gradient)
        check_step("scale / factor", round.scale / self.factor)
        integers = (gradient.double() * self.factor / round.scale).round_()
        self._check_fits(integers)
        return nonzeros((integers * round.scale / self.factor).float())

    def _check_fits(self, integers: Tensor) -> None:
        most = float(integers.abs().max()) if integers.numel() else 0.0
        if self.workers * most >= _INT32_END:
            raise ConfigurationError(
                f"the largest coordinate is {most:.0f} steps of 1 / {self.factor}, and the sum of {self.workers} such "
                "vectors may not fit an int32: lower the factor"
            )
