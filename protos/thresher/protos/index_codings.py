"""Which coordinates are kept, as bytes: the index block of a frame (protos/README.md specifies it).

Rice coding comes within 1.5 % of the entropy of a random support; blocks of neighbours are cheaper as runs, and what
follows from a key, or is everything, needs no indices at all. The shortest is taken.
"""

import math
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from thresher.protos.errors import ConfigurationError, FrameError
from thresher.protos.kernels import kernel
from thresher.protos.seeded import seeded_indices
from thresher.protos.sparse import MOST_ELEMENTS, Seeded, SparseGradient
from thresher.protos.varints import Bytes, Integers, pack_varints, unpack_varints, varint_bytes

Words = npt.NDArray[np.uint64]

_SEED: Final = struct.Struct("<qQQQ")  # offset, numel, count, key


class IndexCoding(IntEnum):
    """How the index block says which coordinates are kept."""

    DENSE = 0  # all of them; the block is empty
    RICE = 1  # gaps: the low bits of each, then the rest in unary
    RUNS = 2  # varints: so many zeros, so many kept, and so on
    SEEDED = 3  # keys from which both sides draw the same indices


@final
@dataclass(frozen=True, slots=True)
class IndexBlock:
    """An index block and what the header says of it.

    Args:
        coding: how to read it.
        parameter: RICE: number of low bits. Otherwise 0.
        data: [bytes] uint8.
    """

    coding: IndexCoding
    parameter: int
    data: Bytes


@final
@dataclass(frozen=True, slots=True)
class Support:
    """What an index block says.

    Args:
        indices: [count] int64, strictly increasing.
        seeds: SEEDED: what they were drawn from. Otherwise empty.
    """

    indices: Tensor
    seeds: tuple[Seeded, ...] = ()


def encode_indices(sparse: SparseGradient) -> IndexBlock:
    """The shortest index block of ``sparse``; at equal length the coding with the lower number.

    It is never longer than a bitmap, ⌈numel / 8⌉ bytes, or count integers of 8 bytes (of 4 if numel ≤ 2**32).

    Raises:
        ConfigurationError: the indices are out of order or out of range (a gradient that keeps every coordinate is
            taken at its word), the seeds choose other ones, or numel exceeds 2**62.
    """
    if sparse.count == sparse.numel:
        return IndexBlock(IndexCoding.DENSE, 0, np.empty(0, dtype=np.uint8))
    if sparse.numel > MOST_ELEMENTS:
        raise ConfigurationError(f"a frame holds vectors of at most 2**62 elements, not {sparse.numel}")
    if sparse.count == 0:
        return IndexBlock(IndexCoding.RICE, 0, np.empty(0, dtype=np.uint8))
    indices = np.ascontiguousarray(sparse.indices.numpy(force=True))
    if indices[0] < 0 or indices[-1] >= sparse.numel:
        sparse.validate()
    parameter, bits, runs = _rice_parameter(sparse, indices)
    least = (bits + 7) // 8
    numbers = _runs(indices, runs) if 2 * runs < least else None
    run_bytes = least if numbers is None else varint_bytes(numbers)
    seeds = [seed for seed in sparse.seeds if seed.count]
    if seeds and len(seeds) * _SEED.size < min(least, run_bytes) and sum(s.count for s in seeds) <= sparse.numel:
        return _seeded_block(sparse, seeds)
    if numbers is not None and run_bytes < least:
        return IndexBlock(IndexCoding.RUNS, 0, pack_varints(numbers))
    return IndexBlock(IndexCoding.RICE, parameter, _rice_block(indices, parameter, bits, sparse.numel))


def decode_indices(coding: IndexCoding, parameter: int, block: Bytes, count: int, numel: int) -> Support:
    """What an index block says, the inverse of :func:`encode_indices` for every coding but DENSE.

    Memory is at most 16 bytes per index and per byte of the block, and time is linear in both; SEEDED may draw up to
    ``numel`` indices to find those, which takes 24 bytes for each.

    Args:
        coding: how the block is to be read.
        parameter: RICE: number of low bits.
        block: [bytes] uint8, at most ⌈numel / 8⌉ of them.
        count: the number of indices, which memory for that many values has been spent on.
        numel: what they are below, at most 2**62.

    Raises:
        FrameError: the block is none of that coding, or does not choose ``count`` indices below ``numel``.
    """
    if coding is not IndexCoding.RICE and parameter:
        raise FrameError(f"frame has a wrong parameter of the index coding: found {parameter}, expected 0")
    if coding is IndexCoding.SEEDED:
        return _read_seeded(block, count, numel)
    if coding is IndexCoding.RUNS:
        return Support(_read_runs(block, count, numel))
    return Support(_read_rice(block, parameter, count, numel))


def widest_index(numel: int) -> int:
    """Bits that hold every index below ``numel``: the largest parameter of RICE, at which nothing is left for unary."""
    return max(numel - 1, 0).bit_length()


def _rice_parameter(sparse: SparseGradient, indices: Integers) -> tuple[int, int, int]:
    """The least parameter with the fewest bits, those bits, and the number of runs.

    The bits are convex in the parameter: one more saves the ones among the quotients' lowest bits' share, which only
    shrinks. So the lowest of three neighbours that is not at their edge is the lowest of all.
    """
    count, widest = indices.size, widest_index(sparse.numel)
    # For geometric gaps of mean μ the best parameter is about log2(μ ln 2).
    shift = round(math.log2(math.log(2) * (int(indices[-1]) + 1) / count))
    while True:
        shift = min(max(shift, 1), max(widest - 1, 1))
        ordered, runs, below, at, above = _scan(indices, shift)
        if not ordered:
            sparse.validate()
        bits = [count * shift + below, count * (shift + 1) + at, count * (shift + 2) + above]
        step = bits.index(min(bits)) - 1
        if step == 0 or (step < 0 and shift == 1) or (step > 0 and shift >= widest - 1):
            break
        shift += step
    parameter, fewest = shift + step, bits[step + 1]
    if count * widest < fewest:
        return widest, count * widest, runs
    return parameter, fewest, runs


def _rice_block(indices: Integers, parameter: int, bits: int, numel: int) -> Bytes:
    words = np.zeros((bits + 63) // 64, dtype=np.uint64)
    _write_rice(indices, parameter, widest_index(numel), words)
    return words.astype("<u8", copy=False).view(np.uint8)[: (bits + 7) // 8]


def _read_rice(block: Bytes, parameter: int, count: int, numel: int) -> Tensor:
    widest, low_bits = widest_index(numel), count * parameter
    if parameter > widest:
        raise FrameError(f"frame has a wrong parameter of RICE: found {parameter}, expected at most {widest}")
    used = 8 * block.size - 8 + int(block[-1]).bit_length() if block.size else 0  # up to the highest bit that is set
    if parameter == widest:
        if block.size != (low_bits + 7) // 8 or used > low_bits:
            raise FrameError(f"RICE block of {block.size} bytes is not {count} indices of {parameter} bits and zeros")
    elif used < low_bits + count or block.size != (used + 7) // 8 or (count == 0 and used):
        raise FrameError(f"RICE block of {block.size} bytes ends before its {count} gaps, or goes on after them")
    # Before any arithmetic on them: with this, no index of a frame can overflow.
    elif (used - low_bits - count) << parameter >= max(numel, 1):
        raise FrameError(f"RICE block takes its indices beyond numel, {numel}")
    words = np.zeros(block.size // 8 + 2, dtype="<u8")
    words.view(np.uint8)[: block.size] = block
    words = words.astype(np.uint64, copy=False)
    indices = np.empty(count, dtype=np.int64)
    if parameter == widest:
        in_range = _read_fixed(words, parameter, numel, indices)
    else:
        in_range, end = _read_rice_words(words, parameter, numel, indices)
        if count and end != used:
            raise FrameError(f"RICE block does not hold {count} gaps: found other bits than one end for each")
    if not in_range:
        raise FrameError(f"RICE block has an index out of range: expected less than numel, {numel}")
    return torch.from_numpy(indices)


def _runs(indices: Integers, runs: int) -> Integers:
    numbers = np.empty(2 * runs, dtype=np.int64)
    _find_runs(indices, numbers)
    return numbers


def _read_runs(block: Bytes, count: int, numel: int) -> Tensor:
    numbers, consumed = unpack_varints(block, numel)
    if consumed != block.size or numbers.size % 2:
        raise FrameError(f"RUNS block of {block.size} bytes is not pairs of numbers that add up to at most {numel}")
    gaps, lengths = numbers[::2], numbers[1::2]
    if (lengths == 0).any() or (gaps[1:] == 0).any():
        raise FrameError("RUNS block has an empty run, or two that touch")
    if lengths.sum() != count:
        raise FrameError(f"RUNS block keeps {lengths.sum()} coordinates, the header says {count}")
    indices = np.empty(count, dtype=np.int64)
    _fill_runs(numbers, indices)
    return torch.from_numpy(indices)


def _seeded_block(sparse: SparseGradient, seeds: list[Seeded]) -> IndexBlock:
    drawn = draw(seeds, sparse.numel)
    if not np.array_equal(drawn, sparse.indices.numpy(force=True)):
        raise ConfigurationError(f"the seeds choose other indices than the {sparse.count} that are kept")
    block = b"".join(_SEED.pack(seed.offset, seed.numel, seed.count, seed.key) for seed in seeds)
    return IndexBlock(IndexCoding.SEEDED, 0, np.frombuffer(block, dtype=np.uint8))


def _read_seeded(block: Bytes, count: int, numel: int) -> Support:
    if block.size % _SEED.size:
        raise FrameError(f"SEEDED block has {block.size} bytes, expected a multiple of {_SEED.size}")
    try:
        seeds = tuple(Seeded(*record) for record in _SEED.iter_unpack(block.data))
    except ConfigurationError as error:
        raise FrameError(f"SEEDED block: {error}") from error
    # Drawing costs time for each index of the ranges, wanted or not; so their number is bounded first.
    if sum(seed.count for seed in seeds) > numel or not all(seed.count for seed in seeds):
        raise FrameError(f"SEEDED block draws no index, or more than numel, {numel}")
    indices = draw(seeds, numel)
    if indices.size != count or not (indices[1:] > indices[:-1]).all():
        raise FrameError(f"SEEDED block does not draw {count} indices in increasing order: found {indices.size}")
    return Support(torch.from_numpy(indices), seeds)


def draw(seeds: "list[Seeded] | tuple[Seeded, ...]", numel: int) -> Integers:
    """What ``seeds`` choose of a vector of length ``numel``, [k] int64, one range after the other."""
    ranges = []
    for seed in seeds:
        indices = seeded_indices(seed.numel, seed.count, seed.key) + seed.offset
        first, last = np.searchsorted(indices, (0, numel))
        ranges.append(indices[first:last])
    return np.concatenate(ranges) if ranges else np.empty(0, dtype=np.int64)


@kernel
def _scan(indices: Integers, shift: int) -> tuple[bool, int, int, int, int]:
    """Whether the indices increase, how many runs they are, and the sums of all gaps >> shift - 1, shift, shift + 1."""
    ordered = True
    runs = 1
    below = indices[0] >> (shift - 1)
    at = indices[0] >> shift
    above = indices[0] >> (shift + 1)
    for i in range(1, indices.size):
        gap = indices[i] - indices[i - 1] - 1
        if indices[i] <= indices[i - 1]:
            ordered = False
        runs += int(gap != 0)
        below += gap >> (shift - 1)
        at += gap >> shift
        above += gap >> (shift + 1)
    return ordered, runs, below, at, above


@kernel
def _write_rice(indices: Integers, parameter: int, widest: int, words: Words) -> None:
    """Or the low bits of all gaps, then their quotients, into zeroed words: each is kept in a register until full."""
    unary = parameter < widest
    width = np.uint64(parameter)
    mask = (np.uint64(1) << width) - np.uint64(1)
    one, six, low_six = np.uint64(1), np.uint64(6), np.uint64(63)
    low_at = np.uint64(0)
    low_word = np.uint64(0)
    end = np.uint64(indices.size) * width  # of the bits so far written in unary, which begin behind the low ones
    word = np.uint64(0)
    at = end >> six
    next_index = np.uint64(0)
    for i in range(indices.size):
        index = np.uint64(indices[i])
        gap = index - next_index
        next_index = index + one
        low = gap & mask
        offset = low_at & low_six
        low_word |= low << offset
        if offset + width >= np.uint64(64):
            words[low_at >> six] |= low_word
            low_word = (low >> one) >> (low_six - offset)
        low_at += width
        if unary:
            position = end + (gap >> width)
            end = position + one
            if (position >> six) != at:
                words[at] |= word
                word = np.uint64(0)
                at = position >> six
            word |= one << (position & low_six)
    if low_word != np.uint64(0):
        words[low_at >> six] |= low_word
    if unary:
        words[at] |= word


@kernel
def _read_rice_words(words: Words, parameter: int, numel: int, indices: Integers) -> tuple[bool, int]:
    """Whether all indices are below numel, and the bit behind the last quotient; 0 if there are others than count."""
    width = np.uint64(parameter)
    mask = (np.uint64(1) << width) - np.uint64(1)
    one, six, low_six = np.uint64(1), np.uint64(6), np.uint64(63)
    begin = np.uint64(indices.size) * width
    bound = np.uint64(numel)
    in_range = True
    low_at = np.uint64(0)
    lows = np.uint64(0)  # the sum of all low bits so far, and of one for each index before this one
    position = begin
    i = np.uint64(0)
    at = begin >> six
    word = (words[at] >> (begin & low_six)) << (begin & low_six)
    while i < np.uint64(indices.size):
        while word == np.uint64(0):
            at += one
            if at >= np.uint64(words.size):
                return in_range, 0
            word = words[at]
        # The number of zeros below the lowest one: compilers know this way of counting bits as one instruction.
        below = (word & (~word + one)) - one
        below -= (below >> one) & np.uint64(0x5555555555555555)
        below = (below & np.uint64(0x3333333333333333)) + ((below >> np.uint64(2)) & np.uint64(0x3333333333333333))
        below = (below + (below >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
        position = (at << six) + ((below * np.uint64(0x0101010101010101)) >> np.uint64(56))
        word &= word - one
        offset = low_at & low_six
        low = words[low_at >> six] >> offset
        low |= (words[(low_at >> six) + one] << one) << (low_six - offset)
        low_at += width
        lows += low & mask
        index = ((position - begin - i) << width) + lows
        if index >= bound:
            in_range = False
        indices[i] = index
        lows += one
        i += one
    return in_range, int(position) + 1


@kernel
def _read_fixed(words: Words, parameter: int, numel: int, indices: Integers) -> bool:
    """Whether all indices are below numel: the gaps are all in the low bits."""
    width = np.uint64(parameter)
    mask = (np.uint64(1) << width) - np.uint64(1)
    one, six, low_six = np.uint64(1), np.uint64(6), np.uint64(63)
    bound = np.uint64(numel)
    in_range = True
    low_at = np.uint64(0)
    next_index = np.uint64(0)
    for i in range(indices.size):
        offset = low_at & low_six
        low = words[low_at >> six] >> offset
        low |= (words[(low_at >> six) + one] << one) << (low_six - offset)
        low_at += width
        index = next_index + (low & mask)
        if index >= bound:
            in_range = False
        indices[i] = index
        next_index = index + one
    return in_range


@kernel
def _find_runs(indices: Integers, numbers: Integers) -> None:
    at = 0
    numbers[0] = indices[0]
    begin = indices[0]
    for i in range(1, indices.size):
        if indices[i] != indices[i - 1] + 1:
            numbers[at + 1] = indices[i - 1] + 1 - begin
            begin = indices[i]
            numbers[at + 2] = begin - indices[i - 1] - 1
            at += 2
    numbers[at + 1] = indices[-1] + 1 - begin


@kernel
def _fill_runs(numbers: Integers, indices: Integers) -> None:
    at = 0
    index = 0
    for i in range(0, numbers.size, 2):
        index += numbers[i]
        for _ in range(numbers[i + 1]):
            indices[at] = index
            index += 1
            at += 1
