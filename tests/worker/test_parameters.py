"""The model as one flat vector, and back."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from thresher.protos.errors import LayoutError, NonFiniteGradientError
from thresher.protos.optimizers import spec_of
from thresher.protos.replica import PARAMETERS, Replica
from thresher.protos.sparse import SparseGradient
from thresher.worker.parameters import ModelParameters

shapes = st.lists(st.sampled_from([(), (1,), (3,), (2, 3), (2, 1, 2), (0,)]), min_size=1, max_size=4).filter(
    lambda found: any(0 not in shape for shape in found)
)


def model_of(found: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> nn.ParameterList:
    tensors = [nn.Parameter(torch.arange(1.0, torch.Size(shape).numel() + 1).view(shape).to(dtype)) for shape in found]
    return nn.ParameterList(tensors)


def laid_out(model: nn.Module, **options: Any) -> ModelParameters:
    return ModelParameters(model, torch.optim.SGD(model.parameters(), **{"lr": 1.0, **options}))


@given(shapes, st.integers(1, 5), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_state_and_assign_are_inverse(found: list[tuple[int, ...]], shards: int, dtype: torch.dtype) -> None:
    """What `state` cuts for the shards, `assign` puts back into the model, however many shards there are."""
    model = model_of(found, dtype)
    parameters = laid_out(model)
    slices = parameters.layout.slices(min(shards, parameters.layout.numel))
    before = [parameter.detach().clone() for parameter in model]
    pieces = [(piece, parameters.state(piece)[PARAMETERS]) for piece in slices]
    assert all(values.dtype is torch.float32 for _, values in pieces)
    with torch.no_grad():
        for parameter in model:
            parameter.fill_(-1)
    assert parameters.replace(pieces) == [str(index) for index, value in enumerate(before) if value.numel()]
    assert all(torch.equal(one, other) for one, other in zip(model, before, strict=True))
    assert parameters.replace(pieces) == []


@given(shapes, st.data())
def test_gather_lays_gradients_out(found: list[tuple[int, ...]], data: st.DataObject) -> None:
    """Each gradient lies at its tensor's offset, as float32; a missing one is zero and marked absent."""
    model = model_of(found)
    parameters = laid_out(model)
    present = tuple(data.draw(st.booleans()) for _ in found)
    for parameter in model:
        parameter.grad = parameter.detach().clone()
    parameters.gather()  # what an earlier step left must not be seen
    for parameter, is_present in zip(model, present, strict=True):
        parameter.grad = parameter.grad if is_present else None
    flat, presence = parameters.gather()
    assert presence == present
    expected = [p.detach().reshape(-1) * is_present for p, is_present in zip(model, present, strict=True)]
    assert torch.equal(flat, torch.cat(expected))


def test_gather_unscales_and_takes_sparse_gradients() -> None:
    """A sparse gradient is laid out densely, duplicates added up; the inverse of a loss scale is multiplied in."""
    model = nn.Embedding(3, 2, sparse=True)
    parameters = laid_out(model)
    model(torch.tensor([2, 0, 2])).sum().backward()
    flat, presence = parameters.gather(inverse_scale=0.5)
    assert presence == (True,)
    assert flat.tolist() == [0.5, 0.5, 0.0, 0.0, 1.0, 1.0]


@given(st.sampled_from([float("nan"), float("inf"), float("-inf")]), st.integers(0, 4))
def test_what_is_not_finite_is_named(bad: float, position: int) -> None:
    """Worker, step, parameter and how many elements; wherever it is."""
    model = model_of([(2,), (3,)])
    parameters = laid_out(model)
    flat = torch.ones(5)
    flat[position] = bad
    model[0].grad, model[1].grad = flat[:2], flat[2:]
    parameters.gather()
    name, size = ("0", 2) if position < 2 else ("1", 3)
    with pytest.raises(NonFiniteGradientError, match=rf"worker 7 at step 9: {name} \(1 of {size} elements\); nothing"):
        parameters.check_finite(7, 9)


def test_a_sum_that_overflows_is_no_infinity() -> None:
    """Large finite gradients pass, though their sum is infinite."""
    model = model_of([(3,)])
    parameters = laid_out(model)
    model[0].grad = torch.full((3,), 3e38)
    flat, _ = parameters.gather()
    assert not flat.sum().isfinite()
    parameters.check_finite(0, 0)


def test_gradients_are_hidden_and_restored() -> None:
    """The same tensors come back, and what had none still has none."""
    model = model_of([(2,), (3,)])
    parameters = laid_out(model)
    gradient = torch.ones(2)
    model[0].grad = gradient
    hidden = parameters.hide_gradients()
    assert all(parameter.grad is None for parameter in model)
    parameters.restore_gradients(hidden)
    assert model[0].grad is gradient
    assert model[1].grad is None


@given(st.lists(st.sampled_from([0.0, -0.0, 2.0]), min_size=5, max_size=5), st.booleans(), st.booleans())
def test_a_residual_that_is_sent_is_heard(values: list[float], first: bool, second: bool) -> None:
    """A tensor is present when it has a gradient, or when something of its residual goes out; zeros are nothing."""
    parameters = laid_out(model_of([(2,), (3,)]))
    sent = SparseGradient.dense(torch.tensor(values))
    expected = (first or any(values[:2]), second or any(values[2:]))
    assert parameters.heard((first, second), sent) == expected
    kept = torch.tensor([index for index, value in enumerate(values) if value], dtype=torch.int64)
    sparse = SparseGradient(kept, torch.tensor(values)[kept], 5)
    assert parameters.heard((first, second), sparse) == expected


def test_the_layout_says_what_is_trained() -> None:
    """Names, groups, types and ties; frozen parameters, buffers and what the optimizer lacks are untrained."""
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "norm": nn.BatchNorm1d(2)})
    model["b"].weight = model["a"].weight
    model["norm"].weight.requires_grad_(False)
    rest = [model["b"].bias, model["norm"].weight]
    parameters = ModelParameters(
        model, torch.optim.SGD([{"params": [model["a"].weight]}, {"params": [*rest, model["norm"].bias]}], lr=1.0)
    )
    trained = {spec.name: (spec.group, spec.aliases) for spec in parameters.layout.trained}
    assert trained == {"a.weight": (0, ("b.weight",)), "b.bias": (1, ()), "norm.bias": (1, ())}
    buffers = ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]
    assert [spec.name for spec in parameters.layout.untrained] == ["a.bias", "norm.weight", *buffers]
    assert list(parameters.untrained()) == ["a.bias", "norm.weight", *buffers]
    assert list(parameters.untrained(buffers_only=True)) == buffers
    assert parameters.layout.untrained[-1].dtype == "int64"


def test_foreign_tensors_are_refused() -> None:
    """An optimizer over another model's tensors has nothing to lay out here."""
    optimizer = torch.optim.SGD(model_of([(2,), (3,)]), lr=1.0)
    with pytest.raises(LayoutError, match="2 tensors that are not parameters of the model"):
        ModelParameters(model_of([(2,)]), optimizer)


@given(shapes, st.integers(1, 4), st.sampled_from(["SGD", "Adam", "Adagrad", "RMSprop"]))
def test_optimizer_state_goes_to_the_shards_and_back(found: list[tuple[int, ...]], shards: int, name: str) -> None:
    """`state` → replicas → `publish_state` shows what plain torch has, in the shapes of the parameters."""
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9} if name == "SGD" else {"lr": 0.1}
    model = model_of(found)
    optimizer = getattr(torch.optim, name)(model.parameters(), **options)
    for parameter in model:
        parameter.grad = parameter.detach().clone()
    optimizer.step()
    expected = [
        {key: value.clone() for key, value in optimizer.state[p].items() if isinstance(value, Tensor)} for p in model
    ]
    parameters = ModelParameters(model, optimizer)
    slices = parameters.layout.slices(min(shards, parameters.layout.numel))
    replicas = [Replica(piece, spec_of(optimizer), parameters.state(piece)) for piece in slices]
    for parameter in model:
        if parameter.numel():
            optimizer.state[parameter].clear()
    parameters.publish_state([replica.state() for replica in replicas])
    for parameter, state in zip(model, expected, strict=True):
        found_state = optimizer.state[parameter]
        assert all(torch.equal(found_state[key].reshape(value.shape), value) for key, value in state.items())


def test_untrained_values_are_copied_in_place() -> None:
    """Buffers keep their identity; names that the model does not have are passed over."""
    model = nn.BatchNorm1d(2)
    parameters = laid_out(model)
    mean = model.running_mean
    parameters.assign_untrained({"running_mean": torch.tensor([3.0, 4.0]), "elsewhere": torch.ones(1)})
    assert model.running_mean is mean
    assert mean is not None
    assert mean.tolist() == [3.0, 4.0]
