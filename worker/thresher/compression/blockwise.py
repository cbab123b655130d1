"""Eight bits a value: blocks of a vector, each an int8 code per coordinate times a scale of its own."""

from dataclasses import dataclass
from typing import Final, final

import torch
import torch.nn.functional as F
from torch import Tensor

from thresher.compression.base import FIRST_ROUND, Guarantee, Quantizer, Round, check_finite, check_flat, check_whole
from thresher.protos.errors import NonFiniteGradientError
from thresher.protos.sparse import Levels, SparseGradient

MOST_LEVELS: Final = 127
"""The largest magnitude of an int8 code that has a negative."""


@final
@dataclass(frozen=True, slots=True)
class Blockwise8Bit(Quantizer):
    """Rounds each coordinate to the nearest of 255 evenly spaced values, from -max|x| to max|x| of its block.

    An outlier coarsens its own block only. Coordinates that round to zero are left out of the message.

    Args:
        block: how many neighbours share a scale, ≥ 1.

    Raises:
        ConfigurationError: ``block`` is no such number.

    References:
        Dettmers et al., "8-bit optimizers via block-wise quantization", arXiv:2110.02861, section 2.1; the even spacing
        is that of the linear type in arXiv:1511.04561.

    Examples:
        >>> Blockwise8Bit(block=2).compress(torch.tensor([127.0, 1.25, 0.0, 0.0])).densify()
        tensor([127.,   1.,   0.,   0.])
    """

    block: int = 256

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", check_whole("block", self.block, least=1))

    @property
    def guarantee(self) -> Guarantee:
        """Relative: δ = 1 / (1 + b / 254²) with b = min(block, numel), as derived here; not absolute.

        An error e is at most h = max|x| / 254, and at most |x| itself. So of a block's ‖x‖² ≥ max² + Σe², over all but
        the largest, at most Σe² ≤ (b - 1) h² is lost: a fraction r / (1 + r) with r = (b - 1) / 254². Counting the
        largest as well leaves room for float32's rounding, as long as the block's scale is no subnormal number.
        """
        return Guarantee(conserves=True, delta=lambda numel: 1 / (1 + min(self.block, numel) / (2 * MOST_LEVELS) ** 2))

    def compress(self, gradient: Tensor, round: Round = FIRST_ROUND) -> SparseGradient:
        """The nearest values to ``gradient``, [numel] float32, with their :class:`~thresher.protos.sparse.Levels`.

        Raises:
            ConfigurationError: ``gradient`` is not a flat float32 vector.
            NonFiniteGradientError: NaN or infinity in it, or a magnitude that rounds to more than float32 holds.
        """
        check_flat(gradient)
        check_finite(gradient)
        block = block_in(gradient, self.block)
        scales = block_scales(gradient, block, torch.inf, MOST_LEVELS)
        codes = (gradient.double() / steps_of(scales, gradient, block)).round_()
        return leveled(codes, scales, block)


def block_in(vector: Tensor, block: int | None) -> int:
    """The length of the blocks that ``vector`` is cut into, None being one for all of it; at least 1."""
    return max(1, vector.numel() if block is None else min(block, vector.numel()))


def block_scales(vector: Tensor, block: int, order: float, levels: int) -> Tensor:
    """The step of each block, norm / levels, [m] float32: rounded up, so that no coordinate has more than ``levels``.

    Args:
        vector: [numel] float32, finite.
        block: length of the blocks; the last one may be shorter.
        order: of the norm: 2, or infinity for the largest magnitude.
        levels: how many steps the norm has.

    Raises:
        NonFiniteGradientError: the norm of a block is beyond float32.
    """
    blocks = F.pad(vector, (0, -vector.numel() % block)).view(-1, block)
    exact = torch.linalg.vector_norm(blocks, ord=order, dim=1, dtype=torch.float64) / levels
    nearest = exact.float()
    scales = torch.where(nearest < exact, nearest.nextafter(nearest.new_tensor(torch.inf)), nearest)
    beyond = (scales * levels).isinf().nonzero().squeeze(1)
    if beyond.numel():
        raise NonFiniteGradientError(
            f"the norm of block {int(beyond[0])} ({block} coordinates each) is beyond float32: scale the loss down"
        )
    return scales


def steps_of(scales: Tensor, vector: Tensor, block: int) -> Tensor:
    """Each coordinate's step, [numel] float32; in a block of zeros, which has none, any will do."""
    steps = scales.masked_fill(scales == 0, 1.0)
    return steps.repeat_interleave(block)[: vector.numel()]


def leveled(codes: Tensor, scales: Tensor, block: int) -> SparseGradient:
    """The message with the values ``scale * code`` in float32, where the code is not zero.

    Args:
        codes: [numel], whole and in [-127, 127].
        scales: [m] float32, of the blocks.
        block: length of the blocks; the last one may be shorter.
    """
    codes = codes.to(torch.int8)
    indices = codes.nonzero().squeeze(1)
    chosen = codes[indices]
    owners = indices // block
    values = scales[owners] * chosen.float()
    counts = owners.bincount(minlength=scales.numel())
    used = counts > 0  # a block of a message has at least one value
    return SparseGradient(
        indices, values, codes.numel(), levels=Levels(chosen, scales[used], counts[used].cumsum(dim=0))
    )
