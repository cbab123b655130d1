"""Value codings: every bit comes back, the short ones are found exactly where they hold, and nothing else is read."""

import struct

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from thresher.protos.errors import ConfigurationError, FrameError
from thresher.protos.sparse import Levels, SparseGradient
from thresher.protos.value_codings import Contents, ValueBlock, ValueCoding, decode_values, encode_values

ANY_BITS = st.integers(-(2**31), 2**31 - 1)
NAN = struct.unpack("<i", struct.pack("<I", 0xFFC12000))[0]  # a payload that binary16 has room for
SPECIAL = st.sampled_from([0, -(2**31), 0x7F800000, 0x7FC00000, 0x7F802000, NAN, 0x33800000, 0x38800000, 1])


def gradient(bits: list[int], levels: Levels | None = None) -> SparseGradient:
    values = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    return SparseGradient(torch.arange(len(bits)), values, len(bits), levels)


@st.composite
def bit_patterns(draw: st.DrawFn) -> list[int]:
    """Anything; numbers of 16 bits in either format; few distinct ones; runs of two."""
    size = draw(st.integers(0, 40))
    kind = draw(st.sampled_from(["any", "bf16", "f16", "few", "signs"]))
    if kind == "f16":
        halves = torch.tensor(draw(st.lists(st.integers(-(2**15), 2**15 - 1), max_size=40)), dtype=torch.int16)
        return halves.view(torch.float16).float().view(torch.int32).tolist()
    if kind == "bf16":
        return [bits << 16 for bits in draw(st.lists(st.integers(-(2**15), 2**15 - 1), max_size=40))]
    if kind == "any":
        return draw(st.lists(ANY_BITS | SPECIAL, min_size=size, max_size=size))
    pool = draw(st.lists(ANY_BITS | SPECIAL, min_size=1, max_size=4 if kind == "few" else 2))
    return draw(st.lists(st.sampled_from(pool), max_size=300))


@st.composite
def quantised(draw: st.DrawFn) -> SparseGradient:
    """Values that are a scale times a code, in blocks."""
    lengths = draw(st.lists(st.integers(1, 30), max_size=5))
    scales = draw(
        st.lists(
            st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=len(lengths), max_size=len(lengths)
        )
    )
    codes = draw(st.lists(st.integers(-128, 127), min_size=sum(lengths), max_size=sum(lengths)))
    return of_levels(codes, scales, np.cumsum(lengths, dtype=np.int64).tolist())


def of_levels(codes: list[int], scales: list[float], ends: list[int]) -> SparseGradient:
    levels = Levels(
        torch.tensor(codes, dtype=torch.int8),
        torch.tensor(scales, dtype=torch.float32),
        torch.tensor(ends, dtype=torch.int64),
    )
    lengths = torch.diff(levels.ends, prepend=torch.zeros(1, dtype=torch.int64))
    values = levels.codes.float() * levels.scales.repeat_interleave(lengths)
    return SparseGradient(torch.arange(len(codes)), values, len(codes), levels)


def data_of(block: ValueBlock) -> bytearray:
    return bytearray(b"".join(part.tobytes() for part in block.parts))


def decoded(coding: ValueCoding, block: bytearray, count: int) -> Contents:
    return decode_values(coding, np.frombuffer(block, dtype=np.uint8), count)


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


@given(bit_patterns())
@example([])
@example([0x7F802000, 0x7FC00000])
def test_round_trip(bits: list[int]) -> None:
    """Every bit pattern comes back, from a block no longer than the plain one."""
    block = encode_values(gradient(bits))
    assert block.nbytes == len(data_of(block)) <= 4 * len(bits)
    assert same_bits(decoded(block.coding, data_of(block), len(bits)).values, gradient(bits).values)


@given(quantised())
def test_round_trip_of_levels(sparse: SparseGradient) -> None:
    """What was quantised comes back, and with it the levels if those are what travelled."""
    block = encode_values(sparse)
    contents = decoded(block.coding, data_of(block), sparse.count)
    assert same_bits(contents.values, sparse.values)
    if block.coding is not ValueCoding.LEVELS:
        assert contents.levels is None
        return
    assert contents.levels is not None
    assert sparse.levels is not None
    for name in ("codes", "scales", "ends"):
        assert torch.equal(getattr(contents.levels, name), getattr(sparse.levels, name))


@given(st.integers(0, 2**16 - 1))
def test_every_number_of_16_bits_is_found_and_kept(half: int) -> None:
    """Each of them, in both formats: three different ones, so that no sign coding is shorter."""
    for dtype, coding, others in (
        (torch.float16, ValueCoding.F16, (0x2E67, 0x2E68)),  # binary16 with the lowest bit of its mantissa
        (torch.bfloat16, ValueCoding.BF16, (0x3DCD, 0x3DCE)),
    ):
        words = [struct.unpack("<h", struct.pack("<H", word))[0] for word in (half, *others)]
        values = torch.tensor(words, dtype=torch.int16).view(dtype).float()
        if not values[0].isnan():  # torch may make another NaN of it
            block = encode_values(SparseGradient.dense(values))
            assert (block.coding, block.nbytes) == (coding, 6)
            assert same_bits(decoded(block.coding, data_of(block), 3).values, values)


def test_all_of_binary16_at_once() -> None:
    """All its numbers in one block, subnormal ones and infinities included; with one that is none, nothing is lost."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    values = halves[~halves.isnan()].float()
    block = encode_values(SparseGradient.dense(values))
    assert (block.coding, block.nbytes) == (ValueCoding.F16, 2 * values.numel())
    assert same_bits(decoded(block.coding, data_of(block), values.numel()).values, values)
    for other in (2.0**-25, 65536.0, 1 + 2.0**-11, 1.5 * 2.0**-24, 2.0**-140, 2.0**100):
        values[-1] = other
        assert encode_values(SparseGradient.dense(values)).coding is ValueCoding.F32


@given(ANY_BITS | SPECIAL)
def test_16_bits_are_taken_exactly_where_they_hold_the_value(bits: int) -> None:
    """As torch's own rounding has it: a value is one of 16 bits if rounding to them changes nothing."""
    value = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    if value.isnan():
        return
    coding = encode_values(SparseGradient.dense(value)).coding
    if same_bits(value.bfloat16().float(), value):
        assert coding is ValueCoding.BF16
    elif same_bits(value.half().float(), value):
        assert coding is ValueCoding.F16
    else:
        assert coding is ValueCoding.F32


@given(st.integers(1, 500), st.data())
def test_scaled_signs_cost_one_bit_each(count: int, data: st.DataObject) -> None:
    """One block, whatever the two values are, where that is shorter than two bytes each."""
    signs = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    block = encode_values(SparseGradient.dense(torch.tensor([0.1 if sign else -0.3 for sign in signs])))
    size = (1 if count < 128 else 2) + 8 + (count + 7) // 8
    assert block.nbytes == min(size, 4 * count)
    assert (block.coding is ValueCoding.SIGNS) == (size < 4 * count)


def test_sign_blocks_follow_their_scales() -> None:
    """A layer's scale begins a block; zero counts as positive, minus zero as negative."""
    layers = [torch.full((100,), 0.1), torch.full((200,), -0.2), torch.tensor([0.0, -0.0] * 50)]
    block = encode_values(SparseGradient.dense(torch.cat(layers)))
    assert block.coding is ValueCoding.SIGNS
    # 0.1 and -0.2 fit one block of 300; then zeros with signs
    expected = struct.pack("<HBffff", 0x02AC, 100, 0.1, -0.2, 0.0, -0.0) + bytes(12) + bytes([0xF0]) + b"\xff" * 24
    assert data_of(block) == expected + bytes([0xAF]) + b"\xaa" * 12


def test_ordinary_values_are_sent_as_they_are() -> None:
    """Nothing shorter is claimed for them."""
    values = torch.randn(5000, generator=torch.Generator().manual_seed(1))
    assert encode_values(SparseGradient.dense(values)).coding is ValueCoding.F32


def test_two_levels_are_signs() -> None:
    """Levels are a hint: what is shorter without them is sent without them."""
    sparse = of_levels([1, -1] * 100, [0.1], [200])
    assert encode_values(sparse).coding is ValueCoding.SIGNS
    assert encode_values(of_levels([*range(-100, 100)], [0.1], [200])).coding is ValueCoding.LEVELS


@pytest.mark.parametrize(
    ("codes", "scales", "ends", "message"),
    [
        ([1, 3], [0.1], [2], r"do not give the values: 0\.3\S* at position 1, kept is 0\.2"),
        ([1, 2], [0.2], [2], "do not give the values: 0.2"),
        ([1, 2], [float("inf")], [2], "not finite"),
        ([1, 2], [0.1], [1], "not increasing up to 2"),
        ([1, 2], [0.1, 0.1], [2, 2], "not increasing up to 2"),
        ([1, 2], [0.1, 0.1, 0.1], [2, 1, 2], "not increasing up to 2"),
        ([1, 2], [], [], "not increasing up to 2"),
    ],
)
def test_levels_of_other_values_are_refused(
    codes: list[int], scales: list[float], ends: list[int], message: str
) -> None:
    """A wrong hint would decode to something else: it is an error, also where it is not what would be sent."""
    values = torch.tensor([0.1, 0.2])
    levels = Levels(torch.tensor(codes, dtype=torch.int8), torch.tensor(scales), torch.tensor(ends, dtype=torch.int64))
    with pytest.raises(ConfigurationError, match=message):
        encode_values(SparseGradient(torch.arange(2), values, 2, levels))


def test_levels_of_minus_zero_are_refused() -> None:
    """A code 0 stands for 0.0: bits are compared, not numbers."""
    levels = Levels(torch.zeros(1, dtype=torch.int8), torch.ones(1), torch.ones(1, dtype=torch.int64))
    with pytest.raises(ConfigurationError, match="do not give the values"):
        encode_values(SparseGradient(torch.arange(1), torch.tensor([-0.0]), 1, levels))


@given(st.sampled_from(ValueCoding), st.binary(max_size=60), st.integers(0, 60))
def test_any_bytes_are_refused_or_are_values(coding: ValueCoding, block: bytes, count: int) -> None:
    """Noise gives as many values as promised, which encode again, or a FrameError."""
    try:
        contents = decoded(coding, bytearray(block), count)
    except FrameError:
        return
    sparse = SparseGradient(torch.arange(count), contents.values, count, contents.levels)
    again = encode_values(sparse)
    assert same_bits(decoded(again.coding, data_of(again), count).values, contents.values)


PAIR = struct.pack("<ff", 1.0, -1.0)


@pytest.mark.parametrize(
    ("coding", "block", "count", "message"),
    [
        (ValueCoding.F32, bytes(7), 2, "length of the value block: found 7, expected 8"),
        (ValueCoding.BF16, bytes(5), 2, "length of the value block: found 5, expected 4"),
        (ValueCoding.F16, bytes(3), 2, "length of the value block: found 3, expected 4"),
        (ValueCoding.SIGNS, b"\x09" + PAIR + b"\xff\x01", 9, None),
        (ValueCoding.SIGNS, b"", 9, "too short for 9 values"),
        (ValueCoding.SIGNS, b"\x09" + PAIR + b"\xff", 9, "has 10 bytes, expected 11"),
        (ValueCoding.SIGNS, b"\x09" + PAIR + b"\xff\x01\x00", 9, "has 12 bytes, expected 11"),
        (ValueCoding.SIGNS, b"\x09" + PAIR + b"\xff\x02", 9, "padding"),
        (ValueCoding.SIGNS, b"\x0a" + PAIR + b"\xff\x01", 9, "beyond 9"),
        (ValueCoding.SIGNS, b"\x00\x09" + PAIR + b"\xff\x01", 9, "not divided into blocks"),
        (ValueCoding.SIGNS, b"\x08\x80\x00\x00", 9, "cut off"),
        (ValueCoding.SIGNS, b"\x08", 9, "too short"),
        (ValueCoding.SIGNS, b"\x07\x01", 9, "not divided into blocks of 9"),
        (ValueCoding.SIGNS, b"\x01" + struct.pack("<ff", -1.0, -1.0) + b"\x01", 1, "wrong side of zero"),
        (ValueCoding.SIGNS, b"\x01" + struct.pack("<ff", 1.0, 1.0) + b"\x01", 1, "wrong side of zero"),
        (ValueCoding.LEVELS, b"\x02" + struct.pack("<fbb", 0.5, 3, -4), 2, None),
        (ValueCoding.LEVELS, b"\x02" + struct.pack("<fb", 0.5, 3), 2, "has 6 bytes, expected 7"),
        (ValueCoding.LEVELS, b"\x02" + struct.pack("<fbb", float("nan"), 3, 4), 2, "not finite"),
        (ValueCoding.LEVELS, b"\x00\x02" + struct.pack("<fbb", 0.5, 3, 4), 2, "not divided into blocks"),
        (ValueCoding.LEVELS, b"\x82\x00" + struct.pack("<fbb", 0.5, 3, 4), 2, "longer than its number needs"),
    ],
)
def test_value_blocks(coding: ValueCoding, block: bytes, count: int, message: str | None) -> None:
    """Right ones, and each way of being wrong."""
    if message is None:
        assert decoded(coding, bytearray(block), count).values.numel() == count
    else:
        with pytest.raises(FrameError, match=message):
            decoded(coding, bytearray(block), count)
