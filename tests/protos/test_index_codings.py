"""Index codings: whatever is kept comes back, in few bytes, and no block but a right one is read."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thresher.protos.errors import ConfigurationError, FrameError
from thresher.protos.index_codings import (
    IndexBlock,
    IndexCoding,
    Support,
    decode_indices,
    encode_indices,
    widest_index,
)
from thresher.protos.seeded import seeded_indices
from thresher.protos.sparse import Seeded, SparseGradient

MOST = 2**62
lengths = st.integers(0, 70) | st.integers(0, 3000) | st.sampled_from([2**32 - 1, 2**32, 2**32 + 1, 2**40, MOST])


def support(indices: list[int], numel: int, seeds: tuple[Seeded, ...] = ()) -> SparseGradient:
    return SparseGradient(torch.tensor(indices, dtype=torch.int64), torch.zeros(len(indices)), numel, None, seeds)


@st.composite
def supports(draw: st.DrawFn) -> SparseGradient:
    """Scattered coordinates, runs of neighbours, both ends, everything, nothing."""
    numel = draw(lengths)
    if numel == 0:
        return support([], 0)
    starts = draw(st.sets(st.integers(0, numel - 1) | st.sampled_from([0, numel - 1]), max_size=20))
    longest = draw(st.sampled_from([1, 2, 40]))
    kept = {min(start + i, numel - 1) for start in starts for i in range(draw(st.integers(1, longest)))}
    if numel <= 70 and draw(st.booleans()):
        kept = set(range(numel)) - kept
    return support(sorted(kept), numel)


@st.composite
def seeded_supports(draw: st.DrawFn) -> SparseGradient:
    """Some ranges, one behind the other, perhaps cut at the edges of the vector; some end up dense, some empty."""
    ranges, at = [], draw(st.integers(-500, 100))
    for _ in range(draw(st.integers(0, 3))):
        numel = draw(st.integers(0, 900) | st.just(2**40))
        count = draw(st.integers(0, min(numel, 600)))
        ranges.append(Seeded(at, numel, count, draw(st.integers(0, 2**64 - 1))))
        at += numel + draw(st.integers(0, 3))
    end = max(0, at + draw(st.sampled_from([-300, -1, 0, 100])))
    drawn = [i + r.offset for r in ranges for i in seeded_indices(r.numel, r.count, r.key).tolist()]
    return support([i for i in drawn if 0 <= i < end], end, tuple(ranges))


def decoded(block: IndexBlock, count: int, numel: int) -> Support:
    return decode_indices(block.coding, block.parameter, block.data.copy(), count, numel)


@given(supports() | seeded_supports())
def test_round_trip(gradient: SparseGradient) -> None:
    """Every support comes back from its block, and what it was drawn from if that is what travelled."""
    block = encode_indices(gradient)
    if gradient.count == gradient.numel:
        assert (block.coding, block.parameter, block.data.size) == (IndexCoding.DENSE, 0, 0)
        return
    found = decoded(block, gradient.count, gradient.numel)
    assert torch.equal(found.indices, gradient.indices)
    seeds = tuple(seed for seed in gradient.seeds if seed.count)
    assert found.seeds == (seeds if block.coding is IndexCoding.SEEDED else ())


@given(supports() | seeded_supports())
def test_never_longer_than_plain_integers_or_a_bitmap(gradient: SparseGradient) -> None:
    """What else one might have sent is never shorter: so those codings need not exist."""
    size = encode_indices(gradient).data.size
    assert size <= 8 * gradient.count
    assert size <= (gradient.numel + 7) // 8
    if gradient.numel <= 2**32:
        assert size <= 4 * gradient.count


@given(supports())
def test_the_parameter_is_the_best_there_is(gradient: SparseGradient) -> None:
    """No other number of low bits would have been shorter, found by trying all."""
    block = encode_indices(gradient)
    if block.coding is not IndexCoding.RICE or not gradient.count:
        return
    gaps = [b - a - 1 for a, b in zip([-1, *gradient.indices.tolist()], gradient.indices.tolist(), strict=False)]
    widest = widest_index(gradient.numel)
    bits = {b: sum(gap >> b for gap in gaps) + len(gaps) * (b + 1) for b in range(widest)}
    bits[widest] = len(gaps) * widest
    assert block.parameter == min(bits, key=lambda b: (bits[b], b))
    assert block.data.size == (min(bits.values()) + 7) // 8


@pytest.mark.parametrize("density", [1e-4, 1e-3, 1e-2, 1e-1, 0.5])
def test_random_supports_cost_their_entropy(density: float) -> None:
    """Within 2 % of the least that any code for all supports of that size can take."""
    numel = 4_000_000
    count = int(density * numel)
    block = encode_indices(support(seeded_indices(numel, count, key=5).tolist(), numel))
    entropy = (math.lgamma(numel + 1) - math.lgamma(count + 1) - math.lgamma(numel - count + 1)) / math.log(2)
    assert block.coding is IndexCoding.RICE
    assert entropy <= 8 * block.data.size <= 1.02 * entropy


def test_neighbours_are_runs() -> None:
    """Two blocks of coordinates cost a few bytes, however long they are."""
    gradient = support([*range(1000, 3000), *range(5000, 9000)], 100_000)
    block = encode_indices(gradient)
    assert block.coding is IndexCoding.RUNS
    assert block.data.tobytes().hex(" ") == "e8 07 d0 0f d0 0f a0 1f"  # 1000, 2000, 2000, 4000


def test_seeds_cost_the_same_for_any_number_of_indices() -> None:
    """32 bytes for a range."""
    seed = Seeded(0, 100_000, 20_000, key=3)
    gradient = support(seeded_indices(100_000, 20_000, 3).tolist(), 100_000, (seed,))
    assert encode_indices(gradient).coding is IndexCoding.SEEDED
    assert encode_indices(gradient).data.size == 32
    assert encode_indices(replace(gradient, seeds=())).coding is IndexCoding.RICE


def test_seeds_of_a_small_slice_are_not_sent() -> None:
    """A reader draws all of a range: so a slice that is less than what its seeds draw sends its indices."""
    seed = Seeded(0, 100_000, 20_000, key=3)
    gradient = support(seeded_indices(100_000, 20_000, 3).tolist(), 100_000, (seed,))
    piece = gradient.slice(0, 15_000)
    assert piece.seeds == (seed,)
    assert encode_indices(piece).coding is IndexCoding.RICE
    assert encode_indices(gradient.slice(0, 30_000)).coding is IndexCoding.SEEDED


def test_wrong_seeds_are_refused() -> None:
    """They would decode to something else."""
    indices = seeded_indices(100_000, 20_000, 3).tolist()
    with pytest.raises(ConfigurationError, match="the seeds choose other indices"):
        encode_indices(support(indices, 100_000, (Seeded(0, 100_000, 20_000, key=4),)))


@pytest.mark.parametrize("indices", [[3, 1, 4], [1, 1, 2], [-1, 2, 3], [1, 2, 9], [-(2**62), 2**62, 3], [4, -1, 5]])
def test_supports_out_of_order_or_range_are_refused(indices: list[int]) -> None:
    """What no receiver would accept is not sent."""
    with pytest.raises(ConfigurationError, match="indices"):
        encode_indices(support(indices, 9))


def test_a_difference_that_overflows_is_out_of_order() -> None:
    """Order is judged by comparing, not by the sign of a difference of 64 bits."""
    with pytest.raises(ConfigurationError, match="increasing"):
        encode_indices(support([1, 2**62 + 5, -(2**62) - 5, 2**62 - 1], MOST))


def test_vectors_beyond_the_limit_are_refused() -> None:
    """Their indices could not be added up in 64 bits."""
    with pytest.raises(ConfigurationError, match=r"at most 2\*\*62 elements"):
        encode_indices(support([1], MOST + 1))


@given(st.sampled_from(list(IndexCoding)[1:]), st.integers(0, 70), st.binary(max_size=40), st.integers(0, 12), lengths)
def test_any_bytes_are_refused_or_are_a_support(
    coding: IndexCoding, parameter: int, block: bytes, count: int, numel: int
) -> None:
    """Noise gives indices that increase below numel, as many as promised, or a FrameError."""
    try:
        found = decode_indices(coding, parameter, np.frombuffer(bytearray(block), dtype=np.uint8), count, numel)
    except FrameError:
        return
    assert found.indices.numel() == count
    if count <= numel:
        SparseGradient(found.indices, torch.zeros(count), numel).validate()


def bits(text: str) -> bytearray:
    """Bytes of a string of bits, the first is the lowest of the first byte."""
    digits = text.replace(" ", "")
    return bytearray(int(digits[i : i + 8][::-1], 2) for i in range(0, len(digits), 8))


@pytest.mark.parametrize(
    ("parameter", "block", "count", "numel", "message"),
    [
        (4, bits("1000 01"), 1, 8, "parameter of RICE: found 4, expected at most 3"),
        (1, bits("1 0 1 01"), 2, 8, None),  # gaps 1 and 2: 1, 4
        (1, bits("1 0 1 1 1"), 2, 8, "other bits than one end for each"),
        (1, bits("1 0 0000 1 1"), 2, 8, "beyond numel"),
        (1, bits("1 0 00 1 1"), 2, 6, "out of range"),
        (1, bits("1 0 1"), 2, 8, "ends before its 2 gaps"),
        (1, bits("1 0 1 01 00000000"), 2, 8, "goes on after them"),
        (1, bits(""), 2, 8, "ends before its 2 gaps"),
        (0, bits("1"), 0, 8, "goes on after them"),
        (3, bits("100 110"), 2, 8, None),  # gaps 1 and 3: 1, 5
        (3, bits("100 110 1"), 2, 8, "not 2 indices of 3 bits and zeros"),
        (3, bits("100 110 00 0"), 2, 8, "not 2 indices of 3 bits and zeros"),
        (3, bits("100"), 3, 8, "not 3 indices of 3 bits and zeros"),
        (3, bits("100 111"), 2, 8, "out of range"),
    ],
)
def test_rice_blocks(parameter: int, block: bytearray, count: int, numel: int, message: str | None) -> None:
    """Right ones, and each way of being wrong."""
    data = np.frombuffer(block, dtype=np.uint8)
    if message is None:
        assert decode_indices(IndexCoding.RICE, parameter, data, count, numel).indices.numel() == count
    else:
        with pytest.raises(FrameError, match=message):
            decode_indices(IndexCoding.RICE, parameter, data, count, numel)


@pytest.mark.parametrize(
    ("block", "count", "message"),
    [
        ([2, 3, 1, 2], 5, None),
        ([2, 3, 1, 4], 7, None),
        ([2, 3, 1, 5], 8, "beyond 10"),
        ([2, 3, 1, 4, 0], 7, "not pairs"),
        ([2, 3, 1], 3, "not pairs"),
        ([2, 3, 0, 2], 5, "two that touch"),
        ([2, 0, 1, 2], 2, "empty run"),
        ([2, 3, 1, 2], 6, "keeps 5 coordinates, the header says 6"),
        ([2, 3, 1, 0x82], 5, "cut off"),
        ([2, 0x83, 0x00], 3, "longer than its number needs"),
    ],
)
def test_runs_blocks(block: list[int], count: int, message: str | None) -> None:
    """Right ones, and each way of being wrong."""
    data = np.array(block, dtype=np.uint8)
    if message is None:
        assert decode_indices(IndexCoding.RUNS, 0, data, count, 10).indices.numel() == count
    else:
        with pytest.raises(FrameError, match=message):
            decode_indices(IndexCoding.RUNS, 0, data, count, 10)


def record(offset: int, numel: int, count: int, key: int) -> bytes:
    parts = (offset.to_bytes(8, "little", signed=True), *(word.to_bytes(8, "little") for word in (numel, count, key)))
    return b"".join(parts)


@pytest.mark.parametrize(
    ("block", "count", "message"),
    [
        (record(5, 50, 20, 1), 20, None),
        (record(5, 50, 20, 1) + record(55, 40, 2, 1), 22, None),
        (record(5, 50, 20, 1)[:-1], 20, "expected a multiple of 32"),
        (record(5, 50, 51, 1), 51, "no 51 of 50 coordinates"),
        (record(5, 2**63, 2, 1), 2, "coordinates can be drawn"),
        (record(-(2**63), 50, 2, 1), 2, "coordinates can be drawn"),
        (record(0, 1000, 101, 1), 9, "more than numel, 100"),
        (record(0, 1000, 60, 1) + record(1000, 1000, 60, 1), 9, "more than numel, 100"),
        (record(5, 50, 0, 1), 0, "draws no index"),
        (record(5, 50, 20, 1), 21, "does not draw 21 indices in increasing order: found 20"),
        (record(5, 50, 20, 1) + record(5, 50, 20, 1), 40, "increasing order"),
        (record(55, 40, 2, 1) + record(5, 50, 20, 1), 22, "increasing order"),
    ],
)
def test_seeded_blocks(block: bytes, count: int, message: str | None) -> None:
    """Right ones, and each way of being wrong; nothing is drawn before the numbers are bounded."""
    data = np.frombuffer(bytearray(block), dtype=np.uint8)
    if message is None:
        assert decode_indices(IndexCoding.SEEDED, 0, data, count, 100).indices.numel() == count
    else:
        with pytest.raises(FrameError, match=message):
            decode_indices(IndexCoding.SEEDED, 0, data, count, 100)


@pytest.mark.parametrize("coding", [IndexCoding.RUNS, IndexCoding.SEEDED])
def test_only_rice_has_a_parameter(coding: IndexCoding) -> None:
    """Anything but 0 is refused elsewhere."""
    with pytest.raises(FrameError, match="parameter of the index coding: found 1, expected 0"):
        decode_indices(coding, 1, np.empty(0, dtype=np.uint8), 0, 10)
