"""Top-k: a fixed number of coordinates, the largest ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from thresher.compression.base import Guarantee, check_density, check_flat, kept
from thresher.protos.errors import ConfigurationError
from thresher.protos.sparse import SparseGradient


@final
@dataclass(frozen=True, slots=True)
class TopK:
    """Keeps exactly k coordinates of largest magnitude; of equal ones, those with the lowest index.

    Without ``sizes`` the whole vector is one piece (entire-model). With ``sizes`` each tensor is a piece of its own
    (layer-wise). A piece of d elements keeps k = max(1, ⌊density · d⌋).

    Args:
        density: wanted kept fraction, in (0, 1].
        sizes: number of elements of each tensor, in the order in which they make up the flat vector.

    Raises:
        ConfigurationError: the density is outside (0, 1], or a size is negative.

    References:
        Stich et al., "Sparsified SGD with memory", arXiv:1809.07599; layer-wise and entire-model as in the official
        code of arXiv:2108.00951.

    Examples:
        >>> gradient = torch.tensor([9.0, 8.0, 7.0, 1.0, 0.0, 0.0])
        >>> TopK(0.5).compress(gradient).indices
        tensor([0, 1, 2])
        >>> TopK(0.5, sizes=[3, 3]).compress(gradient).indices
        tensor([0, 3])
    """

    density: float
    sizes: Sequence[int] | None = None

    def __post_init__(self) -> None:
        check_density(self.density)
        object.__setattr__(self, "density", float(self.density))  # describe() must not depend on who computed it
        if self.sizes is not None:
            object.__setattr__(self, "sizes", tuple(int(size) for size in self.sizes))
            if min(self.sizes, default=0) < 0:
                raise ConfigurationError(f"sizes must not be negative, found {min(self.sizes)}")

    @property
    def guarantee(self) -> Guarantee:
        """Relative: δ = k / numel, layer-wise the smallest of the pieces (arXiv:2108.00951, after equation (7))."""
        return Guarantee(conserves=True, delta=self._delta)

    def describe(self) -> str:
        """Such as ``TopK(0.001)`` or ``TopK(0.001, sizes=(864, 32))``."""
        return f"TopK({self.density!r})" if self.sizes is None else f"TopK({self.density!r}, sizes={self.sizes!r})"

    def compress(self, gradient: Tensor) -> SparseGradient:
        """The largest coordinates of ``gradient``, [numel] float32, untouched.

        Raises:
            ConfigurationError: ``gradient`` is not a flat float32 vector, or the sizes don't add up to its length.
        """
        check_flat(gradient)
        begin, chosen = 0, []
        for size in self._pieces(gradient.numel()):
            chosen.append(_largest(gradient[begin : begin + size], kept(self.density, size)) + begin)
            begin += size
        indices = chosen[0] if len(chosen) == 1 else torch.cat(chosen)
        return SparseGradient(indices, gradient[indices], gradient.numel())

    def _pieces(self, numel: int) -> Sequence[int]:
        if self.sizes is not None and sum(self.sizes) != numel:
            raise ConfigurationError(f"the sizes of TopK add up to {sum(self.sizes)}, the gradient has numel {numel}")
        return self.sizes or (numel,)

    def _delta(self, numel: int) -> float:
        return min((kept(self.density, size) / size for size in self._pieces(numel) if size), default=1.0)


def _largest(piece: Tensor, k: int) -> Tensor:
    """Indices, [k] int64 ascending, of the k largest magnitudes in ``piece``; torch.topk leaves ties to chance."""
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=piece.device)
    magnitude = piece.abs()
    torch.nan_to_num_(magnitude, nan=torch.inf, posinf=torch.inf)
    least = magnitude.topk(k, sorted=False).values.min()
    chosen = magnitude > least
    ties = (magnitude == least).nonzero().squeeze(1)
    chosen[ties[: k - int(chosen.count_nonzero())]] = True
    return chosen.nonzero().squeeze(1)
