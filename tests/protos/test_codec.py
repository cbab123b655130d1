"""The wire format: golden files, round trip, and the refusal of everything else."""

import json
import struct
import tracemalloc
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tests.protos.golden_frames import FOLDER, content, gradients
from torch import Tensor

from thresher.protos.codec import HEADER_BYTES, VERSION, decode, encode, frame_bytes_bound
from thresher.protos.errors import ConfigurationError, FrameError
from thresher.protos.index_codings import IndexCoding
from thresher.protos.seeded import seeded_indices
from thresher.protos.sparse import Levels, Seeded, SparseGradient
from thresher.protos.value_codings import ValueCoding

HUGE = 2**40


def sparse(indices: list[int], values: list[float], numel: int) -> SparseGradient:
    return SparseGradient(torch.tensor(indices, dtype=torch.int64), torch.tensor(values, dtype=torch.float32), numel)


@st.composite
def supports(draw: st.DrawFn) -> tuple[list[int], int, tuple[Seeded, ...]]:
    """Indices and the length they are below: all, few, runs, or drawn from seeds."""
    kind = draw(st.sampled_from(["any", "all", "runs", "seeds"]))
    if kind == "seeds":
        numel, key = draw(st.integers(0, 400)), draw(st.integers(0, 2**64 - 1))
        seed = Seeded(draw(st.integers(-5, 5)), numel, draw(st.integers(0, numel)), key)
        drawn = (seeded_indices(numel, seed.count, key) + seed.offset).tolist()
        return [index for index in drawn if 0 <= index < numel], numel, (seed,)
    numel = draw(st.integers(0, 30) | st.sampled_from([2**32 - 1, 2**32, 2**32 + 1, HUGE]))
    if kind == "all" and numel <= 30:
        return list(range(numel)), numel, ()
    kept = draw(st.sets(st.integers(0, numel - 1), max_size=30)) if numel else set()
    if kind == "runs":
        kept = {index + i for index in kept for i in range(20) if index + i < numel}
    return sorted(kept), numel, ()


@st.composite
def values_of(draw: st.DrawFn, count: int) -> tuple[Tensor, Levels | None]:
    """Any bits, bits of half the width, signs, or levels."""
    kind = draw(st.sampled_from(["any", "bf16", "f16", "signs", "levels"]))
    shift = draw(st.integers(0, 2**16))
    if kind == "any":
        words = draw(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=min(count, 20)))
        words += [(shift + 0x9E3779B1 * i) % 2**32 - 2**31 for i in range(count - len(words))]
        return torch.tensor(words, dtype=torch.int32).view(torch.float32), None
    words = [(shift + 257 * i) % 2**16 - 2**15 for i in range(count)]
    halves = torch.tensor(words, dtype=torch.int16)
    if kind in {"bf16", "f16"}:
        return halves.view(torch.bfloat16 if kind == "bf16" else torch.float16).float(), None
    if kind == "signs":
        scale = draw(st.floats(width=32))
        return torch.where(halves > 0, scale, -scale).float(), None
    scales = torch.tensor(draw(st.lists(st.floats(0.125, 1e3, width=32), min_size=1, max_size=3)))
    cuts = sorted({count * (i + 1) // scales.numel() for i in range(scales.numel())} - {0})
    ends = torch.tensor(cuts, dtype=torch.int64)
    scales = scales[: ends.numel()]
    codes = halves.to(torch.int8)
    lengths = torch.diff(ends, prepend=ends.new_zeros(1))
    return codes * scales.repeat_interleave(lengths), Levels(codes, scales, ends)


@st.composite
def sparse_gradients(draw: st.DrawFn) -> SparseGradient:
    """Of every pair of codings some, with and without what the codec may send instead."""
    kept, numel, seeds = draw(supports())
    values, levels = draw(values_of(len(kept)))
    return SparseGradient(torch.tensor(kept, dtype=torch.int64), values, numel, levels, seeds)


def sealed(header: bytes, body: bytes) -> bytes:
    """A frame whose crc is right, whatever else is wrong."""
    return header + struct.pack("<I", zlib.crc32(header + body)) + body


def frame_with(**fields: int) -> bytes:
    """A sealed frame of (1: 0.1, 3: 0.2) in 5, with some header fields replaced."""
    header = {
        "magic": b"THSH", "version": 2, "index_coding": 1, "value_coding": 0, "parameter": 0,
        "numel": 5, "count": 2, "value_bytes": 8, "index_bytes": 1,
    }  # fmt: skip
    packed = struct.pack("<4sBBBBQQQQ", *(header | fields).values())
    return sealed(packed, struct.pack("<ffB", 0.1, 0.2, 0b01010))


@pytest.mark.parametrize("name", gradients())
def test_golden_frames(name: str) -> None:
    """The bytes of version 2 never change, in either direction."""
    gradient, frame = gradients()[name], FOLDER.joinpath(f"{name}.frame").read_bytes()
    assert encode(gradient) == frame
    assert decode(frame, numel=gradient.numel).equals(gradient)
    assert json.loads(FOLDER.joinpath(f"{name}.json").read_text(encoding="utf-8")) == content(gradient, frame)


def test_golden_frames_have_every_pair_of_codings() -> None:
    """Nothing that a frame may be is left unpinned, and no file is left over."""
    found = {path.name: path.read_bytes() for path in FOLDER.glob("*.frame")}
    assert {(frame[5], frame[6]) for frame in found.values()} == {(i, v) for i in IndexCoding for v in ValueCoding}
    assert {frame[4] for frame in found.values()} == {VERSION}
    assert found.keys() == {f"{name}.frame" for name in gradients()}


@given(sparse_gradients())
def test_round_trip(gradient: SparseGradient) -> None:
    """Law 6: decode(encode(x)) is x, to the bit, within the bound."""
    frame = encode(gradient)
    assert decode(frame, numel=gradient.numel).equals(gradient)
    assert len(frame) <= frame_bytes_bound(gradient.numel)


@given(sparse_gradients())
def test_what_was_decoded_has_the_same_frame(gradient: SparseGradient) -> None:
    """Levels and seeds that travelled come back, so a reader can pass on what it got."""
    frame = encode(gradient)
    assert encode(decode(frame, numel=gradient.numel)) == frame


@given(sparse_gradients(), st.sampled_from([bytes, bytearray, memoryview]))
def test_any_byte_container_is_read(gradient: SparseGradient, container: type) -> None:
    """Bytes, bytearray and memoryview give the same gradient."""
    assert decode(container(encode(gradient)), numel=gradient.numel).equals(gradient)


def test_values_are_a_view_of_a_writable_frame_and_a_copy_of_a_read_only_one() -> None:
    """No copy where the buffer was handed over; a warning-free copy where it must not be written."""
    values = torch.tensor([0.1, 0.2])
    frame = bytearray(encode(SparseGradient(torch.tensor([0, 2]), values, 3)))
    view, copy = decode(frame, numel=3), decode(memoryview(frame).toreadonly(), numel=3)
    frame[HEADER_BYTES : HEADER_BYTES + 4] = struct.pack("<f", 9.0)
    assert view.values[0] == 9.0
    assert torch.equal(copy.values, values)


def test_frame_in_an_unaligned_buffer_is_read() -> None:
    """A frame may begin anywhere in a larger buffer."""
    gradient = sparse([0, 2], [0.1, -0.2], 3)
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
    assert encode(replace(gradient, indices=indices, values=values)) == encode(gradient)


@given(st.sets(st.integers(0, 299)), st.integers(0, 300))
def test_bound_holds_for_every_support(kept: set[int], numel: int) -> None:
    """Four bytes per value and a bit per element are enough, whatever is kept."""
    indices = torch.tensor(sorted(index for index in kept if index < numel), dtype=torch.int64)
    values = torch.arange(indices.numel()) / 3
    assert len(encode(SparseGradient(indices, values, numel))) <= frame_bytes_bound(numel)


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
def test_sealed_frame_is_refused_or_is_a_gradient(data: st.DataObject) -> None:
    """With a valid crc too: what decodes at all is valid, and its own frame holds the same."""
    fields = [data.draw(st.integers(0, 5)) for _ in range(3)]
    count, value_bytes, index_bytes = data.draw(st.tuples(st.integers(0, 6), st.integers(0, 21), st.integers(0, 2)))
    body = data.draw(st.binary(min_size=value_bytes + index_bytes, max_size=value_bytes + index_bytes))
    frame = sealed(struct.pack("<4sBBBBQQQQ", b"THSH", VERSION, *fields, 9, count, value_bytes, index_bytes), body)
    try:
        gradient = decode(frame, numel=9)
    except FrameError:
        return
    gradient.validate()
    assert decode(encode(gradient), numel=9).equals(gradient)


@given(st.binary(min_size=2, max_size=2), st.integers(0, 9))
def test_bitmaps_decode_exactly_when_they_have_count_ones(bitmap: bytes, count: int) -> None:
    """A block of RICE without low bits is a bitmap without zeros at its end: of all others none is accepted."""
    block = bitmap.rstrip(bytes(1))
    kept = [i for i in range(16) if bitmap[i // 8] >> i % 8 & 1]
    header = struct.pack("<4sBBBBQQQQ", b"THSH", VERSION, 1, 0, 0, 16, count, 4 * count, len(block))
    frame = sealed(header, bytes(4 * count) + block)
    if len(kept) == count:
        assert decode(frame, numel=16).indices.tolist() == kept
    else:
        with pytest.raises(FrameError):
            decode(frame, numel=16)


def test_unchanged_example_is_valid() -> None:
    """The frame whose fields the next test spoils is itself a good one, the one that the encoder writes."""
    assert encode(sparse([1, 3], [0.1, 0.2], 5)) == frame_with()
    assert decode(frame_with(), numel=5).equals(sparse([1, 3], [0.1, 0.2], 5))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"magic": b"HSHT"}, "magic: found b'HSHT', expected b'THSH'"),
        ({"version": 1}, "version: found 1, expected 2"),
        ({"numel": 6}, "numel: found 6, expected 5"),
        ({"count": 6}, "count: found 6, expected at most 5"),
        ({"index_coding": 0}, "index coding: found 0 for 2 of 5"),
        ({"index_coding": 4}, "index coding: found 4, expected at most 3"),
        ({"value_coding": 5}, "value coding: found 5, expected at most 4"),
        ({"parameter": 4}, "parameter of RICE: found 4, expected at most 3"),
        ({"count": 5}, "index coding: found 1 for 5 of 5"),
        ({"count": 3, "value_bytes": 9, "index_bytes": 0}, "length of the value block: found 9, expected 12"),
        ({"index_bytes": 2}, "length of the index block: found 2, expected at most 1"),
        ({"index_bytes": 2**60}, f"length of the index block: found {2**60}, expected at most 1"),
        ({"value_bytes": 12}, "length of the value block: found 12, expected at most 8"),
        ({"value_bytes": 4}, "length: found 53, expected 49"),
    ],
)
def test_each_header_field_is_checked(fields: dict[str, int], message: str) -> None:
    """The message says which field is wrong, what was found and what was expected."""
    with pytest.raises(FrameError, match=message):
        decode(frame_with(**fields), numel=5)


def test_vectors_beyond_the_limit_are_refused() -> None:
    """Nothing of more than 2**62 elements has a frame."""
    with pytest.raises(FrameError, match="numel"):
        decode(frame_with(numel=2**62 + 1), numel=2**62 + 1)
    with pytest.raises(ConfigurationError, match="elements"):
        encode(sparse([1], [1.0], 2**62 + 1))


@pytest.mark.parametrize(("field", "value"), [("parameter", 1), ("index_bytes", 1)])
def test_dense_frames_say_nothing_of_indices(field: str, value: int) -> None:
    """All coordinates need no parameter and no block."""
    header = {"parameter": 0, "numel": 1, "count": 1, "value_bytes": 4, "index_bytes": 0} | {field: value}
    packed = struct.pack("<4sBBBBQQQQ", b"THSH", VERSION, 0, 0, *header.values())
    with pytest.raises(FrameError, match=field.removesuffix("_bytes").replace("index", "index block")):
        decode(sealed(packed, bytes(4 + header["index_bytes"])), numel=1)


def test_corrupt_body_is_named() -> None:
    """A damaged value is told by its crc."""
    frame = bytearray(frame_with())
    frame[-1] ^= 1
    with pytest.raises(FrameError, match="crc"):
        decode(frame, numel=5)


@pytest.mark.parametrize(
    ("count", "index_coding", "value_coding", "value_bytes", "index_bytes"),
    [
        (2**60, 0, 0, 2**62, 0),
        (2**59, 1, 0, 2**61, 2**57),
        (2**59, 1, 3, 2**56, 2**57),
        (2**59, 2, 3, 56, 8),  # lengths that are those of the frame
        (2**59, 1, 1, 56, 8),
        (2**59, 1, 2, 56, 8),
        (2**59, 1, 4, 56, 8),
        (64, 2, 3, 56, 8),
        (2, 3, 0, 8, 56),
    ],
)
def test_claimed_size_is_not_allocated(
    count: int, index_coding: int, value_coding: int, value_bytes: int, index_bytes: int
) -> None:
    """A frame of a few bytes that claims an exabyte costs a few bytes, even where that numel is expected."""
    lengths = (2**60, count, value_bytes, index_bytes)
    header = struct.pack("<4sBBBBQQQQ", b"THSH", VERSION, index_coding, value_coding, 0, *lengths)
    frame = sealed(header, b"\xff" * 64)
    tracemalloc.start()
    try:
        with pytest.raises(FrameError):
            decode(frame, numel=2**60)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@given(sparse_gradients())
def test_memory_is_bounded_by_the_frame(gradient: SparseGradient) -> None:
    """128 bytes for each byte of the frame, 24 for each element if it is drawn, and a little for Python itself."""
    frame = encode(gradient)
    drawn = 24 * gradient.numel if frame[5] == IndexCoding.SEEDED else 0
    tracemalloc.start()
    try:
        decode(frame, numel=gradient.numel)
        assert tracemalloc.get_traced_memory()[1] < 128 * len(frame) + drawn + 50_000
    finally:
        tracemalloc.stop()


def test_cut_levels_are_still_those_of_the_values() -> None:
    """A shard's part of a quantised gradient travels as levels too."""
    codes = torch.from_numpy((np.arange(600) * 37 % 251 - 125).astype(np.int8))
    levels = Levels(codes, torch.tensor([0.1, 0.7]), torch.tensor([400, 600]))
    values = codes * torch.tensor([0.1] * 400 + [0.7] * 200)
    piece = SparseGradient(torch.arange(0, 1200, 2), values, 1200, levels).slice(300, 1000)
    frame = encode(piece)
    assert frame[6] == ValueCoding.LEVELS
    assert decode(frame, numel=700).equals(piece)


def test_encode_refuses_a_support_out_of_order() -> None:
    """What no receiver would accept is not sent."""
    with pytest.raises(ConfigurationError, match="strictly increasing"):
        encode(sparse([3, 1], [1.0, 2.0], 5))
