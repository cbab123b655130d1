"""Top-k: a fixed number of coordinates, the largest ones."""

from dataclasses import dataclass
from typing import final

from torch import Tensor

from thresher.compression.base import FIRST_ROUND, Guarantee, Round, Sparsifier, check_density, check_flat, kept
from thresher.compression.largest import largest
from thresher.protos.sparse import SparseGradient


@final
@dataclass(frozen=True, slots=True)
class TopK(Sparsifier):
    """Keeps exactly k = max(1, ⌊density · numel⌋) coordinates of largest magnitude; of equal ones, the first.

    On a whole model it is the entire-model form, in :class:`~thresher.compression.layer_wise.LayerWise` the layer-wise
    one.

    Args:
        density: wanted kept fraction, in (0, 1].

    Raises:
        ConfigurationError: the density is outside (0, 1].

    References:
        Stich et al., "Sparsified SGD with memory", arXiv:1809.07599; layer-wise and entire-model as in the official
        code of arXiv:2108.00951.

    Examples:
        >>> import torch
        >>> TopK(0.5).compress(torch.tensor([9.0, 8.0, 7.0, 1.0, 0.0, 0.0])).indices
        tensor([0, 1, 2])
    """

    density: float

    def __post_init__(self) -> None:
        check_density(self.density)
        object.__setattr__(self, "density", float(self.density))  # describe() must not depend on who computed it

    @property
    def guarantee(self) -> Guarantee:
        """Relative: δ = k / numel (arXiv:2108.00951, after equation (7))."""
        return Guarantee(conserves=True, delta=lambda numel: kept(self.density, numel) / numel if numel else 1.0)

    def compress(self, gradient: Tensor, round: Round = FIRST_ROUND) -> SparseGradient:
        """The largest coordinates of ``gradient``, [numel] float32, untouched.

        Raises:
            ConfigurationError: ``gradient`` is not a flat float32 vector.
        """
        check_flat(gradient)
        indices, values = largest(gradient, kept(self.density, gradient.numel()))
        return SparseGradient(indices, values, gradient.numel())
