"""The one value that travels: a few coordinates of a flat vector and what they hold."""

from dataclasses import dataclass
from typing import Self, final
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from thresher.protos.errors import ConfigurationError

# Eight bytes per element would triple the memory of a dense gradient, so all dense gradients of one size that are alive
# at one time share their indices; the last one to go frees them.
_DENSE_INDICES: WeakValueDictionary[tuple[int, torch.device], Tensor] = WeakValueDictionary()


@final
@dataclass(frozen=True, eq=False, slots=True)
class SparseGradient:
    """Some coordinates of a flat float32 vector; the others are zero.

    A value: nobody writes to its tensors, which may be views of, or shared with, those of other values.
    Shapes, dtypes and lengths are checked when it is made; the order of the indices by :meth:`validate`.

    Args:
        indices: [k] int64, strictly increasing, each in ``[0, numel)``.
        values: [k] float32, on the same device as ``indices``.
        numel: the length of the vector.

    Raises:
        ConfigurationError: a shape, a dtype, a device or a length does not fit.

    Examples:
        >>> sparse = SparseGradient(torch.tensor([1, 3]), torch.tensor([0.5, -2.0]), numel=4)
        >>> sparse.count, sparse.density
        (2, 0.5)
        >>> sparse.densify()
        tensor([ 0.0000,  0.5000,  0.0000, -2.0000])
    """

    indices: Tensor  # [k] int64
    values: Tensor  # [k] float32
    numel: int

    def __post_init__(self) -> None:
        _check_block("indices", self.indices, torch.int64)
        _check_block("values", self.values, torch.float32)
        if self.indices.device != self.values.device:
            raise ConfigurationError(f"indices are on {self.indices.device}, values on {self.values.device}")
        if self.indices.numel() != self.values.numel():
            raise ConfigurationError(f"{self.indices.numel()} indices for {self.values.numel()} values")
        if self.count > self.numel:
            raise ConfigurationError(f"{self.count} coordinates in a vector of numel {self.numel}")

    @classmethod
    def dense(cls, values: Tensor) -> Self:
        """Every coordinate of ``values``, [numel] float32, which is kept and not copied."""
        _check_block("values", values, torch.float32)
        return cls(_every_index(values.numel(), values.device), values, values.numel())

    @classmethod
    def empty(cls, numel: int) -> Self:
        """No coordinate of a vector of length ``numel``: all of it is zero."""
        return cls(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float32), numel)

    @property
    def count(self) -> int:
        """Number of coordinates kept, k."""
        return self.values.numel()

    @property
    def density(self) -> float:
        """Kept fraction, count / numel, in [0, 1]; 0 for an empty vector."""
        return self.count / self.numel if self.numel else 0.0

    def densify(self) -> Tensor:
        """The whole vector, [numel] float32. If every coordinate is kept it is ``values`` itself, not a copy."""
        if self.count == self.numel:
            return self.values
        return self.values.new_zeros(self.numel).index_copy_(0, self.indices, self.values)

    def slice(self, begin: int, end: int) -> "SparseGradient":
        """The coordinates in ``[begin, end)``, as a vector of length ``end - begin``.

        The values are a view. Two binary searches, and a copy of the indices in range; no copy if every coordinate is
        kept.

        Raises:
            ConfigurationError: not ``0 <= begin <= end <= numel``.

        Examples:
            >>> sparse = SparseGradient(torch.tensor([1, 3, 4]), torch.tensor([1.0, 2.0, 3.0]), numel=6)
            >>> sparse.slice(3, 6).indices
            tensor([0, 1])
        """
        if not 0 <= begin <= end <= self.numel:
            raise ConfigurationError(f"slice [{begin}, {end}) is not inside a vector of numel {self.numel}")
        if self.count == self.numel:  # the indices are 0 … numel - 1, so any prefix of them is already rebased
            return SparseGradient(self.indices[: end - begin], self.values[begin:end], end - begin)
        bounds = torch.tensor([begin, end], device=self.indices.device)
        first, last = torch.searchsorted(self.indices, bounds).tolist()
        return SparseGradient(self.indices[first:last] - begin, self.values[first:last], end - begin)

    def validate(self) -> None:
        """Check, in time linear in ``count``, what making the value does not: the order and range of the indices.

        Raises:
            ConfigurationError: the indices are not strictly increasing, or one is outside ``[0, numel)``.
        """
        if self.count == 0:
            return
        first, last = int(self.indices[0]), int(self.indices[-1])
        if not bool((self.indices[1:] > self.indices[:-1]).all()):
            raise ConfigurationError("indices are not strictly increasing")
        if first < 0 or last >= self.numel:  # in increasing order the two ends bound them all
            raise ConfigurationError(f"indices run from {first} to {last}, outside [0, {self.numel})")

    def equals(self, other: "SparseGradient") -> bool:
        """Whether numel, indices and the bits of the values are equal: NaN equals itself, and -0.0 is not 0.0."""
        return (
            self.numel == other.numel
            and torch.equal(self.indices, other.indices)
            and torch.equal(self.values.view(torch.int32), other.values.view(torch.int32))
        )


def _check_block(name: str, block: Tensor, dtype: torch.dtype) -> None:
    if block.ndim != 1 or block.dtype != dtype:
        raise ConfigurationError(f"{name} must be one-dimensional {dtype}, not {block.dtype} of {tuple(block.shape)}")


def _every_index(numel: int, device: torch.device) -> Tensor:
    indices = _DENSE_INDICES.get((numel, device))
    if indices is None:
        indices = torch.arange(numel, device=device)
        _DENSE_INDICES[numel, device] = indices
    return indices
