"""The layout: slices partition the vector, segments tile them, and layouts are equal or their difference is told."""

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from thresher.protos.errors import ConfigurationError, LayoutError
from thresher.protos.layout import Layout, Slice, TensorSpec

DTYPES = ("float32", "bfloat16", "float16")


@st.composite
def specs(draw: st.DrawFn, names: tuple[str, ...]) -> tuple[TensorSpec, ...]:
    shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
    aliases = st.sampled_from([(), ("tied",), ("tied", "again")])
    return tuple(
        TensorSpec(name, draw(shapes), draw(st.sampled_from(DTYPES)), draw(st.integers(0, 2)), draw(aliases))
        for name in names
    )


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    names = draw(st.permutations(["a", "b.weight", "b.bias", "c"]))
    cut = draw(st.integers(1, 4))
    trained = draw(specs(tuple(names[:cut])))
    assume(any(spec.numel for spec in trained))
    return Layout(trained, draw(specs(tuple(names[cut:]))))


def layout_of(*shapes: tuple[int, ...]) -> Layout:
    return Layout(tuple(TensorSpec(f"t{index}", shape, "float32", index) for index, shape in enumerate(shapes)))


@given(layouts(), st.data())
def test_slices_partition_the_vector(layout: Layout, data: st.DataObject) -> None:
    """For any number of shards, slices follow each other without gap or overlap and differ by one element at most."""
    shards = data.draw(st.integers(1, layout.numel))
    slices = layout.slices(shards)
    assert [piece.begin for piece in slices] == [0, *(piece.end for piece in slices[:-1])]
    assert slices[-1].end == layout.numel
    assert max(piece.numel for piece in slices) - min(piece.numel for piece in slices) <= 1


@given(layouts(), st.data())
def test_segments_tile_their_slice(layout: Layout, data: st.DataObject) -> None:
    """The segments of a slice follow each other, fill it, and each lies in its tensor where the flat vector says."""
    shards = data.draw(st.integers(1, layout.numel))
    piece = layout.shard_slice(data.draw(st.integers(0, shards - 1)), shards)
    assert [segment.begin for segment in piece.segments] == [0, *(segment.end for segment in piece.segments[:-1])]
    assert piece.segments[-1].end == piece.numel
    for segment in piece.segments:
        assert segment.begin < segment.end
        assert piece.begin + segment.begin == layout.offsets[segment.tensor] + segment.offset
        assert segment.offset + segment.end - segment.begin <= layout.trained[segment.tensor].numel
        assert segment.group == layout.trained[segment.tensor].group


@given(layouts(), st.data())
def test_every_element_is_in_one_segment_of_one_slice(layout: Layout, data: st.DataObject) -> None:
    """Over all slices each tensor is covered exactly, element by element."""
    slices = layout.slices(data.draw(st.integers(1, layout.numel)))
    covered = [
        (segment.tensor, segment.offset + position)
        for piece in slices
        for segment in piece.segments
        for position in range(segment.end - segment.begin)
    ]
    expected = [(index, position) for index, spec in enumerate(layout.trained) for position in range(spec.numel)]
    assert covered == expected


@given(layouts(), layouts())
def test_fingerprint_and_differences_agree_with_equality(one: Layout, other: Layout) -> None:
    """Fingerprints are equal, and no difference is listed, exactly when the layouts are equal."""
    assert (one.fingerprint == other.fingerprint) == (one == other)
    assert (one.differences(other) == []) == (one == other)


@given(layouts())
def test_an_equal_layout_has_the_same_fingerprint(layout: Layout) -> None:
    """A layout rebuilt from its values has the fingerprint of the first one, and no difference to it."""
    again = Layout(tuple(replace(spec) for spec in layout.trained), tuple(replace(spec) for spec in layout.untrained))
    assert again.fingerprint == layout.fingerprint
    assert layout.differences(again) == []


def test_fingerprint_is_pinned() -> None:
    """It is the same on every machine and in every release: workers of a mixed cluster compare it."""
    assert layout_of((2, 3), ()).fingerprint == "dc3873f1075181fe"


BASE = Layout(
    (TensorSpec("conv.weight", (8, 1, 3, 3), "float32"), TensorSpec("fc.bias", (10,), "float32")),
    (TensorSpec("bn.mean", (8,), "float32"),),
)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (replace(BASE, trained=BASE.trained[:1]), "trained tensor fc.bias float32 [10] is registered but missing here"),
        (replace(BASE, untrained=()), "untrained tensor bn.mean float32 [8] is registered but missing here"),
        (
            replace(BASE, trained=(*BASE.trained, TensorSpec("extra", (1,), "float32"))),
            "trained tensor extra float32 [1] is not registered",
        ),
        (
            replace(BASE, trained=(replace(BASE.trained[0], shape=(4, 1, 3, 3)), BASE.trained[1])),
            "conv.weight float32 [8, 1, 3, 3] is registered, here it is float32 [4, 1, 3, 3]",
        ),
        (
            replace(BASE, trained=(BASE.trained[0], replace(BASE.trained[1], dtype="bfloat16"))),
            "fc.bias float32 [10] is registered, here it is bfloat16 [10]",
        ),
        (
            replace(BASE, trained=BASE.trained[::-1]),
            "another order: conv.weight is registered where fc.bias is here",
        ),
        (
            replace(BASE, trained=(BASE.trained[0], replace(BASE.trained[1], group=1))),
            "fc.bias is registered in parameter group 0 with aliases [], here it is in group 1",
        ),
        (
            replace(BASE, trained=(BASE.trained[0], replace(BASE.trained[1], aliases=("head.bias",)))),
            "here it is in group 0 with ['head.bias']",
        ),
    ],
    ids=["missing", "missing buffer", "extra", "shape", "dtype", "order", "group", "alias"],
)
def test_differences_say_what_differs(other: Layout, said: str) -> None:
    """Each kind of difference is one readable line or two, and names the tensor."""
    assert any(said in line for line in BASE.differences(other))


def test_one_missing_tensor_is_one_line() -> None:
    """A tensor missing at the front is not told as a shift of all that follow."""
    assert len(BASE.differences(replace(BASE, trained=BASE.trained[1:]))) == 1


def test_many_differences_are_cut() -> None:
    """A wholly different model gives a short list and the number of lines left out."""
    other = Layout(tuple(TensorSpec(f"x{index}", (1,), "float32") for index in range(20)))
    lines = BASE.differences(other, limit=5)
    assert len(lines) == 6
    assert lines[-1] == "and 18 more"


@pytest.mark.parametrize("trained", [(), (TensorSpec("a", (0, 3), "float32"),)])
def test_a_model_without_trainable_parameter_is_refused(trained: tuple[TensorSpec, ...]) -> None:
    """Nothing to train, or only empty tensors, is refused with the likely reasons."""
    with pytest.raises(LayoutError, match=r"no trainable parameter.*requires_grad"):
        Layout(trained, (TensorSpec("frozen", (3,), "float32"),))


def test_a_name_that_occurs_twice_is_refused() -> None:
    """Names are keys, over trained and untrained tensors together; the double one is named."""
    with pytest.raises(LayoutError, match=r"occur twice: a$"):
        Layout((TensorSpec("a", (1,), "float32"), TensorSpec("b", (1,), "float32")), (TensorSpec("a", (2,), "int64"),))


def test_more_shards_than_elements_are_refused() -> None:
    """A shard without elements is no shard; the message says how many are possible."""
    layout = layout_of((2,), (1,))
    assert [piece.numel for piece in layout.slices(3)] == [1, 1, 1]
    with pytest.raises(ConfigurationError, match="4 shards are more than the model's 3 trained elements"):
        layout.slices(4)


@pytest.mark.parametrize(("shard", "shards"), [(-1, 2), (2, 2), (0, 0)])
def test_a_shard_that_does_not_exist_is_refused(shard: int, shards: int) -> None:
    """A position outside the number of shards is refused."""
    with pytest.raises(ConfigurationError, match=f"no shard {shard} among {shards}"):
        layout_of((9,)).shard_slice(shard, shards)


def test_a_tensor_may_be_cut_and_a_scalar_is_one_element() -> None:
    """An example to read: a matrix of six and a scalar on two shards."""
    first, second = layout_of((2, 3), ()).slices(2)
    assert (first.begin, first.end, second.begin, second.end) == (0, 3, 3, 7)
    assert [(s.tensor, s.begin, s.end, s.offset) for s in second.segments] == [(0, 0, 3, 3), (1, 3, 4, 0)]
    assert isinstance(first, Slice)
