"""Non-negative integers as varints (LEB128): seven bits to a byte, lowest first; the eighth says that more follow."""

from typing import Final

import numpy as np
import numpy.typing as npt

from thresher.protos.errors import FrameError
from thresher.protos.kernels import kernel

Integers = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

_ENDED_EARLY: Final = -1
_NOT_MINIMAL: Final = -2
_TOO_LARGE: Final = -3


def varint_bytes(numbers: Integers) -> int:
    """Length in bytes of ``numbers``, [n] int64, all non-negative, as varints.

    Examples:
        >>> varint_bytes(np.array([0, 127, 128]))
        4
    """
    return int(_length(numbers))


def pack_varints(numbers: Integers) -> Bytes:
    """The varints of ``numbers``, [n] int64, all non-negative.

    Examples:
        >>> pack_varints(np.array([1, 300])).tobytes().hex(" ")
        '01 ac 02'
    """
    packed = np.empty(varint_bytes(numbers), dtype=np.uint8)
    _pack(numbers, packed)
    return packed


def unpack_varints(block: Bytes, total: int) -> tuple[Integers, int]:
    """Read varints from the start of ``block``, [bytes] uint8, until they add up to ``total`` or it ends.

    Memory: eight bytes per byte of the block at most.

    Args:
        block: what begins with varints.
        total: what the sum must not exceed, at most 2**62.

    Returns:
        The numbers, [n] int64, and how many bytes they took.

    Raises:
        FrameError: the last one is cut off, one is longer than it need be, or the sum exceeds ``total``.
    """
    numbers = np.empty(np.count_nonzero(block < 0x80), dtype=np.int64)
    count, consumed = _unpack(block.view(np.int8), numbers, total)  # signed: numba makes floats of mixed ones
    if consumed == _ENDED_EARLY:
        raise FrameError("a varint is cut off by the end of its block")
    if consumed == _NOT_MINIMAL:
        raise FrameError(f"varint {count} of its block is longer than its number needs")
    if consumed == _TOO_LARGE:
        raise FrameError(f"varint {count} of its block takes the sum beyond {total}")
    return numbers[:count], consumed


@kernel
def _length(numbers: Integers) -> int:
    total = 0
    for i in range(numbers.size):
        rest = numbers[i] >> 7
        total += 1
        while rest > 0:
            total += 1
            rest >>= 7
    return total


@kernel
def _pack(numbers: Integers, packed: Bytes) -> None:
    at = 0
    for i in range(numbers.size):
        rest = numbers[i]
        while rest >= 0x80:
            packed[at] = (rest & 0x7F) | 0x80
            at += 1
            rest >>= 7
        packed[at] = rest
        at += 1


@kernel
def _unpack(block: npt.NDArray[np.int8], numbers: Integers, total: int) -> tuple[int, int]:
    """How many numbers there are, and how many bytes they took or what is wrong with the next one."""
    at = count = 0
    left = total
    while at < block.size and left > 0:
        number = shift = 0
        while True:
            if at == block.size:
                return count, _ENDED_EARLY
            byte = int(block[at]) & 0xFF
            at += 1
            if shift == 63:
                return count, _TOO_LARGE
            number |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
            shift += 7
        if byte == 0 and shift > 0:
            return count, _NOT_MINIMAL
        if number > left:
            return count, _TOO_LARGE
        left -= number
        numbers[count] = number
        count += 1
    return count, at
