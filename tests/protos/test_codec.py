"""The wire format: golden bytes, round trip, and the refusal of everything else."""

import struct
import tracemalloc
import zlib

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from thresher.protos.codec import HEADER_BYTES, decode, encode, frame_bytes_bound
from thresher.protos.errors import ConfigurationError, FrameError
from thresher.protos.sparse import SparseGradient

HUGE = 2**40


def sparse(indices: list[int], values: list[float], numel: int) -> SparseGradient:
    return SparseGradient(torch.tensor(indices, dtype=torch.int64), torch.tensor(values, dtype=torch.float32), numel)


@st.composite
def sparse_gradients(draw: st.DrawFn) -> SparseGradient:
    numel = draw(st.integers(0, 30) | st.sampled_from([2**32 - 1, 2**32, 2**32 + 1, HUGE]))
    kept = sorted(draw(st.sets(st.integers(0, numel - 1), max_size=30))) if numel else []
    if numel <= 30 and draw(st.booleans()):
        kept = list(range(numel))
    bits = draw(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=len(kept), max_size=len(kept)))
    values = torch.tensor(bits, dtype=torch.int32).view(torch.float32)  # every pattern: NaN payloads, -0.0, infinities
    return SparseGradient(torch.tensor(kept, dtype=torch.int64), values, numel)


def sealed(header: bytes, body: bytes) -> bytes:
    """A frame whose crc is right, whatever else is wrong."""
    return header + struct.pack("<I", zlib.crc32(header + body)) + body


def frame_with(**fields: int) -> bytes:
    """A sealed frame of (1: 1.0, 3: 2.0) in 5, with some header fields replaced."""
    header = {
        "magic": b"THSH", "version": 1, "index_coding": 1, "value_coding": 0, "reserved": 0,
        "numel": 5, "count": 2, "index_bytes": 8, "value_bytes": 8,
    }  # fmt: skip
    packed = struct.pack("<4sBBBBQQQQ", *(header | fields).values())
    return sealed(packed, struct.pack("<IIff", 1, 3, 1.0, 2.0))


GOLDEN = [
    (
        SparseGradient.empty(0),
        "54485348 01 00 00 00 0000000000000000 0000000000000000 0000000000000000 0000000000000000 1aaca126",
    ),
    (
        SparseGradient.empty(5),
        "54485348 01 01 00 00 0500000000000000 0000000000000000 0000000000000000 0000000000000000 52a46f69",
    ),
    (
        sparse([1, 3], [1.0, -2.5], 5),
        (
            "54485348 01 01 00 00 0500000000000000 0200000000000000 0800000000000000 0800000000000000 a45265e2"
            "01000000 03000000 0000803f 000020c0"
        ),
    ),
    (
        SparseGradient.dense(torch.tensor([0.0, -0.0, float("inf")])),
        (
            "54485348 01 00 00 00 0300000000000000 0300000000000000 0000000000000000 0c00000000000000 7c3b9d52"
            "00000000 00000080 0000807f"
        ),
    ),
    (
        sparse([7, 2**32], [0.1, 1e-45], 2**32 + 1),
        (
            "54485348 01 02 00 00 0100000001000000 0200000000000000 1000000000000000 0800000000000000 851d7262"
            "0700000000000000 0000000001000000 cdcccc3d 01000000"
        ),
    ),
]


@pytest.mark.parametrize(("gradient", "frame"), GOLDEN)
def test_golden_frames(gradient: SparseGradient, frame: str) -> None:
    """The bytes of version 1 never change, in either direction."""
    assert encode(gradient) == bytes.fromhex(frame)
    assert decode(bytes.fromhex(frame), numel=gradient.numel).equals(gradient)


@given(sparse_gradients())
def test_round_trip(gradient: SparseGradient) -> None:
    """Law 6: decode(encode(x)) is x, to the bit, within the bound."""
    frame = encode(gradient)
    assert decode(frame, numel=gradient.numel).equals(gradient)
    assert len(frame) <= frame_bytes_bound(gradient.numel)


@given(sparse_gradients(), st.sampled_from([bytes, bytearray, memoryview]))
def test_any_byte_container_is_read(gradient: SparseGradient, container: type) -> None:
    """Bytes, bytearray and memoryview give the same gradient."""
    assert decode(container(encode(gradient)), numel=gradient.numel).equals(gradient)


def test_values_are_a_view_of_a_writable_frame_and_a_copy_of_a_read_only_one() -> None:
    """No copy where the buffer was handed over; a warning-free copy where it must not be written."""
    frame = bytearray(encode(sparse([0, 2], [1.0, 2.0], 3)))
    view, copy = decode(frame, numel=3), decode(memoryview(frame).toreadonly(), numel=3)
    frame[-4:] = struct.pack("<f", 9.0)
    assert view.values.tolist() == [1.0, 9.0]
    assert copy.values.tolist() == [1.0, 2.0]


def test_frame_in_an_unaligned_buffer_is_read() -> None:
    """A frame may begin anywhere in a larger buffer."""
    gradient = sparse([0, 2], [1.0, -2.0], 3)
    for buffer in (b"x" + encode(gradient), bytearray(b"x" + encode(gradient))):
        assert decode(memoryview(buffer)[1:], numel=3).equals(gradient)


@given(sparse_gradients(), st.sampled_from(["values", "indices"]))
def test_strided_and_attached_tensors_are_encoded_by_value(gradient: SparseGradient, which: str) -> None:
    """Neither strides nor a gradient graph change the bytes."""
    indices, values = gradient.indices, gradient.values
    if which == "indices":
        indices = torch.stack([indices, indices], dim=1)[:, 0]
    else:
        values = torch.stack([values, values], dim=1)[:, 0].requires_grad_()
    assert encode(SparseGradient(indices, values, gradient.numel)) == encode(gradient)


@given(st.integers(0, 12))
def test_bound_is_the_largest_frame(numel: int) -> None:
    """No support of any size exceeds the bound, and one reaches it."""
    sizes = [len(encode(SparseGradient(torch.arange(k), torch.zeros(k), numel))) for k in range(numel + 1)]
    assert max(sizes) == frame_bytes_bound(numel)


def test_bound_counts_wide_indices_above_32_bits() -> None:
    """From 2**32 + 1 elements on an index takes eight bytes."""
    assert frame_bytes_bound(2**32) == HEADER_BYTES + (2**32 - 1) * 8
    assert frame_bytes_bound(2**32 + 1) == HEADER_BYTES + 2**32 * 12


@given(sparse_gradients(), st.data())
def test_truncated_frame_is_refused(gradient: SparseGradient, data: st.DataObject) -> None:
    """Cut off anywhere, it is not a frame."""
    frame = encode(gradient)
    with pytest.raises(FrameError):
        decode(frame[: data.draw(st.integers(0, len(frame) - 1))], numel=gradient.numel)


@given(sparse_gradients(), st.binary(min_size=1, max_size=9))
def test_trailing_bytes_are_refused(gradient: SparseGradient, tail: bytes) -> None:
    """A frame ends where it says."""
    with pytest.raises(FrameError, match="length"):
        decode(encode(gradient) + tail, numel=gradient.numel)


@given(sparse_gradients(), st.data())
def test_flipped_bit_is_refused(gradient: SparseGradient, data: st.DataObject) -> None:
    """Whichever bit is wrong, the frame is refused."""
    frame = bytearray(encode(gradient))
    bit = data.draw(st.integers(0, 8 * len(frame) - 1))
    frame[bit // 8] ^= 1 << bit % 8
    with pytest.raises(FrameError):
        decode(frame, numel=gradient.numel)


@given(st.binary(max_size=120))
@example(b"")
def test_random_bytes_are_refused(frame: bytes) -> None:
    """Noise is an error of ours, never one of numpy's or struct's."""
    with pytest.raises(FrameError):
        decode(frame, numel=5)


@given(st.data())
def test_sealed_frame_is_refused_or_is_the_only_frame_of_its_value(data: st.DataObject) -> None:
    """With a valid crc too: what decodes at all encodes to the same bytes again."""
    fields = [data.draw(st.integers(0, 3)) for _ in range(3)]
    lengths = [data.draw(st.sampled_from([0, 1, 2, 3, 4, 5, 8, 12, 16, 20, 2**60, 2**64 - 1])) for _ in range(4)]
    frame = sealed(struct.pack("<4sBBBBQQQQ", b"THSH", 1, *fields, *lengths), data.draw(st.binary(max_size=40)))
    try:
        gradient = decode(frame, numel=5)
    except FrameError:
        return
    assert encode(gradient) == frame


@given(st.sets(st.integers(0, 4)), st.lists(st.integers(0, 6), max_size=5))
def test_sealed_index_blocks_decode_exactly_when_they_are_a_support(chosen: set[int], drawn: list[int]) -> None:
    """Of all index blocks only strictly increasing ones in range are accepted, and dense ones not raw."""
    for indices in (sorted(chosen), drawn):
        k = len(indices)
        body = struct.pack(f"<{k}I", *indices) + bytes(4 * k)
        frame = sealed(struct.pack("<4sBBBBQQQQ", b"THSH", 1, 1, 0, 0, 5, k, 4 * k, 4 * k), body)
        if indices == sorted(set(indices)) and all(i < 5 for i in indices) and k < 5:
            assert decode(frame, numel=5).indices.tolist() == indices
        else:
            with pytest.raises(FrameError):
                decode(frame, numel=5)


def test_unchanged_example_is_valid() -> None:
    """The frame whose fields the next test spoils is itself a good one."""
    assert decode(frame_with(), numel=5).equals(sparse([1, 3], [1.0, 2.0], 5))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"magic": b"HSHT"}, "magic: found b'HSHT', expected b'THSH'"),
        ({"version": 2}, "version: found 2, expected 1"),
        ({"reserved": 1}, "reserved byte: found 1, expected 0"),
        ({"numel": 6}, "numel: found 6, expected 5"),
        ({"count": 6}, "count: found 6, expected at most numel, 5"),
        ({"index_coding": 0}, "index coding: found 0, expected 1"),
        ({"index_coding": 2}, "index coding: found 2, expected 1"),
        ({"index_coding": 77}, "index coding: found 77, expected 1"),
        ({"value_coding": 1}, "value coding: found 1, expected 0"),
        ({"count": 3}, "length of the index block: found 8, expected 12"),
        ({"index_bytes": 2**60}, f"length of the index block: found {2**60}, expected 8"),
        ({"value_bytes": 12}, "length of the value block: found 12, expected 8"),
        ({"count": 1, "index_bytes": 4, "value_bytes": 4}, "length: found 60, expected 52"),
    ],
)
def test_each_header_field_is_checked(fields: dict[str, int], message: str) -> None:
    """The message says which field is wrong, what was found and what was expected."""
    with pytest.raises(FrameError, match=message):
        decode(frame_with(**fields), numel=5)


def test_raw_coding_of_a_full_support_is_refused() -> None:
    """One value has one frame: all coordinates are DENSE, never listed."""
    body = struct.pack("<IIff", 0, 1, 1.0, 2.0)
    with pytest.raises(FrameError, match="index coding: found 1, expected 0"):
        decode(sealed(struct.pack("<4sBBBBQQQQ", b"THSH", 1, 1, 0, 0, 2, 2, 8, 8), body), numel=2)


def test_corrupt_body_is_named() -> None:
    """A damaged value is told by its crc."""
    frame = bytearray(frame_with())
    frame[-1] ^= 1
    with pytest.raises(FrameError, match="crc"):
        decode(frame, numel=5)


@pytest.mark.parametrize(
    ("indices", "message"),
    [([3, 3], "not strictly increasing: 3, then 3"), ([4, 1], "4, then 1"), ([1, 5], "out of range: found 5")],
)
def test_bad_indices_are_named(indices: list[int], message: str) -> None:
    """Out of order and out of range are told apart, with the index."""
    body = struct.pack("<IIff", *indices, 1.0, 2.0)
    with pytest.raises(FrameError, match=message):
        decode(sealed(struct.pack("<4sBBBBQQQQ", b"THSH", 1, 1, 0, 0, 5, 2, 8, 8), body), numel=5)


def test_index_beyond_int64_is_out_of_range() -> None:
    """A uint64 is compared as one, so no index comes out negative."""
    body = struct.pack("<Qf", 2**64 - 1, 1.0)
    with pytest.raises(FrameError, match="out of range"):
        decode(sealed(struct.pack("<4sBBBBQQQQ", b"THSH", 1, 2, 0, 0, HUGE, 1, 8, 4), body), numel=HUGE)


@pytest.mark.parametrize(("count", "coding"), [(2**60, 0), (2**59, 2)])
def test_claimed_size_is_not_allocated(count: int, coding: int) -> None:
    """A frame of a few bytes that claims an exabyte costs a few bytes, even where that numel is expected."""
    width = {0: 0, 2: 8}[coding]
    header = struct.pack("<4sBBBBQQQQ", b"THSH", 1, coding, 0, 0, 2**60, count, count * width, count * 4)
    frame = sealed(header, bytes(64))
    tracemalloc.start()
    try:
        with pytest.raises(FrameError, match="length"):
            decode(frame, numel=2**60)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_encode_refuses_a_support_out_of_order() -> None:
    """What no receiver would accept is not sent."""
    with pytest.raises(ConfigurationError, match="strictly increasing"):
        encode(sparse([3, 1], [1.0, 2.0], 5))
