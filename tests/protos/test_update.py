"""Presence bits: every pattern comes back, and nothing else is accepted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.protos.update import pack_presence, unpack_presence

patterns = st.lists(st.booleans(), min_size=1, max_size=40).map(tuple)


@given(patterns)
def test_presence_round_trip(presence: tuple[bool, ...]) -> None:
    """Unpacking inverts packing for every pattern."""
    assert unpack_presence(pack_presence(presence), len(presence)) == presence


@given(patterns)
def test_presence_costs_one_bit_per_tensor_and_nothing_when_all_are_there(presence: tuple[bool, ...]) -> None:
    """The common case takes no byte, any other one byte for eight tensors."""
    assert len(pack_presence(presence)) == (0 if all(presence) else (len(presence) + 7) // 8)


@given(st.binary(min_size=1, max_size=6), st.integers(1, 40))
def test_any_bytes_are_a_pattern_or_refused(packed: bytes, segments: int) -> None:
    """What is accepted has one flag per tensor and packs to the same bits; the rest is a ValueError."""
    try:
        presence = unpack_presence(packed, segments)
    except ValueError:
        return
    assert len(presence) == segments
    assert sum(1 << index for index, flag in enumerate(presence) if flag) == int.from_bytes(packed, "little")


def test_a_wrong_length_is_refused() -> None:
    """The message says how many bytes are right."""
    with pytest.raises(ValueError, match="presence of 9 tensors takes 2 bytes, not 1"):
        unpack_presence(b"\x01", 9)


def test_bits_beyond_the_last_tensor_are_refused() -> None:
    """A bit for a tensor this shard does not have comes from another model."""
    with pytest.raises(ValueError, match="beyond the 3 of this shard"):
        unpack_presence(b"\x08", 3)
