"""The hard threshold: what is large enough is sent, whatever the others are."""

import math
from dataclasses import dataclass, field
from typing import final

import numpy as np
from torch import Tensor

from thresher.compression.base import Guarantee, check_flat
from thresher.protos.errors import ConfigurationError
from thresher.protos.sparse import SparseGradient

_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


@final
@dataclass(frozen=True, slots=True)
class HardThreshold:
    """Keeps the coordinates with |x_j| ≥ threshold, equality included.

    Each coordinate is judged alone, so the result does not depend on how the vector is cut into layers or shards. How
    many are kept varies from step to step, and may be none.

    Args:
        threshold: λ ≥ 0, finite, in the unit of the gradient. 0 keeps every coordinate, zeros included.

    Raises:
        ConfigurationError: the threshold is negative, infinite or NaN, or larger than any float32.

    References:
        Sahu et al., "Rethinking gradient sparsification as total error minimization", arXiv:2108.00951.

    Examples:
        >>> import torch
        >>> sent = HardThreshold(0.5).compress(torch.tensor([0.5, -0.49, -3.0]))
        >>> sent.indices, sent.values
        (tensor([0, 2]), tensor([ 0.5000, -3.0000]))
    """

    threshold: float
    _float32_threshold: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.threshold) and 0.0 <= self.threshold <= _LARGEST_FLOAT32):
            raise ConfigurationError(f"threshold must be a finite number >= 0, not {self.threshold}")
        object.__setattr__(self, "threshold", float(self.threshold))  # describe() must not depend on who computed it
        object.__setattr__(self, "_float32_threshold", _round_up(self.threshold))

    @property
    def guarantee(self) -> Guarantee:
        """Absolute: a dropped coordinate is below λ, so κ = √numel · λ is never reached (arXiv:2108.00951, eq. 9)."""
        return Guarantee(conserves=True, kappa=lambda numel: math.sqrt(numel) * self.threshold)

    def describe(self) -> str:
        """Such as ``HardThreshold(0.01)``."""
        return f"HardThreshold({self.threshold!r})"

    def compress(self, gradient: Tensor) -> SparseGradient:
        """The coordinates of ``gradient``, [numel] float32, that reach the threshold, untouched.

        Raises:
            ConfigurationError: ``gradient`` is not a flat float32 vector.
        """
        check_flat(gradient)
        if self.threshold == 0.0:
            return SparseGradient.dense(gradient.clone())
        # Not "at least" but "not below": the same for numbers, and NaN is kept and seen.
        indices = gradient.abs().lt(self._float32_threshold).logical_not_().nonzero().squeeze(1)
        return SparseGradient(indices, gradient[indices], gradient.numel())


def _round_up(threshold: float) -> float:
    """The least float32 that is not below ``threshold``: float32 numbers reach both or neither."""
    rounded = np.float32(threshold)
    if float(rounded) < threshold:
        rounded = np.nextafter(rounded, np.float32(np.inf))
    return float(rounded)
