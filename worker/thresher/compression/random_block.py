"""Random blocks: runs of neighbours, drawn by a key that all workers share."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from thresher.compression.base import (
    FIRST_ROUND,
    Guarantee,
    Round,
    Sparsifier,
    check_density,
    check_finite,
    check_flat,
    kept,
)
from thresher.compression.random_k import check_seed, key_of_round
from thresher.protos.errors import ConfigurationError
from thresher.protos.seeded import seeded_indices
from thresher.protos.sparse import SparseGradient


@final
@dataclass(frozen=True, slots=True)
class RandomBlock(Sparsifier):
    """Keeps one run of b = max(1, ⌊density · numel⌋) neighbours from a random start, around the end; values untouched.

    The start is uniform over all numel coordinates and follows from (seed, step, tensor) alone: all workers choose the
    same block, so the message of the mean is the mean of the messages. In
    :class:`~thresher.compression.layer_wise.LayerWise` it is a block of each tensor, as in DEF. Nothing is scaled up.

    A coordinate outside the block can't be kept for being NaN or infinite, so such a gradient is refused.

    Args:
        density: kept fraction, in (0, 1].
        seed: of the draws, equal on all workers; ≥ 0.

    Raises:
        ConfigurationError: the density is outside (0, 1], or the seed is no whole number ≥ 0.

    References:
        Xu and Huang, "Detached error feedback for distributed SGD with random sparsification", arXiv:2004.05298, and
        its official code; the random block reduction of Vogels et al., arXiv:1905.13727.

    Examples:
        >>> import torch
        >>> sent = RandomBlock(0.25).compress(torch.arange(8.0))
        >>> sent.count, int(sent.indices[1] - sent.indices[0]) in {1, 7}
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
        """Relative, in expectation and with equality: δ = b / numel (arXiv:2004.05298)."""
        return Guarantee(conserves=True, delta=lambda numel: kept(self.density, numel) / numel if numel else 1.0)

    def compress(self, gradient: Tensor, round: Round = FIRST_ROUND) -> SparseGradient:
        """The block of ``gradient``, [numel] float32, that the round's key draws, untouched.

        Raises:
            ConfigurationError: ``gradient`` is not a flat float32 vector.
            NonFiniteGradientError: it holds NaN or infinity.
        """
        check_flat(gradient)
        check_finite(gradient)
        numel = gradient.numel()
        length = kept(self.density, numel)
        if length == numel:
            return SparseGradient.dense(gradient.clone())
        begin = int(seeded_indices(numel, 1, key_of_round(self.seed, round))[0])
        # The block around the end: first its part at the beginning of the vector, if any, since indices ascend.
        wrapped = max(0, begin + length - numel)
        indices = torch.cat(
            [
                torch.arange(wrapped, device=gradient.device),
                torch.arange(begin, begin + length - wrapped, device=gradient.device),
            ]
        )
        return SparseGradient(indices, gradient[indices], numel)


@final
@dataclass(frozen=True, slots=True)
class RandomBlocks(Sparsifier):
    """Cuts the vector into nearly equal blocks and keeps max(1, ⌊density · blocks⌋) of them; values untouched.

    Block i is [⌊i · numel / blocks⌋, ⌊(i + 1) · numel / blocks⌋); shorter vectors are cut into single coordinates. Each
    set of blocks is equally likely and follows from (seed, step, tensor) alone: all workers choose the same, so the
    message of the mean is the mean of the messages. Nothing is scaled up.

    A coordinate outside the blocks can't be kept for being NaN or infinite, so such a gradient is refused.

    Args:
        density: kept fraction, in (0, 1].
        blocks: into how many the vector is cut, ≥ 1.
        seed: of the draws, equal on all workers; ≥ 0.

    Raises:
        ConfigurationError: the density is outside (0, 1], there is no block, or the seed is no whole number ≥ 0.

    References:
        The globally randomised blockwise sparsifier of Xie et al., "CSER: communication-efficient SGD with error
        reset", arXiv:2007.13221; 1024 blocks as in the official code of arXiv:2004.05298.

    Examples:
        >>> import torch
        >>> RandomBlocks(0.5, blocks=4).compress(torch.arange(8.0)).count
        4
    """

    density: float
    blocks: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        check_density(self.density)
        check_seed(self.seed)
        _check_blocks(self.blocks)
        object.__setattr__(self, "density", float(self.density))  # describe() must not depend on who computed it

    @property
    def guarantee(self) -> Guarantee:
        """Relative, in expectation and with equality: δ is the fraction of the blocks that is kept (arXiv:2007.13221).

        Each block is kept with the same probability, however long it is.
        """
        return Guarantee(conserves=True, delta=self._kept_fraction)

    def compress(self, gradient: Tensor, round: Round = FIRST_ROUND) -> SparseGradient:
        """The blocks of ``gradient``, [numel] float32, that the round's key draws, untouched.

        Raises:
            ConfigurationError: ``gradient`` is not a flat float32 vector.
            NonFiniteGradientError: it holds NaN or infinity.
        """
        check_flat(gradient)
        check_finite(gradient)
        numel = gradient.numel()
        blocks = min(self.blocks, numel)
        count = kept(self.density, blocks)
        if count == blocks:
            return SparseGradient.dense(gradient.clone())
        chosen = torch.from_numpy(seeded_indices(blocks, count, key_of_round(self.seed, round)))
        begins, ends = chosen * numel // blocks, (chosen + 1) * numel // blocks
        indices = _ranges(begins.to(gradient.device), ends.to(gradient.device))
        return SparseGradient(indices, gradient[indices], numel)

    def _kept_fraction(self, numel: int) -> float:
        blocks = min(self.blocks, numel)
        return kept(self.density, blocks) / blocks if blocks else 1.0


def _check_blocks(blocks: object) -> None:
    if not isinstance(blocks, int) or isinstance(blocks, bool) or blocks < 1:
        raise ConfigurationError(f"blocks must be a whole number >= 1, not {blocks!r}")


def _ranges(begins: Tensor, ends: Tensor) -> Tensor:
    """begins[0] … ends[0] - 1, begins[1] … ends[1] - 1, …: [Σ lengths] int64."""
    lengths = ends - begins
    shifts = begins - (lengths.cumsum(0) - lengths)
    return torch.arange(int(lengths.sum()), device=begins.device) + shifts.repeat_interleave(lengths)
