"""The shadow: near the parameters after every round, and the same vector at everyone who follows it."""

import math
from weakref import ref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from thresher.protos.codec import decode, encode
from thresher.protos.errors import BehindError, ConfigurationError, LayoutError, ProtocolError
from thresher.protos.sparse import SparseGradient
from thresher.server.shadow import Shadow

NAN_PAYLOADS = [0x7FC00000, 0x7FC00001, -0x00400000]
"""Bits of three different NaN."""

any_bits = st.one_of(
    st.floats(width=32, allow_nan=False).map(lambda value: int(np.float32(value).view(np.int32))),
    st.sampled_from(NAN_PAYLOADS),
)
thresholds = st.one_of(st.sampled_from([0.0, 0.003, 1.0]), st.floats(0.0, 1e30))


@st.composite
def runs(draw: st.DrawFn) -> list[Tensor]:
    """The parameters of versions 0, 1, …: some coordinates change from one to the next, to anything or by a little."""
    numel = draw(st.integers(0, 12))
    bits = draw(st.lists(any_bits, min_size=numel, max_size=numel))
    versions = [as_floats(bits)]
    for _ in range(draw(st.integers(1, 6))):
        parameters = versions[-1].clone()
        for at in draw(st.sets(st.integers(0, numel - 1))) if numel else ():
            parameters[at] = draw(st.one_of(any_bits.map(as_float), st.just(parameters[at] + 0.003)))
        versions.append(parameters)
    return versions


def as_floats(bits: list[int]) -> Tensor:
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32)


def as_float(bits: int) -> Tensor:
    return as_floats([bits])[0]


def bits_of(vector: Tensor) -> list[int]:
    return vector.contiguous().view(torch.int32).tolist()


def followed(vector: Tensor, assignments: SparseGradient) -> Tensor:
    """What a worker holds after it has read the frame of ``assignments``."""
    read = decode(encode(assignments), numel=vector.numel())
    return vector.index_copy(0, read.indices, read.values)


@given(runs(), thresholds)
def test_shadow_bound(run: list[Tensor], threshold: float) -> None:
    """Design law 10: after each round every coordinate is nearer than the threshold, or the very same bits."""
    shadow = Shadow(run[0], threshold)
    for version, parameters in enumerate(run[1:], start=1):
        shadow.advance(parameters, version)
        distance = (parameters.double() - shadow.values.double()).abs()
        equal = parameters.view(torch.int32) == shadow.values.view(torch.int32)
        assert bool(((distance < float(np.float32(threshold))) | equal).all())


@given(runs(), thresholds)
def test_assigned_is_what_moved_far_enough_and_no_more(run: list[Tensor], threshold: float) -> None:
    """The compiled loop assigns the coordinates that the rule in plain torch names, ascending."""
    shadow = Shadow(run[0], threshold)
    for version, parameters in enumerate(run[1:], start=1):
        before = shadow.values.clone()
        near = (parameters - before).abs() < float(np.float32(threshold))
        moved = (parameters.view(torch.int32) != before.view(torch.int32)) & ~near
        assigned = shadow.advance(parameters, version)
        assigned.validate()
        assert assigned.indices.tolist() == moved.nonzero().view(-1).tolist()
        assert bits_of(assigned.values) == bits_of(parameters[moved])


@given(runs())
def test_threshold_0_is_exact(run: list[Tensor]) -> None:
    """With a threshold of 0 the shadow has the parameters' bits: signs of zero and payloads of NaN included."""
    shadow = Shadow(run[0], 0.0)
    for version, parameters in enumerate(run[1:], start=1):
        shadow.advance(parameters, version)
        assert bits_of(shadow.values) == bits_of(parameters)


@given(runs(), thresholds)
def test_who_missed_versions_catches_up_bit_for_bit(run: list[Tensor], threshold: float) -> None:
    """What is sent since u makes w of u into w of v, for every u and v, by the bytes that travel, and no more is."""
    shadow = Shadow(run[0], threshold)
    values, touched = [shadow.values.clone()], [set[int]()]
    for version, parameters in enumerate(run[1:], start=1):
        told = shadow.advance(parameters, version)
        assert bits_of(followed(values[-1], told)) == bits_of(shadow.values)
        values.append(shadow.values.clone())
        touched.append(set(told.indices.tolist()))
        for u, then in enumerate(values):
            missed = shadow.since(u)
            assert missed.indices.tolist() == sorted(set().union(*touched[u + 1 :]))
            assert bits_of(followed(then, missed)) == bits_of(shadow.values)


@given(runs(), thresholds, st.data())
def test_replay_from_a_checkpoint_gives_the_same_shadow(
    run: list[Tensor], threshold: float, data: st.DataObject
) -> None:
    """Design law 8 for shadows: one that is restored from its values and fed the rest assigns the same."""
    shadow, restart = Shadow(run[0], threshold), data.draw(st.integers(0, len(run) - 1))
    restored = shadow
    for version, parameters in enumerate(run):
        if version:
            told = shadow.advance(parameters, version)
            assert restored is shadow or restored.advance(parameters, version).equals(told)
        if version == restart:
            restored = Shadow(shadow.values, threshold, version)
    assert bits_of(restored.values) == bits_of(shadow.values)


@given(runs(), st.integers(0, 4000))
def test_memory_is_bounded_and_what_is_behind_is_refused(run: list[Tensor], cap_bytes: int) -> None:
    """Whatever the cap, what can still be told is told right, and the rest raises; the kept indices are within it."""
    shadow = Shadow(run[0], 0.0, cap_bytes=cap_bytes)
    for version, parameters in enumerate(run[1:], start=1):
        shadow.advance(parameters, version)
    kept = 0
    for u in range(len(run)):
        try:
            told = shadow.since(u)
        except (BehindError, ProtocolError):
            assert kept == 0, "a version is forgotten only after all that came before it"
            continue
        kept += 1
        assert 8 * told.count <= cap_bytes
        assert bits_of(followed(run[u], told)) == bits_of(run[-1])
    assert kept, "a worker at the present version misses nothing"


def test_versions_without_assignments_take_no_memory() -> None:
    """Nothing is kept of rounds that move nothing far enough, and they can be told for ever."""
    shadow = Shadow(torch.zeros(1000), 1.0, cap_bytes=0)
    for version in range(1, 1001):
        assert shadow.advance(torch.full((1000,), 0.5), version).count == 0
    assert shadow.since(0).count == 0
    shadow.advance(torch.ones(1000), 1001)
    with pytest.raises(BehindError, match="needs a snapshot"):
        shadow.since(1000)


def test_the_cap_counts_the_objects_too() -> None:
    """A hundred versions of one coordinate each are 800 bytes of indices, and far more with all that is around them."""
    shadow = Shadow(torch.zeros(1), 0.0, cap_bytes=10_000)
    for version in range(1, 101):
        shadow.advance(torch.tensor([float(version)]), version)
    with pytest.raises(BehindError, match="needs a snapshot"):
        shadow.since(0)
    assert shadow.since(95).values.tolist() == [100.0]


def test_cut_forgets_what_came_before_and_nothing_else() -> None:
    """After a cut at 2, a worker at 2 is told what it misses and one at 1 is refused; cutting again changes nothing."""
    shadow = Shadow(torch.zeros(3), 0.0)
    for version in (1, 2, 3):
        shadow.advance(torch.arange(3.0) * version, version)
    for version in (2, 1, 2):
        shadow.cut(version)
        assert shadow.since(2).values.tolist() == [3.0, 6.0]
        with pytest.raises(BehindError, match="kept from version 2 on, a worker at 1"):
            shadow.since(1)


def test_what_is_cut_is_freed() -> None:
    """The shadow holds on to no indices of versions that nobody needs."""
    shadow = Shadow(torch.zeros(3), 0.0)
    indices = [ref(shadow.advance(torch.tensor([0.0, 0.0, float(version)]), version).indices) for version in (1, 2, 3)]
    shadow.cut(2)
    assert [one() is None for one in indices] == [True, True, False]


@pytest.mark.parametrize("threshold", [0.0, 0.003])
def test_nan_and_infinity_are_told_once(threshold: float) -> None:
    """They arrive when they appear, are not repeated while they stay, and are replaced when they go."""
    shadow = Shadow(torch.zeros(3), threshold)
    broken = torch.tensor([math.nan, math.inf, -math.inf])
    assert shadow.advance(broken, 1).indices.tolist() == [0, 1, 2]
    assert shadow.advance(broken, 2).count == 0
    assert shadow.advance(-broken, 3).indices.tolist() == [0, 1, 2]
    assert shadow.advance(torch.ones(3), 4).values.tolist() == [1.0, 1.0, 1.0]


def test_negative_zero_is_zero_unless_the_threshold_is_0() -> None:
    """They differ by 0, which is below any threshold but 0."""
    zero, negative = torch.zeros(1), torch.tensor([-0.0])
    assert Shadow(zero, 0.003).advance(negative, 1).count == 0
    assert Shadow(zero, 0.0).advance(negative, 1).count == 1


def test_a_difference_of_exactly_the_threshold_is_assigned() -> None:
    """The bound is strict, on either side."""
    assert Shadow(torch.zeros(3), 0.5).advance(torch.tensor([0.5, -0.5, 0.4999]), 1).indices.tolist() == [0, 1]


def test_parameters_are_copied_and_assignments_stay_as_they_are() -> None:
    """Nobody else's tensor is written to, and nobody's writing changes the shadow."""
    start = torch.zeros(4)
    shadow = Shadow(start, 0.0)
    strided = torch.arange(8.0)[::2]
    told = shadow.advance(strided, 1)
    strided.zero_()
    all_told = shadow.advance(torch.full((4,), 9.0), 2)
    shadow.advance(torch.ones(4), 3)
    assert start.tolist() == [0.0] * 4
    assert (told.indices.tolist(), told.values.tolist()) == ([1, 2, 3], [2.0, 4.0, 6.0])
    assert (all_told.indices.tolist(), all_told.values.tolist()) == ([0, 1, 2, 3], [9.0] * 4)


@pytest.mark.parametrize("parameters", [torch.zeros(2, 2), torch.zeros(4, dtype=torch.float64)])
def test_only_float32_vectors_have_a_shadow(parameters: Tensor) -> None:
    """Another shape or dtype is refused at the beginning and later, and changes nothing."""
    with pytest.raises(LayoutError, match="float32"):
        Shadow(parameters, 0.0)
    shadow = Shadow(torch.ones(4), 0.0)
    with pytest.raises(LayoutError, match=r"follows float32 parameters \[4\]"):
        shadow.advance(parameters, 1)
    assert (shadow.version, shadow.values.tolist()) == (0, [1.0] * 4)


@pytest.mark.parametrize("threshold", [-0.001, math.nan, math.inf, 1e39])
def test_threshold_is_a_number_from_0(threshold: float) -> None:
    """What is negative, or no finite float32, is refused."""
    with pytest.raises(ConfigurationError, match="threshold of the shadow"):
        Shadow(torch.zeros(1), threshold)


def test_a_negative_cap_is_refused() -> None:
    """There is no memory below none."""
    with pytest.raises(ConfigurationError, match="cap_bytes"):
        Shadow(torch.zeros(1), 0.0, cap_bytes=-1)


def test_versions_only_go_up() -> None:
    """The present version again, an earlier one, and what lies in the future are refused and change nothing."""
    shadow = Shadow(torch.zeros(1), 0.0, version=5)
    for version in (4, 5):
        with pytest.raises(ProtocolError, match=f"at version 5 and cannot advance to {version}"):
            shadow.advance(torch.ones(1), version)
    with pytest.raises(ProtocolError, match="6 has not come yet"):
        shadow.since(6)
    with pytest.raises(ProtocolError, match="6 has not come yet"):
        shadow.cut(6)
    with pytest.raises(BehindError, match="kept from version 5 on"):
        shadow.since(4)
    assert (shadow.version, shadow.values.tolist()) == (5, [0.0])
