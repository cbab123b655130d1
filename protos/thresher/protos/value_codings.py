"""What the kept coordinates hold, as bytes: the value block of a frame (protos/README.md specifies it).

Every coding gives back the bits it was given. Shorter ones are found by looking, which on ordinary float32 values ends
after the first few; what was quantised to levels says so itself. The shortest is taken.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from thresher.protos.errors import ConfigurationError, FrameError
from thresher.protos.kernels import kernel
from thresher.protos.sparse import Levels, SparseGradient
from thresher.protos.varints import Bytes, Integers, pack_varints, unpack_varints, varint_bytes

Bits = npt.NDArray[np.uint32]
Floats = npt.NDArray[np.float32]

# Ordinary values change sign blocks every two or three elements, so they are recognised after some two hundred.
_SPARE_SIGN_BLOCKS: Final = 64
_LEAST_SIGN_BLOCK: Final = 8  # elements, on average


class ValueCoding(IntEnum):
    """How the value block holds the values, in the order of their indices."""

    F32 = 0  # IEEE 754 binary32, bits untouched
    BF16 = 1  # the upper half of binary32, where the lower is zero
    F16 = 2  # IEEE 754 binary16, where that is exact
    SIGNS = 3  # blocks of one non-negative and one negative value: a bit each
    LEVELS = 4  # blocks of a scale: a signed byte each


@final
@dataclass(frozen=True, slots=True)
class ValueBlock:
    """A value block.

    Args:
        coding: how to read it.
        parts: [bytes] uint8 each; the block is one after the other.
    """

    coding: ValueCoding
    parts: tuple[Bytes, ...]

    @property
    def nbytes(self) -> int:
        """Length of the block in bytes."""
        return _nbytes(self.parts)


@final
@dataclass(frozen=True, slots=True)
class Contents:
    """What a value block says.

    Args:
        values: [count] float32.
        levels: LEVELS: how they came about. Otherwise None.
    """

    values: Tensor
    levels: Levels | None = None


def encode_values(sparse: SparseGradient) -> ValueBlock:
    """The shortest value block of ``sparse``; at equal length the coding with the lower number.

    SIGNS is considered where its blocks, as far as one has looked, are no more than 64 and one for every 8 values.

    Raises:
        ConfigurationError: the levels are not those of the values.
    """
    values = np.ascontiguousarray(sparse.values.numpy(force=True))
    bits = values.view(np.uint32)
    coding = ValueCoding(_narrowest(bits.view(np.int32)))
    least = bits.size * (4 if coding is ValueCoding.F32 else 2)
    signs = _sign_parts(bits, least)
    if signs is not None:
        coding, least = ValueCoding.SIGNS, _nbytes(signs)
    if sparse.levels is not None:
        levels = _level_parts(sparse.levels, values)  # in any case: wrong ones are an error
        if _nbytes(levels) < least:
            return ValueBlock(ValueCoding.LEVELS, levels)
    match coding:
        case ValueCoding.SIGNS if signs is not None:
            return ValueBlock(coding, signs)
        case ValueCoding.BF16:
            return ValueBlock(coding, (_bytes_of((bits >> 16).astype("<u2")),))
        case ValueCoding.F16:
            halves = np.empty(bits.size, dtype=np.uint16)
            _to_halves(bits.view(np.int32), halves)
            return ValueBlock(coding, (_bytes_of(halves.astype("<u2", copy=False)),))
        case _:
            return ValueBlock(coding, (_bytes_of(values.astype("<f4", copy=False)),))


def decode_values(coding: ValueCoding, block: Bytes, count: int) -> Contents:
    """What a value block says, the inverse of :func:`encode_values`.

    Nothing is allocated for ``count`` values before the block is known to be long enough for them, so memory is at
    most 48 bytes per byte of the block, and time linear in it.

    Args:
        coding: how the block is to be read.
        block: [bytes] uint8, writable. The values of F32, and the codes of LEVELS, are views of it.
        count: the number of values.

    Raises:
        FrameError: the block is none of that coding, or not one of ``count`` values.
    """
    match coding:
        case ValueCoding.LEVELS:
            return _read_levels(block, count)
        case ValueCoding.F32:
            return Contents(torch.from_numpy(_elements(block, count, "<f4").astype(np.float32, copy=False)))
        case ValueCoding.BF16:
            return _contents_of(np.left_shift(_elements(block, count, "<u2"), 16, dtype=np.uint32))
        case ValueCoding.F16:
            halves = _elements(block, count, "<i2").astype(np.int16, copy=False)
            bits = np.empty(count, dtype=np.uint32)  # only now that the block is known to be that long
            _from_halves(halves, bits)
            return _contents_of(bits)
        case ValueCoding.SIGNS:
            return _contents_of(_read_signs(block, count))


def _contents_of(bits: Bits) -> Contents:
    return Contents(torch.from_numpy(bits.view(np.float32)))


def _nbytes(parts: tuple[Bytes, ...]) -> int:
    return sum(part.size for part in parts)


def _bytes_of(array: npt.NDArray[Any]) -> Bytes:
    return array.view(np.uint8)


def _elements(block: Bytes, count: int, dtype: str) -> npt.NDArray[Any]:
    """``count`` elements that are the whole block; a view of it where that is aligned."""
    expected = count * np.dtype(dtype).itemsize
    if block.size != expected:
        raise FrameError(f"frame has a wrong length of the value block: found {block.size}, expected {expected}")
    elements = block.view(dtype)
    return elements if elements.flags.aligned else elements.copy()


def _sign_parts(bits: Bits, most: int) -> tuple[Bytes, ...] | None:
    """The block as SIGNS; None if it has too many blocks, or ``most`` bytes or more."""
    sign_bytes = (bits.size + 7) // 8
    blocks = _count_sign_blocks(bits, _SPARE_SIGN_BLOCKS, _LEAST_SIGN_BLOCK)
    if blocks < 0 or 9 * blocks + sign_bytes >= most:
        return None
    ends = np.empty(blocks, dtype=np.int64)
    pairs = np.zeros((blocks, 2), dtype=np.uint32)
    pairs[:, 1] = 0x80000000
    _find_sign_blocks(bits, ends, pairs)
    signs = np.packbits(bits.view(np.int32) < 0, bitorder="little")
    lengths = np.diff(ends, prepend=0)
    if varint_bytes(lengths) + 8 * blocks + sign_bytes >= most:
        return None
    return pack_varints(lengths), _bytes_of(pairs.astype("<u4", copy=False).ravel()), signs


def _read_signs(block: Bytes, count: int) -> Bits:
    lengths, fields, signs = _read_blocks(block, count, (count + 7) // 8, 8)
    pairs = fields.view("<u4").astype(np.uint32, copy=False).reshape(-1, 2)
    if (pairs[:, 0] >> 31).any() or not (pairs[:, 1] >> 31).all():
        raise FrameError("SIGNS block has a value on the wrong side of zero")
    if count % 8 and signs[-1] >> count % 8:
        raise FrameError("SIGNS block has padding that is not zero")
    bits = np.empty(count, dtype=np.uint32)
    _fill_signs(np.unpackbits(signs, count=count, bitorder="little"), lengths, pairs, bits)
    return bits


def _level_parts(levels: Levels, values: Floats) -> tuple[Bytes, ...]:
    codes, scales, ends = (
        np.ascontiguousarray(part.numpy(force=True)) for part in (levels.codes, levels.scales, levels.ends)
    )
    lengths = np.diff(ends, prepend=0)
    if (lengths <= 0).any() or lengths.sum() != values.size:
        raise ConfigurationError(
            f"the blocks of the levels are not increasing up to {values.size}, the count of values"
        )
    if not np.isfinite(scales).all():
        raise ConfigurationError("a scale of the levels is not finite")
    products = np.empty(values.size, dtype=np.float32)
    _multiply(codes, scales, lengths, products)
    differ = products.view(np.uint32) != values.view(np.uint32)
    if differ.any():
        first = int(differ.argmax())
        raise ConfigurationError(
            f"the levels do not give the values: {products[first]} at position {first}, kept is {values[first]}"
        )
    return pack_varints(lengths), _bytes_of(scales.astype("<f4", copy=False)), _bytes_of(codes)


def _read_levels(block: Bytes, count: int) -> Contents:
    lengths, fields, codes = _read_blocks(block, count, count, 4)
    scales = fields.view("<f4").astype(np.float32, copy=False)
    if not np.isfinite(scales).all():
        raise FrameError("LEVELS block has a scale that is not finite")
    values = np.empty(count, dtype=np.float32)
    _multiply(codes.view(np.int8), scales, lengths, values)
    parts = (codes.view(np.int8), scales, lengths.cumsum())
    return Contents(torch.from_numpy(values), Levels(*map(torch.from_numpy, parts)))


def _read_blocks(block: Bytes, count: int, tail: int, width: int) -> tuple[Integers, Bytes, Bytes]:
    """Lengths that add up to ``count``, a copy of ``width`` bytes for each, and the last ``tail`` bytes.

    Raises:
        FrameError: that is not what the value block consists of.
    """
    if block.size < tail:
        raise FrameError(f"value block of {block.size} bytes is too short for {count} values")
    table = block[: block.size - tail]
    lengths, consumed = unpack_varints(table, count)
    if lengths.sum() != count or (lengths == 0).any():
        raise FrameError(f"value block is not divided into blocks of {count} values together")
    expected = consumed + width * lengths.size + tail
    if block.size != expected:
        raise FrameError(
            f"value block has {block.size} bytes, expected {expected} for {count} values in {lengths.size} blocks"
        )
    return lengths, table[consumed:].copy(), block[block.size - tail :]


@kernel
def _narrowest(bits: npt.NDArray[np.int32]) -> int:
    """1 if the upper halves hold all, else 2 if binary16 does, else 0; of most values the first 256 decide that."""
    brain_loses = half_loses = 0
    for begin in range(0, bits.size, 256):
        for i in range(begin, min(begin + 256, bits.size)):  # without a branch, so that it runs on vectors
            word = int(bits[i])
            exponent = (word >> 23) & 0xFF
            # Bits of the mantissa that binary16 has not; below 2**-14 its numbers are the multiples of 2**-24.
            spare = 13 if exponent >= 113 else 126 - exponent if exponent > 102 else 24
            lost = (word | 0x800000) & ((1 << spare) - 1)
            lost = 1 if exponent > 142 and exponent != 255 else lost
            half_loses |= lost if word & 0x7FFFFFFF else 0
            brain_loses |= word & 0xFFFF
        if brain_loses and half_loses:
            return 0
    return 2 if brain_loses else 1


@kernel
def _to_halves(bits: npt.NDArray[np.int32], halves: npt.NDArray[np.uint16]) -> None:
    for i in range(bits.size):
        word = int(bits[i])
        exponent = (word >> 23) & 0xFF
        mantissa = word & 0x7FFFFF
        normal = ((exponent - 112) << 10) | (mantissa >> 13)
        subnormal = (mantissa | 0x800000) >> (126 - exponent if 102 < exponent < 113 else 24)
        half = normal if exponent >= 113 else subnormal
        half = 0x7C00 | (mantissa >> 13) if exponent == 255 else half
        halves[i] = half | ((word >> 16) & 0x8000)


@kernel
def _from_halves(halves: npt.NDArray[np.int16], bits: Bits) -> None:
    for i in range(halves.size):
        half = int(halves[i])
        exponent = (half >> 10) & 0x1F
        mantissa = half & 0x3FF
        if exponent == 31:
            exponent = 255
        elif exponent > 0:
            exponent += 112
        elif mantissa != 0:
            exponent = 113
            while mantissa & 0x400 == 0:
                mantissa <<= 1
                exponent -= 1
            mantissa &= 0x3FF
        bits[i] = ((half & 0x8000) << 16) | (exponent << 23) | (mantissa << 13)


@kernel
def _count_sign_blocks(bits: Bits, spare: int, least: int) -> int:
    """Number of greedy blocks; -1 as soon as they are more than ``spare`` and one for every ``least`` elements."""
    blocks = 0
    positive, negative = np.uint32(0x80000000), np.uint32(0)  # each on the other's side: nothing equals them
    for i in range(bits.size):
        word = bits[i]
        expected = negative if word >> np.uint32(31) else positive
        if word == expected:
            continue
        if blocks == 0 or expected >> np.uint32(31) == word >> np.uint32(31):  # a second one on its side of zero
            blocks += 1
            positive, negative = np.uint32(0x80000000), np.uint32(0)
            if blocks > spare + i // least:
                return -1
        if word >> np.uint32(31):
            negative = word
        else:
            positive = word
    return blocks


@kernel
def _find_sign_blocks(bits: Bits, ends: Integers, pairs: Bits) -> None:
    """Fill the end and the two values of each block; ``pairs`` comes with what stands for none."""
    block = 0
    positive, negative = np.uint32(0x80000000), np.uint32(0)
    for i in range(bits.size):
        word = bits[i]
        expected = negative if word >> np.uint32(31) else positive
        if word == expected:
            continue
        if expected >> np.uint32(31) == word >> np.uint32(31):
            ends[block] = i
            block += 1
            positive, negative = np.uint32(0x80000000), np.uint32(0)
        if word >> np.uint32(31):
            negative = word
            pairs[block, 1] = word
        else:
            positive = word
            pairs[block, 0] = word
    ends[-1:] = bits.size


@kernel
def _fill_signs(negative: Bytes, lengths: Integers, pairs: Bits, bits: Bits) -> None:
    at = 0
    for block in range(lengths.size):
        positive = pairs[block, 0]
        difference = positive ^ pairs[block, 1]
        for i in range(at, at + lengths[block]):
            bits[i] = positive ^ (difference * np.uint32(negative[i]))
        at += lengths[block]


@kernel
def _multiply(codes: npt.NDArray[np.int8], scales: Floats, lengths: Integers, values: Floats) -> None:
    at = 0
    for block in range(lengths.size):
        for i in range(at, at + lengths[block]):
            values[i] = scales[block] * np.float32(codes[i])
        at += lengths[block]
