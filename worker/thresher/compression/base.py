"""The contract of a compressor."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor

from thresher.protos.errors import ConfigurationError, NonFiniteGradientError
from thresher.protos.sparse import SparseGradient


@final
@dataclass(frozen=True, slots=True)
class Guarantee:
    """What a compressor C promises, in its own word; its tests hold it to that.

    Args:
        conserves: under error feedback, everything sent plus the residual is everything put in.
        kappa: for an absolute compressor, numel → κ, in the unit of the gradient, with ‖x - C(x)‖² ≤ κ² for every x.
            None: not absolute.
        delta: for a relative one (a δ-contraction), numel → δ in (0, 1] with ‖x - C(x)‖² ≤ (1 - δ)‖x‖² for every x.
            None: not relative.

    References:
        Sahu et al., "Rethinking gradient sparsification as total error minimization", arXiv:2108.00951, equations (7)
        and (9).
    """

    conserves: bool
    kappa: Callable[[int], float] | None = None
    delta: Callable[[int], float] | None = None


class Compressor(Protocol):
    """Shrinks a gradient to the few coordinates that are sent.

    Laws: the input is not modified and the output shares no memory with it; equal inputs give equal outputs; a
    sparsifier leaves the values it keeps as they are. A coordinate that is NaN or infinite is kept, so that it is seen
    and never lost: :class:`~thresher.compression.error_feedback.ErrorFeedback` refuses it.
    """

    @property
    def guarantee(self) -> Guarantee:
        """What holds for every input."""
        ...

    def describe(self) -> str:
        """The method and its settings, such as ``HardThreshold(0.01)``: equal text means equal behaviour."""
        ...

    def compress(self, gradient: Tensor) -> SparseGradient:
        """Choose what is sent of ``gradient``, [numel] float32.

        Raises:
            ConfigurationError: ``gradient`` is not a flat float32 vector, or not one this compressor was made for.
        """
        ...


def check_flat(vector: Tensor) -> None:
    """Refuse anything but a [numel] float32 tensor.

    Raises:
        ConfigurationError: another shape or dtype.
    """
    if vector.ndim != 1 or vector.dtype != torch.float32:
        raise ConfigurationError(
            f"a gradient must be a one-dimensional float32 tensor, not {vector.dtype} of shape {tuple(vector.shape)}"
        )


def check_finite(vector: Tensor) -> None:
    """Refuse NaN and infinity in ``vector``, [numel] float32.

    Raises:
        NonFiniteGradientError: names the first bad index, its value, and how many there are.
    """
    # NaN and infinity survive any summation, and a sum is twenty times faster than isfinite(). A sum of finite numbers
    # may overflow, so it can acquit and not convict.
    if bool(vector.sum().isfinite()):
        return
    bad = vector.isfinite().logical_not_().nonzero().squeeze(1)
    if bad.numel():
        first = int(bad[0])
        raise NonFiniteGradientError(
            f"gradient has {bad.numel()} non-finite of {vector.numel()} elements, the first is "
            f"{float(vector[first])} at index {first}"
        )


def check_density(density: float) -> None:
    """Refuse a density outside (0, 1].

    Raises:
        ConfigurationError: it is outside, or NaN.
    """
    if not 0.0 < density <= 1.0:
        raise ConfigurationError(f"density must be in (0, 1], not {density}")


def kept(density: float, numel: int) -> int:
    """How many of ``numel`` coordinates a ``density`` stands for: max(1, ⌊density · numel⌋), and none of none.

    References:
        arXiv:2108.00951, the official code's rule for Top-k.

    Examples:
        >>> kept(0.01, 1050), kept(0.01, 7), kept(0.01, 0)
        (10, 1, 0)
    """
    return min(numel, max(1, int(density * numel)))
