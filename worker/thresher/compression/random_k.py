"""Random-k: a fixed number of coordinates, drawn by a key that all workers share."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from thresher.compression.base import (
    FIRST_ROUND,
    Compressor,
    Guarantee,
    Round,
    Sparsifier,
    check_density,
    check_finite,
    check_flat,
    kept,
)
from thresher.protos.errors import ConfigurationError
from thresher.protos.seeded import key_of, seeded_indices
from thresher.protos.sparse import Seeded, SparseGradient


@final
@dataclass(frozen=True, slots=True)
class RandomK(Sparsifier):
    """Keeps k = max(1, ⌊density · numel⌋) coordinates, each set of that size equally likely; values untouched.

    The set follows from (seed, step, tensor) alone: all workers choose the same one, the message of the mean is the
    mean of the messages, and no indices travel. It is biased, a contraction, and so made for error feedback; what is
    made for unbiased messages takes :class:`UnbiasedRandomK`.

    A coordinate that is not drawn can't be kept for being NaN or infinite, so such a gradient is refused.

    Args:
        density: kept fraction, in (0, 1].
        seed: of the draws, equal on all workers; ≥ 0.

    Raises:
        ConfigurationError: the density is outside (0, 1], or the seed is no whole number ≥ 0.

    References:
        Stich et al., "Sparsified SGD with memory", arXiv:1809.07599.

    Examples:
        >>> import torch
        >>> one, other = (RandomK(0.5).compress(torch.full((4,), value)) for value in (1.0, 2.0))
        >>> one.count, bool((one.indices == other.indices).all())
        (2, True)
    """

    density: float
    seed: int = 0

    def __post_init__(self) -> None:
        check_density(self.density)
        check_seed(self.seed)
        object.__setattr__(self, "density", float(self.density))  # describe() must not depend on who computed it

    @property
    def guarantee(self) -> Guarantee:
        """Relative, in expectation and with equality: δ = k / numel (arXiv:1809.07599)."""
        return Guarantee(conserves=True, delta=lambda numel: kept(self.density, numel) / numel if numel else 1.0)

    def compress(self, gradient: Tensor, round: Round = FIRST_ROUND) -> SparseGradient:
        """The coordinates of ``gradient``, [numel] float32, that the round's key draws, untouched.

        Raises:
            ConfigurationError: ``gradient`` is not a flat float32 vector.
            NonFiniteGradientError: it holds NaN or infinity.
        """
        check_flat(gradient)
        check_finite(gradient)
        numel, k, key = gradient.numel(), kept(self.density, gradient.numel()), key_of_round(self.seed, round)
        indices = torch.from_numpy(seeded_indices(numel, k, key)).to(gradient.device)
        return SparseGradient(indices, gradient[indices], numel, seeds=(Seeded(0, numel, k, key),))


@final
@dataclass(frozen=True, slots=True)
class UnbiasedRandomK(Compressor):
    """The coordinates of :class:`RandomK`, times numel / k: in expectation the gradient itself.

    For what needs unbiased messages. Under error feedback take :class:`RandomK`: what is scaled up is sent too large,
    and for densities below 1/2 the residual grows without bound.

    Args:
        density: kept fraction, in (0, 1].
        seed: of the draws, equal on all workers; ≥ 0.

    Raises:
        ConfigurationError: the density is outside (0, 1], or the seed is no whole number ≥ 0.

    References:
        Wangni et al., "Gradient sparsification for communication-efficient distributed optimization",
        arXiv:1710.09854, with equal probabilities; ω as in Horváth and Richtárik, arXiv:2006.11077.

    Examples:
        >>> import torch
        >>> UnbiasedRandomK(0.25).compress(torch.ones(8)).values
        tensor([4., 4.])
    """

    density: float
    seed: int = 0

    def __post_init__(self) -> None:
        check_density(self.density)
        check_seed(self.seed)
        object.__setattr__(self, "density", float(self.density))  # describe() must not depend on who computed it

    @property
    def guarantee(self) -> Guarantee:
        """Unbiased, with equality: ω = numel / k - 1 (arXiv:2006.11077, on Rand-K)."""
        return Guarantee(conserves=True, omega=lambda numel: numel / kept(self.density, numel) - 1 if numel else 0.0)

    def compress(self, gradient: Tensor, round: Round = FIRST_ROUND) -> SparseGradient:
        """The coordinates of ``gradient``, [numel] float32, that the round's key draws, times numel / k.

        Raises:
            ConfigurationError: ``gradient`` is not a flat float32 vector.
            NonFiniteGradientError: it holds NaN or infinity, or would when scaled up.
        """
        drawn = RandomK(self.density, self.seed).compress(gradient, round)
        if drawn.count == 0:
            return drawn
        values = drawn.values * (drawn.numel / drawn.count)
        check_finite(values)
        return SparseGradient(drawn.indices, values, drawn.numel, seeds=drawn.seeds)


def key_of_round(seed: int, round: Round) -> int:
    """The key of the draws of ``round``: equal on all workers, another one for each step and tensor."""
    return key_of(seed, round.step, round.tensor)


def check_seed(seed: object) -> None:
    """Refuse what is no seed.

    Raises:
        ConfigurationError: it is no whole number, negative, or has more than 64 bits.
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 1 << 64:
        raise ConfigurationError(f"seed must be a whole number from 0 to 2**64 - 1, not {seed!r}")
