"""The k largest magnitudes of a vector, exactly, for little more than reading it once.

A sample guesses a threshold that a few more than k coordinates reach, one pass collects these, and the k of them are
found by counting bit patterns. Where the sample misjudged the vector (too few reach the guess, or far too many are
equal to it) the whole vector is counted instead: two passes more, and never more memory than the result. Of a short
vector nothing is sampled or counted: to select from it takes less time than to clear the counters.
"""

import math
from typing import Final

import numpy as np
import torch
from torch import Tensor

from thresher.compression.one_pass import Floats, Integers, reaching, sampled
from thresher.protos.kernels import kernel

_SAMPLED_LINES: Final = 4096
_SPARE: Final = 4  # times as many coordinates as wanted, expected to reach a guess, make it a bad one
_MAGNITUDE: Final = np.int32(0x7FFFFFFF)
_INFINITY: Final = np.int32(0x7F800000)  # NaN, which is above, counts as infinity
_UPPER, _LOWER = 16, 15  # bits of a magnitude, counted one after the other
_SHORT: Final = 1 << 13  # coordinates; counting takes as long as selecting from about three times as many


def largest(vector: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` coordinates of ``vector``, [numel] float32, of largest magnitude; of equal ones, the first.

    NaN and infinity are larger than all numbers, and equal to each other.

    Returns:
        Indices, [k] int64 ascending, and values, [k] float32.

    References:
        Baseline: the result of a stable sort. A threshold from a sample as in Lin et al., "Deep gradient compression",
        arXiv:1712.01887, section 5, but with an exact result.
    """
    if vector.device.type != "cpu" or not vector.is_contiguous():
        indices = _largest_plainly(vector, k)
        return indices, vector[indices]
    guess = _guess(vector, k) if k and vector.numel() > _SHORT else None
    if guess is not None:
        indices, values = reaching(vector, guess)
        if indices.numel() >= k:
            positions = _positions(values, k)
            return indices[positions], values[positions]
    indices = _positions(vector, k)
    return indices, vector[indices]


def _largest_plainly(vector: Tensor, k: int) -> Tensor:
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=vector.device)
    magnitude = vector.abs()
    torch.nan_to_num_(magnitude, nan=torch.inf, posinf=torch.inf)
    least = magnitude.topk(k, sorted=False).values.min()
    chosen = magnitude > least
    ties = (magnitude == least).nonzero().squeeze(1)  # torch.topk leaves ties to chance
    chosen[ties[: k - int(chosen.count_nonzero())]] = True
    return chosen.nonzero().squeeze(1)


def _guess(vector: Tensor, k: int) -> float | None:
    """A threshold that k coordinates or a few more seem to reach; None if the sample shows none."""
    sample = sampled(vector, _SAMPLED_LINES).abs().flatten()
    torch.nan_to_num_(sample, nan=torch.inf, posinf=torch.inf)
    expected = k * sample.numel() / vector.numel()
    rank = k if sample.numel() == vector.numel() else math.ceil(expected + 3.0 * math.sqrt(expected) + 4.0)
    if rank > sample.numel():
        return None
    guess = sample.kthvalue(sample.numel() - rank + 1).values
    reach = int((sample >= guess).count_nonzero())
    return None if reach > _SPARE * rank else float(guess)


def _positions(values: Tensor, k: int) -> Tensor:
    """Indices, [k] int64 ascending, of the ``k`` largest magnitudes: the first of equal ones."""
    read, positions = values.detach().numpy(), torch.empty(k, dtype=torch.int64)
    if k:
        least, ties = (_least_selected if read.size <= _SHORT else _least_counted)(read, k)
        _choose(read, least, ties, positions.numpy())
    return positions


def _least_selected(values: Floats, k: int) -> tuple[np.int32, int]:
    """The smallest of the ``k`` largest magnitudes, as its bits, and how many of them are equal to it."""
    magnitudes = np.minimum(values.view(np.int32) & _MAGNITUDE, _INFINITY)
    least = np.partition(magnitudes, values.size - k)[values.size - k]
    return least, k - int(np.count_nonzero(magnitudes > least))


def _least_counted(values: Floats, k: int) -> tuple[np.int32, int]:
    """As :func:`_least_selected`, without a copy of the values."""
    upper, below = _bin_of_rank(values, k, above=_UPPER + _LOWER, prefix=0, bits=_UPPER)
    lower, ties = _bin_of_rank(values, below, above=_LOWER, prefix=upper, bits=_LOWER)
    return np.int32(upper << _LOWER | lower), ties


def _bin_of_rank(values: Floats, rank: int, *, above: int, prefix: int, bits: int) -> tuple[int, int]:
    """Of the magnitudes that begin with ``prefix``, the next ``bits`` of that of ``rank``, and its rank among those."""
    counts = np.zeros(1 << bits, dtype=np.int64)
    _count(values, above, prefix, above - bits, counts)
    as_large = counts[::-1].cumsum()
    place = int(np.searchsorted(as_large, rank))
    bin_of_rank = counts.size - 1 - place
    return bin_of_rank, rank - int(as_large[place] - counts[bin_of_rank])


@kernel
def _count(values: Floats, above: int, prefix: int, below: int, counts: Integers) -> None:
    for i in range(values.size):
        magnitude = min(np.float32(values[i]).view(np.int32) & _MAGNITUDE, _INFINITY)
        if magnitude >> above == prefix:
            counts[np.uint64((magnitude >> below) & (counts.size - 1))] += 1


@kernel
def _choose(values: Floats, least: np.int32, ties: int, positions: Integers) -> None:
    found = 0
    for i in range(values.size):
        magnitude = min(np.float32(values[i]).view(np.int32) & _MAGNITUDE, _INFINITY)
        if magnitude < least:
            continue
        if magnitude == least:
            if ties == 0:
                continue
            ties -= 1
        positions[np.uint64(found)] = i
        found += 1
