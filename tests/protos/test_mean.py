"""The mean of a round: equal to the dense sum over the members, bit for bit, on the union of what was pushed."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from thresher.protos.mean import mean_of
from thresher.protos.sparse import SparseGradient

numbers = st.floats(width=32, allow_nan=False, allow_infinity=False) | st.sampled_from([0.0, -0.0, 1e-45, 3e38])


def bits(values: Tensor) -> list[int]:
    found: list[int] = values.view(torch.int32).tolist()
    return found


@st.composite
def rounds(draw: st.DrawFn) -> tuple[list[SparseGradient], int]:
    numel = draw(st.integers(1, 12))
    pushes = []
    for _ in range(draw(st.integers(1, 5))):
        kept = sorted(draw(st.sets(st.integers(0, numel - 1)) | st.just(set(range(numel)))))
        values = draw(st.lists(numbers, min_size=len(kept), max_size=len(kept)))
        pushes.append(SparseGradient(torch.tensor(kept, dtype=torch.int64), torch.tensor(values), numel))
    return pushes, draw(st.integers(len(pushes), len(pushes) + 3))


@given(st.integers(1, 5), st.integers(1, 8), st.data())
def test_dense_pushes_give_the_dense_mean(workers: int, numel: int, data: st.DataObject) -> None:
    """Law 5's arithmetic: (p0 + p1 + …) / members in rank order, bit for bit, negative zeros included."""
    vectors = [torch.tensor(data.draw(st.lists(numbers, min_size=numel, max_size=numel))) for _ in range(workers)]
    total = vectors[0].clone()
    for vector in vectors[1:]:
        total = total + vector
    mean = mean_of([SparseGradient.dense(vector) for vector in vectors], workers)
    assert bits(mean.densify()) == bits(total / workers)


@given(rounds())
def test_the_support_is_the_union(made: tuple[list[SparseGradient], int]) -> None:
    """A coordinate is in the mean exactly when a push holds it, whatever its value: zeros that were sent stay sent."""
    pushes, members = made
    mean = mean_of(pushes, members)
    mean.validate()
    assert set(mean.indices.tolist()) == {index for push in pushes for index in push.indices.tolist()}


@given(rounds())
def test_each_value_is_the_sum_in_rank_order_of_those_that_hold_it(made: tuple[list[SparseGradient], int]) -> None:
    """Coordinate by coordinate, the same float32 additions in the same order as for dense vectors."""
    pushes, members = made
    mean = mean_of(pushes, members)
    for index, value in zip(mean.indices.tolist(), mean.values, strict=True):
        held = [push.values[push.indices == index][0] for push in pushes if index in push.indices.tolist()]
        total = held[0].clone()
        for one in held[1:]:
            total = total + one
        assert bits(value.view(1)) == bits((total / members).view(1))


@given(rounds(), st.data())
def test_the_mean_of_a_slice_is_the_slice_of_the_mean(
    made: tuple[list[SparseGradient], int], data: st.DataObject
) -> None:
    """Law 4 for aggregation: where the vector is cut does not change a bit."""
    pushes, members = made
    begin = data.draw(st.integers(0, pushes[0].numel - 1))
    end = data.draw(st.integers(begin + 1, pushes[0].numel))
    whole = mean_of(pushes, members).slice(begin, end)
    assert mean_of([push.slice(begin, end) for push in pushes], members).equals(whole)


@given(rounds())
def test_pushes_are_not_written_to(made: tuple[list[SparseGradient], int]) -> None:
    """A push may be a view of a received frame, or repeated: the sum has memory of its own."""
    pushes, members = made
    before = [push.values.clone() for push in pushes]
    mean_of(pushes, members)
    assert [bits(push.values) for push in pushes] == [bits(values) for values in before]
