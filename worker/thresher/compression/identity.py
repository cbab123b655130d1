"""No compression: the baseline every saving is measured against."""

from dataclasses import dataclass
from typing import final

from torch import Tensor

from thresher.compression.base import FIRST_ROUND, Guarantee, Round, Sparsifier, check_flat
from thresher.protos.sparse import SparseGradient


@final
@dataclass(frozen=True, slots=True)
class Identity(Sparsifier):
    """Keeps every coordinate. Baseline: the uncompressed run takes the same path as the compressed one.

    Examples:
        >>> import torch
        >>> Identity().compress(torch.tensor([0.0, -2.0])).densify()
        tensor([ 0., -2.])
    """

    @property
    def guarantee(self) -> Guarantee:
        """Nothing is lost: absolute with κ = 0, relative with δ = 1, unbiased with ω = 0."""
        return Guarantee(conserves=True, kappa=lambda _: 0.0, delta=lambda _: 1.0, omega=lambda _: 0.0)

    def compress(self, gradient: Tensor, round: Round = FIRST_ROUND) -> SparseGradient:
        """All of ``gradient``, [numel] float32, copied.

        Raises:
            ConfigurationError: ``gradient`` is not a flat float32 vector.
        """
        check_flat(gradient)
        return SparseGradient.dense(gradient.clone())
