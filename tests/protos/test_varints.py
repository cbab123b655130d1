"""Varints: every number comes back, in the fewest bytes, and nothing else is read."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.protos.errors import FrameError
from thresher.protos.varints import pack_varints, unpack_varints, varint_bytes

numbers = st.lists(st.integers(0, 300) | st.integers(0, 2**62), max_size=20)


def array(content: list[int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(content, dtype=np.int64)


@given(numbers)
def test_round_trip(content: list[int]) -> None:
    """What was packed is read, all bytes of it, up to the sum."""
    content = [number // max(len(content), 1) for number in content]  # the sum is at most 2**62
    while content and content[-1] == 0:  # reading ends when the sum is reached
        content.pop()
    packed = pack_varints(array(content))
    unpacked, consumed = unpack_varints(packed, sum(content))
    assert unpacked.tolist() == content
    assert consumed == packed.size == varint_bytes(array(content))


@given(st.integers(0, 2**62))
def test_length_is_one_byte_for_seven_bits(number: int) -> None:
    """No byte more than the number's bits need."""
    assert varint_bytes(array([number])) == max(1, -(-number.bit_length() // 7))


@given(st.binary(max_size=24), st.integers(0, 2**62))
def test_bytes_are_refused_or_are_the_varints_of_what_they_say(block: bytes, total: int) -> None:
    """Whatever is read packs to the same bytes again, and stays within the total."""
    try:
        unpacked, consumed = unpack_varints(np.frombuffer(bytearray(block), dtype=np.uint8), total)
    except FrameError:
        return
    assert pack_varints(unpacked).tobytes() == block[:consumed]
    assert sum(unpacked.tolist()) <= total
    assert consumed == len(block) or sum(unpacked.tolist()) == total


def test_reading_ends_at_the_total() -> None:
    """What follows belongs to somebody else."""
    unpacked, consumed = unpack_varints(np.array([3, 4, 5], dtype=np.uint8), 7)
    assert (unpacked.tolist(), consumed) == ([3, 4], 2)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ([0x05, 0x80], "cut off"),
        ([0x05, 0x81, 0x00], "varint 1 of its block is longer"),
        ([0x80, 0x00], "varint 0 of its block is longer"),
        ([0x05, 0x06], "varint 1 of its block takes the sum beyond 10"),
        ([0xFF] * 9 + [0x01], "varint 0 of its block takes the sum beyond 10"),
        ([0x80] * 30 + [0x01], "varint 0 of its block takes the sum beyond 10"),
    ],
)
def test_malformed_varints_are_refused(block: list[int], message: str) -> None:
    """Cut off, padded and too large are told apart, and how many bits there are does not matter."""
    with pytest.raises(FrameError, match=message):
        unpack_varints(np.array(block, dtype=np.uint8), 10)
