"""Values and messages: all that can be said comes back as it was, and payloads never exceed what was announced."""

import tracemalloc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.protos.bookmarks import bookmarks

from thresher.protos.bookmark import Bookmark
from thresher.protos.codec import encode
from thresher.protos.consistency import Consistency
from thresher.protos.errors import ConfigurationError, FrameError, LayoutError, OptimizerError, ProtocolError
from thresher.protos.layout import Layout, TensorSpec
from thresher.protos.messages import (
    CHUNK_BYTES,
    Payload,
    bookmark_from_message,
    bookmark_to_message,
    chunks,
    consistency_from_message,
    consistency_to_message,
    layout_from_message,
    layout_to_message,
    optimizer_from_message,
    optimizer_to_message,
    overrides_from_messages,
    overrides_to_messages,
    payload_bound,
)
from thresher.protos.optimizers import SUPPORTED, OptimizerSpec, Override
from thresher.protos.sparse import SparseGradient
from thresher.v1 import aggregation_pb2 as pb

names = st.text("abc.é_0", min_size=1, max_size=8)
values = (
    st.floats(allow_nan=False)
    | st.booleans()
    | st.text(max_size=8)
    | st.lists(st.floats(allow_nan=False), max_size=3).map(tuple)
)
tensor_specs = st.builds(
    TensorSpec,
    name=names,
    shape=st.lists(st.integers(0, 2**40), max_size=3).map(tuple),
    dtype=st.sampled_from(["float32", "bfloat16", "int64"]),
    group=st.integers(0, 9),
    aliases=st.lists(names, max_size=2).map(tuple),
)
override_lists = st.lists(st.builds(Override, st.integers(0, 5), names, values), max_size=4).map(tuple)


@given(st.lists(tensor_specs, min_size=2, max_size=6, unique_by=lambda spec: spec.name), st.data())
def test_layout_round_trip(specs: list[TensorSpec], data: st.DataObject) -> None:
    """A layout comes back equal, with the same fingerprint, and passes through bytes."""
    cut = data.draw(st.integers(1, len(specs)))
    trained = (TensorSpec("one", (1,), "float32"), *specs[:cut])
    layout = Layout(trained, tuple(specs[cut:]))
    found = layout_from_message(pb.Layout.FromString(layout_to_message(layout).SerializeToString()))
    assert found == layout
    assert found.fingerprint == layout.fingerprint


@given(st.sampled_from(sorted(SUPPORTED)), st.lists(st.dictionaries(names, values, max_size=4), max_size=3))
def test_optimizer_round_trip(name: str, groups: list[dict[str, float | bool | str | tuple[float, ...]]]) -> None:
    """Every kind of value keeps its type: a switch is no number, an empty tuple no missing value."""
    spec = OptimizerSpec(name, tuple(groups))
    found = optimizer_from_message(pb.Optimizer.FromString(optimizer_to_message(spec).SerializeToString()))
    assert found == spec
    assert [{k: type(v) for k, v in group.items()} for group in found.groups] == [
        {k: type(v) for k, v in group.items()} for group in groups
    ]


@given(override_lists)
def test_overrides_round_trip(overrides: tuple[Override, ...]) -> None:
    """Overrides come back in their order."""
    assert overrides_from_messages(overrides_to_messages(overrides)) == overrides


@pytest.mark.parametrize(
    "consistency",
    [
        Consistency(),
        Consistency(quorum=3, grace=0.5, max_staleness=7),
        Consistency("ssp", staleness=4),
        Consistency("async", downlink="shadow", shadow_threshold=0.003),
        Consistency("ssp", momentum_per_push=True),
        Consistency("async", staleness_aware=True),
    ],
    ids=Consistency.describe,
)
def test_consistency_round_trip(consistency: Consistency) -> None:
    """When rounds close comes back equal, and passes through bytes."""
    message = pb.Consistency.FromString(consistency_to_message(consistency).SerializeToString())
    assert consistency_from_message(message) == consistency


def test_an_unknown_mode_is_refused_when_it_is_read() -> None:
    """Also the empty one, of a worker that does not know modes."""
    with pytest.raises(ConfigurationError, match="mode must be one of sync, ssp, async, not ''"):
        consistency_from_message(pb.Consistency())


def test_a_hyperparameter_without_a_value_is_refused() -> None:
    """An empty value is no default."""
    with pytest.raises(OptimizerError, match="without a value"):
        overrides_from_messages([pb.Override(group=0, name="lr")])


def test_an_unknown_optimizer_is_refused_when_it_is_read() -> None:
    """What the shards do not apply does not become a value."""
    with pytest.raises(OptimizerError, match="they apply SGD"):
        optimizer_from_message(pb.Optimizer(name="Lion"))


def test_a_negative_size_is_refused() -> None:
    """Two negative sizes would multiply to a plausible number of elements."""
    message = pb.Layout(trained=[pb.Tensor(name="w", shape=[-2, -3], dtype="float32")])
    with pytest.raises(LayoutError, match=r"w has a negative size: \[-2, -3\]"):
        layout_from_message(message)


PIECE = Layout((TensorSpec("a", (4,), "float32"), TensorSpec("b", (5,), "float32"))).shard_slice(0, 1)


sizes = st.integers(0, 3) | st.sampled_from([CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES])


@given(sizes)
def test_chunks_put_together_are_the_payload(size: int) -> None:
    """The first announces the whole length, none is longer than a chunk, and nothing is lost."""
    payload = bytes(index % 251 for index in range(min(size, 1000))).ljust(size, b"x")
    parts = list(chunks(payload))
    assert b"".join(part for _, part in parts) == payload
    assert [announced for announced, _ in parts] == [size] + [0] * (len(parts) - 1)
    assert all(len(part) <= CHUNK_BYTES for _, part in parts)


@given(st.lists(st.binary(max_size=5), min_size=1, max_size=6))
def test_a_payload_is_complete_with_its_last_byte(parts: list[bytes]) -> None:
    """`add` says True exactly when all announced bytes have come, and the data is theirs."""
    whole = b"".join(parts)
    payload = Payload(len(whole), bound=100)
    taken = 0
    for part in parts:
        taken += len(part)
        assert payload.add(part) == (taken == len(whole))
    assert bytes(payload.data) == whole


@given(st.integers(0, 10), st.integers(1, 10))
def test_more_bytes_than_announced_are_refused(announced: int, more: int) -> None:
    """The excess is not kept."""
    payload = Payload(announced, bound=100)
    payload.add(bytes(announced))
    with pytest.raises(FrameError, match=f"{announced} bytes was announced, more came"):
        payload.add(bytes(more))
    assert len(payload.data) == announced


def test_a_huge_claim_is_refused_before_anything_is_allocated() -> None:
    """A size above the bound is refused, and one below it takes memory only as chunks really come."""
    tracemalloc.start()
    try:
        with pytest.raises(FrameError, match="a payload of 1099511627776 bytes is announced; at most 80"):
            Payload(2**40, bound=80)
        Payload(2**40, bound=2**41).add(b"abc")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@given(st.sets(st.integers(0, PIECE.numel - 1)), st.data())
def test_every_frame_of_a_slice_is_within_its_bound(kept: set[int], data: st.DataObject) -> None:
    """The bound lets every honest frame through."""
    numbers = data.draw(st.lists(st.floats(width=32, allow_nan=False), min_size=len(kept), max_size=len(kept)))
    gradient = SparseGradient(torch.tensor(sorted(kept), dtype=torch.int64), torch.tensor(numbers), PIECE.numel)
    assert len(encode(gradient)) <= payload_bound(PIECE)


@given(bookmarks)
def test_a_bookmark_comes_back_as_it_was(bookmark: Bookmark) -> None:
    """Every field."""
    assert bookmark_from_message(bookmark_to_message(bookmark)) == bookmark


@pytest.mark.parametrize(
    "wrong",
    [
        {"begun": 0},
        {"shares": []},
        {"shares": [pb.Share(workers=0, taken=3)]},
        {"pass_step": 8},
    ],
    ids=["no pass", "no shares", "shares of nobody", "a pass that begins later"],
)
def test_a_bookmark_that_is_no_place_is_refused(wrong: dict[str, object]) -> None:
    """Nobody could go on there."""
    fields: dict[str, object] = {"step": 7, "begun": 1, "pass_step": 2, "shares": [pb.Share(workers=2, taken=3)]}
    assert bookmark_from_message(pb.Bookmark(**fields)).step == 7  # type: ignore[arg-type] # of the right types
    with pytest.raises(ProtocolError, match="a bookmark in pass"):
        bookmark_from_message(pb.Bookmark(**fields | wrong))  # type: ignore[arg-type] # of the right types
