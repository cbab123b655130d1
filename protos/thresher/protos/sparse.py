"""The one value that travels: a few coordinates of a flat vector and what they hold."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Final, Self, final
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from thresher.protos.errors import ConfigurationError

MOST_ELEMENTS: Final = 1 << 62
"""Longest vector that travels: sums of three lengths of this size still fit 64 bits."""

# Eight bytes per element would triple the memory of a dense gradient, so all dense gradients of one size that are alive
# at one time share their indices; the last one to go frees them.
_DENSE_INDICES: WeakValueDictionary[tuple[int, torch.device], Tensor] = WeakValueDictionary()


@final
@dataclass(frozen=True, eq=False, slots=True)
class Levels:
    """How values came about that are few bits times a scale: value i of block b is ``scales[b] * codes[i]`` in float32.

    Args:
        codes: [k] int8.
        scales: [m] float32, finite.
        ends: [m] int64, strictly increasing: block b is codes[ends[b - 1] : ends[b]]; the last is k.

    Raises:
        ConfigurationError: a shape or a dtype does not fit.
    """

    codes: Tensor
    scales: Tensor
    ends: Tensor

    def __post_init__(self) -> None:
        _check_block("codes", self.codes, torch.int8)
        _check_block("scales", self.scales, torch.float32)
        _check_block("ends", self.ends, torch.int64)
        if self.scales.numel() != self.ends.numel():
            raise ConfigurationError(f"{self.scales.numel()} scales for {self.ends.numel()} blocks of levels")

    def slice(self, first: int, last: int) -> "Levels":
        """Those of ``codes[first:last]``: the blocks at the edges are cut."""
        block, beyond = torch.searchsorted(
            self.ends, torch.tensor([first, max(first, last - 1)], device=self.ends.device), right=True
        ).tolist()
        blocks = slice(block, beyond + 1 if last > first else block)
        return Levels(self.codes[first:last], self.scales[blocks], self.ends[blocks].clamp(max=last) - first)


@final
@dataclass(frozen=True, slots=True)
class Seeded:
    """Coordinates that follow from a key: ``seeded_indices(numel, count, key)``, moved by ``offset``.

    Args:
        offset: index of the range's first coordinate in the vector; negative, or beyond its end, for a slice of it.
        numel: length of the range.
        count: how many of it are kept.
        key: 64 bits.

    Raises:
        ConfigurationError: there is no such range: ``count`` exceeds ``numel``, or a number is out of bounds.
    """

    offset: int
    numel: int
    count: int
    key: int

    def __post_init__(self) -> None:
        if not (abs(self.offset) <= MOST_ELEMENTS and 0 <= self.count <= self.numel <= MOST_ELEMENTS):
            raise ConfigurationError(f"no {self.count} of {self.numel} coordinates can be drawn at {self.offset}")
        if not 0 <= self.key < 1 << 64:
            raise ConfigurationError(f"a key has 64 bits, {self.key} has not")


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
        levels: what the codec may send instead of ``values``; None: nothing shorter is known. It is taken at its word.
        seeds: what the codec may send instead of ``indices``: together they choose exactly those. Empty: nothing is.

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
    levels: Levels | None = None
    seeds: tuple[Seeded, ...] = ()

    def __post_init__(self) -> None:
        _check_block("indices", self.indices, torch.int64)
        _check_block("values", self.values, torch.float32)
        if self.indices.device != self.values.device:
            raise ConfigurationError(f"indices are on {self.indices.device}, values on {self.values.device}")
        if self.indices.numel() != self.values.numel():
            raise ConfigurationError(f"{self.indices.numel()} indices for {self.values.numel()} values")
        if self.count > self.numel:
            raise ConfigurationError(f"{self.count} coordinates in a vector of numel {self.numel}")
        if self.levels is not None and self.levels.codes.numel() != self.count:
            raise ConfigurationError(f"levels of {self.levels.codes.numel()} values for {self.count} values")

    @classmethod
    def dense(cls, values: Tensor) -> Self:
        """Every coordinate of ``values``, [numel] float32, which is kept and not copied."""
        _check_block("values", values, torch.float32)
        return cls(_every_index(values.numel(), values.device), values, values.numel())

    @classmethod
    def empty(cls, numel: int) -> Self:
        """No coordinate of a vector of length ``numel``: all of it is zero."""
        return cls(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float32), numel)

    @classmethod
    def concatenate(cls, pieces: Sequence[Self]) -> Self:
        """The vector that consists of ``pieces``, one after the other; none: a vector of length 0.

        It has levels if every piece that keeps anything has, and seeds if, moreover, each range lies in its own piece.

        Examples:
            >>> one = SparseGradient(torch.tensor([2]), torch.tensor([0.5]), numel=3)
            >>> SparseGradient.concatenate([one, one]).indices
            tensor([2, 5])
        """
        numel = sum(piece.numel for piece in pieces)
        begins = accumulate((piece.numel for piece in pieces), initial=0)
        kept = [(begin, piece) for begin, piece in zip(begins, pieces, strict=False) if piece.count]
        if not kept:
            return cls.empty(numel)
        values = torch.cat([piece.values for _, piece in kept])
        if values.numel() == numel:
            indices = _every_index(numel, values.device)
        else:
            indices = torch.cat([piece.indices + begin for begin, piece in kept])
        levels = _concatenated_levels([piece for _, piece in kept])
        return cls(indices, values, numel, levels, _concatenated_seeds(kept))

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
        kept. Levels and seeds come along, as far as they have a part in the range.

        Raises:
            ConfigurationError: not ``0 <= begin <= end <= numel``.

        Examples:
            >>> sparse = SparseGradient(torch.tensor([1, 3, 4]), torch.tensor([1.0, 2.0, 3.0]), numel=6)
            >>> sparse.slice(3, 6).indices
            tensor([0, 1])
        """
        if not 0 <= begin <= end <= self.numel:
            raise ConfigurationError(f"slice [{begin}, {end}) is not inside a vector of numel {self.numel}")
        seeds = tuple(
            replace(seed, offset=seed.offset - begin)
            for seed in self.seeds
            if seed.offset < end and seed.offset + seed.numel > begin
        )
        if self.count == self.numel:  # the indices are 0 … numel - 1, so any prefix of them is already rebased
            first, last, indices = begin, end, self.indices[: end - begin]
        else:
            bounds = torch.tensor([begin, end], device=self.indices.device)
            first, last = torch.searchsorted(self.indices, bounds).tolist()
            indices = self.indices[first:last] - begin
        levels = None if self.levels is None else self.levels.slice(first, last)
        return SparseGradient(indices, self.values[first:last], end - begin, levels, seeds)

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
        """Whether numel, indices and the bits of the values are equal: NaN equals itself, and -0.0 is not 0.0.

        How they came about, levels and seeds, does not count.
        """
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


def _concatenated_levels(pieces: Sequence[SparseGradient]) -> Levels | None:
    """The levels of ``pieces``, all of which keep something; None if one has none."""
    levels = [piece.levels for piece in pieces if piece.levels is not None]
    if len(levels) < len(pieces):
        return None
    begins = accumulate((piece.count for piece in pieces), initial=0)
    return Levels(
        torch.cat([each.codes for each in levels]),
        torch.cat([each.scales for each in levels]),
        torch.cat([each.ends + begin for begin, each in zip(begins, levels, strict=False)]),
    )


def _concatenated_seeds(pieces: Sequence[tuple[int, SparseGradient]]) -> tuple[Seeded, ...]:
    """The seeds of ``pieces``, each with where it begins; none if one has none, or one that reaches beyond it.

    What a seed draws outside its vector is no coordinate of it, but would be one of the neighbour's.
    """
    for _, piece in pieces:
        inside = all(seed.offset >= 0 and seed.offset + seed.numel <= piece.numel for seed in piece.seeds)
        if not piece.seeds or not inside:
            return ()
    return tuple(replace(seed, offset=seed.offset + begin) for begin, piece in pieces for seed in piece.seeds)
