"""The hard threshold: what is large enough is sent, whatever the others are."""

import math
from dataclasses import dataclass
from typing import final

import numpy as np
from torch import Tensor

from thresher.compression.base import FIRST_ROUND, Guarantee, Round, Sparsifier, check_flat
from thresher.compression.one_pass import correct, reaching
from thresher.protos.errors import ConfigurationError
from thresher.protos.sparse import SparseGradient

_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


@final
@dataclass(frozen=True, slots=True)
class HardThreshold(Sparsifier):
    """Keeps the coordinates with |x_j| ≥ threshold, equality included.

    Each coordinate is judged alone, so the result does not depend on how the vector is cut into layers or shards. How
    many are kept varies from step to step, and may be none.

    Args:
        threshold: λ ≥ 0, finite, in the unit of the gradient. 0 keeps every coordinate, zeros included. None takes the
            λ of the run from each :class:`~thresher.compression.base.Round`.

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

    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.threshold is not None:
            check_threshold(self.threshold)
            # describe() must not depend on who computed it: 1 is 1.0, and -0.0 is 0.0
            object.__setattr__(self, "threshold", float(self.threshold) + 0.0)

    @property
    def guarantee(self) -> Guarantee:
        """Absolute: a dropped coordinate is below λ, so κ = √numel · λ is never reached (arXiv:2108.00951, eq. 9).

        The λ of a run may change, so without one of its own no κ is known.
        """
        threshold = self.threshold
        kappa = None if threshold is None else lambda numel: math.sqrt(numel) * threshold
        return Guarantee(conserves=True, kappa=kappa)

    def describe(self) -> str:
        """Such as ``HardThreshold(0.01)``, or ``HardThreshold()`` where λ is the run's."""
        return f"HardThreshold({'' if self.threshold is None else repr(self.threshold)})"

    def threshold_in(self, round: Round) -> float:
        """The least float32 that reaches λ·scale in ``round``.

        Raises:
            ConfigurationError: neither this nor the round has a threshold, or the product is out of range.
        """
        threshold = self.threshold if self.threshold is not None else round.threshold
        if threshold is None:
            raise ConfigurationError("HardThreshold() takes the threshold of the run, and the run has none")
        check_threshold(threshold * round.scale)
        return _round_up(threshold * round.scale)

    def compress(self, gradient: Tensor, round: Round = FIRST_ROUND) -> SparseGradient:
        """The coordinates of ``gradient``, [numel] float32, that reach the threshold, untouched.

        Raises:
            ConfigurationError: ``gradient`` is not a flat float32 vector, or there is no threshold.
        """
        check_flat(gradient)
        threshold = self.threshold_in(round)
        if threshold == 0.0:
            return SparseGradient.dense(gradient.clone())
        indices, values = reaching(gradient, threshold)
        return SparseGradient(indices, values, gradient.numel())

    def compress_corrected(self, gradient: Tensor, residual: Tensor, round: Round = FIRST_ROUND) -> SparseGradient:
        """``compress(gradient + residual)``, with what is not sent left in ``residual``, in one pass over memory.

        Args:
            gradient: [numel] float32; it is only read.
            residual: [numel] float32 on the same device. Afterwards gradient + residual, with 0 where it was sent.
            round: what is in force.

        Raises:
            ConfigurationError: there is no threshold. Nothing has changed then.
        """
        threshold = self.threshold_in(round)
        if threshold == 0.0:
            everything = residual.add_(gradient).clone()
            residual.zero_()
            return SparseGradient.dense(everything)
        indices, values = correct(gradient, residual, threshold, out=residual)
        return SparseGradient(indices, values, gradient.numel())


def check_threshold(threshold: float) -> None:
    """Refuse what is no threshold.

    Raises:
        ConfigurationError: it is negative, infinite or NaN, or larger than any float32.
    """
    if not (math.isfinite(threshold) and 0.0 <= threshold <= _LARGEST_FLOAT32):
        raise ConfigurationError(f"threshold must be a finite number >= 0, not {threshold}")


def _round_up(threshold: float) -> float:
    """The least float32 that is not below ``threshold``: float32 numbers reach both or neither."""
    rounded = np.float32(threshold)
    if float(rounded) < threshold:
        rounded = np.nextafter(rounded, np.float32(np.inf))
    return float(rounded)
