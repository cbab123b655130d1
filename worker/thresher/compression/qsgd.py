"""QSGD: levels of the norm, drawn so that they are right on average."""

import math
from dataclasses import dataclass
from typing import final

from torch import Tensor

from thresher.compression.base import FIRST_ROUND, Guarantee, Quantizer, Round, check_finite, check_flat, check_whole
from thresher.compression.blockwise import MOST_LEVELS, block_in, block_scales, leveled, steps_of
from thresher.compression.stochastic_rounding import draws_for, rounded_at_random
from thresher.protos.sparse import SparseGradient


@final
@dataclass(frozen=True, slots=True)
class QSGD(Quantizer):
    """Rounds each |x_j| to a whole number of steps of ‖x‖₂ / levels, up as likely as it is near to the upper one.

    Coordinates of level zero are left out of the message: of d equal ones, about √d · levels remain when that is less.
    Eight bits a value travel, and the norm. Workers draw independently.

    Args:
        levels: s, in 1 … 127.
        seed: chooses the draws; ≥ 0.
        bucket: how many neighbours share a norm, ≥ 1; the paper's experiments take 512. None: the whole vector does,
            and the error grows with √numel.

    Raises:
        ConfigurationError: a setting is out of its range.

    References:
        Alistarh et al., "QSGD: communication-efficient SGD via gradient quantization and encoding", arXiv:1610.02132,
        section 3.1, and section 4 for buckets.

    Examples:
        >>> import torch
        >>> sent = QSGD(levels=5).compress(torch.tensor([3.0, 0.0, -4.0]))
        >>> sent.levels.codes, sent.levels.scales
        (tensor([ 3, -4], dtype=torch.int8), tensor([1.]))
    """

    levels: int = MOST_LEVELS
    seed: int = 0
    bucket: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", check_whole("levels", self.levels, least=1, most=MOST_LEVELS))
        object.__setattr__(self, "seed", check_whole("seed", self.seed, least=0))
        if self.bucket is not None:
            object.__setattr__(self, "bucket", check_whole("bucket", self.bucket, least=1))

    @property
    def guarantee(self) -> Guarantee:
        """Unbiased: ω = min(b / s², √b / s) with b the length of a bucket (arXiv:1610.02132, Lemma 3.1).

        E C(x) = x to the resolution of the draws, 2⁻²⁴ of a step. Where ω < 1 for a full bucket, the same bound makes
        it relative, δ = 1 - ω.
        """
        relative = self.bucket is not None and self._omega(self.bucket) < 1
        return Guarantee(
            conserves=True, omega=self._omega, delta=(lambda numel: 1 - self._omega(numel)) if relative else None
        )

    def _omega(self, numel: int) -> float:
        length = numel if self.bucket is None else min(self.bucket, numel)
        return min(length / self.levels**2, math.sqrt(length) / self.levels)

    def compress(self, gradient: Tensor, round: Round = FIRST_ROUND) -> SparseGradient:
        """Levels of ``gradient``, [numel] float32, with their :class:`~thresher.protos.sparse.Levels`.

        Raises:
            ConfigurationError: ``gradient`` is not a flat float32 vector.
            NonFiniteGradientError: NaN or infinity in it, or a norm that is beyond float32.
        """
        check_flat(gradient)
        check_finite(gradient)
        bucket = block_in(gradient, self.bucket)
        scales = block_scales(gradient, bucket, 2, self.levels)
        steps = steps_of(scales, gradient, bucket)
        rounded = rounded_at_random(gradient, steps, draws_for(gradient, self.seed, round))
        return leveled(rounded.div_(steps).round_(), scales, bucket)
