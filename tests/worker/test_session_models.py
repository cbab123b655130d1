"""Models of all kinds: types, layouts, frozen and tied parameters, buffers, sizes, uneven data."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tests.worker.training import Scale, set_gradients, sgd, snapshot
from torch import Tensor, nn

from thresher.deploy.in_process import InProcess, in_process
from thresher.protos.errors import (
    LayoutError,
)
from thresher.worker import Method, Session


def alone(cluster: InProcess, work: Callable[[Session], Any]) -> Any:
    """Run with one worker, and return its result."""
    return cluster.run(work)[0]


# Models of all kinds


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_have_float32_masters(dtype: torch.dtype) -> None:
    """Updates too small for the model's type add up in the shards; a parameter is always cast(master)."""

    def work(session: Session) -> tuple[Tensor, list[Tensor]]:
        model = Scale(3, dtype)
        optimizer = sgd(model, lr=2.0**-12)
        session.wrap(model, optimizer)
        masters = []
        for _ in range(32):
            set_gradients(model, 1.0)
            optimizer.step()
        masters = [snapshot(address).state["parameters"] for address in cluster.addresses]
        assert model.weight.grad is not None
        assert model.weight.grad.dtype is dtype
        return torch.cat([model.weight.detach(), model.bias.detach()]), masters

    with in_process(shards=2, workers=1) as cluster:
        parameters, masters = alone(cluster, work)
    master = torch.cat(masters)
    assert parameters.dtype is dtype
    assert torch.equal(master[:3], torch.full((3,), 1 - 32 * 2.0**-12))
    assert torch.equal(parameters, master.to(dtype))


@pytest.mark.parametrize("threshold", [0.0, 0.25])
@pytest.mark.parametrize("placement", ["gradient", "update"])
def test_a_parameter_that_nobody_uses_stays_as_it_is(threshold: float, placement: Any) -> None:
    """Without gradient on all workers, neither decay nor momentum move it."""
    options = {"weight_decay": 0.5} if placement == "update" else {"weight_decay": 0.5, "momentum": 0.9}

    def work(session: Session) -> tuple[Tensor, Tensor]:
        model = Scale()
        optimizer = sgd(model, **options)
        session.wrap(model, optimizer)
        set_gradients(model, 1.0)
        optimizer.step()
        before = model.weight.detach().clone()
        for _ in range(2):
            optimizer.zero_grad()
            model.bias.grad = torch.ones(2)
            optimizer.step()
        return before, model.weight.detach()

    method = Method(threshold=threshold, placement=placement)
    with in_process(shards=3, workers=2, method=method) as cluster:
        for before, after in cluster.run(work):
            assert torch.equal(before, after)
            assert not torch.equal(before, torch.ones(2))


def test_a_parameter_that_some_use_counts_as_zero_for_the_others() -> None:
    """Its gradient is the sum of those there are over N, and the optimizer takes a whole step with it."""

    def work(session: Session) -> Tensor:
        model = Scale()
        optimizer = sgd(model, lr=1.0, weight_decay=0.5)
        session.wrap(model, optimizer)
        model.bias.grad = torch.ones(2)
        if session.rank == 1:
            model.weight.grad = torch.full((2,), 4.0)
        optimizer.step()
        return model.weight.detach()

    with in_process(shards=1, workers=2) as cluster:
        for weight in cluster.run(work):
            assert torch.equal(weight, torch.full((2,), 1.0 - (2.0 + 0.5)))


def test_frozen_parameters_stay_and_cost_nothing() -> None:
    """A frozen parameter that the optimizer holds is not exchanged; unfreezing it later is refused by name."""

    def work(session: Session) -> None:
        model = Scale()
        model.weight.requires_grad_(False)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        session.wrap(model, optimizer)
        model.bias.grad = torch.ones(2)
        optimizer.step()
        assert session.statistics().numel == 2
        assert torch.equal(model.weight, torch.ones(2))
        model.weight.requires_grad_(True)
        set_gradients(model, 1.0)
        with pytest.raises(LayoutError, match=r"parameter weight has a gradient, but was frozen"):
            optimizer.step()

    with in_process(shards=1, workers=1) as cluster:
        alone(cluster, work)


def test_gradients_of_what_the_optimizer_does_not_hold_are_ignored() -> None:
    """As in torch: who trains a head only need not freeze the rest."""

    def work(session: Session) -> tuple[Tensor, Tensor]:
        model = Scale()
        optimizer = torch.optim.SGD([model.bias], lr=1.0)
        session.wrap(model, optimizer)
        model(torch.ones(2)).sum().backward()
        optimizer.step()
        return model.weight.detach(), model.bias.detach()

    with in_process(shards=1, workers=1) as cluster:
        weight, bias = alone(cluster, work)
    assert torch.equal(weight, torch.ones(2))
    assert torch.equal(bias, -torch.ones(2))


@pytest.mark.parametrize("trained", [True, False])
def test_tied_parameters_count_once(trained: bool) -> None:
    """Trained or frozen, a tensor with two names is one tensor, and stays tied."""

    def work(session: Session) -> None:
        first, second, third = (nn.Linear(3, 3, bias=False) for _ in range(3))
        second.weight = first.weight
        first.weight.requires_grad_(trained)
        nn.init.ones_(first.weight)
        model = nn.Sequential(first, second, third)
        optimizer = sgd(model, lr=1.0)
        session.wrap(model, optimizer)
        model(torch.ones(1, 3)).sum().backward()
        expected = first.weight.detach().clone()
        if first.weight.grad is not None:
            expected -= first.weight.grad
        optimizer.step()
        assert first.weight is second.weight
        assert torch.equal(first.weight, expected)
        assert session.statistics().numel == (18 if trained else 9)
        layout = snapshot(cluster.addresses[0]).layout
        assert (layout.trained if trained else layout.untrained)[0].aliases == ("1.weight",)

    with in_process(shards=2, workers=1) as cluster:
        alone(cluster, work)


def test_rank_0_leaves_its_buffers_to_the_model() -> None:
    """After all have left, the shards' snapshot has rank 0's BatchNorm statistics, and the trained parameters."""

    def work(session: Session) -> dict[str, Tensor]:
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        optimizer = sgd(model)
        session.wrap(model, optimizer)
        for step in range(3):
            model(torch.arange(8.0).view(4, 2) * (session.rank + 1) + step).square().sum().backward()
            optimizer.step()
        return model.state_dict()

    with in_process(shards=2, workers=2) as cluster:
        ours, others = cluster.run(work)
        found = snapshot(cluster.addresses[0]).untrained
    assert not torch.equal(ours["1.running_mean"], others["1.running_mean"])
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert torch.equal(found[name], ours[name])


def test_sparse_embedding_gradients_are_as_dense_ones() -> None:
    """``nn.Embedding(sparse=True)`` trains to the same bits as with dense gradients."""

    def train(session: Session, *, sparse: bool) -> Tensor:
        model = nn.Embedding(6, 2, sparse=sparse)
        nn.init.ones_(model.weight)
        optimizer = sgd(model, momentum=0.9)
        session.wrap(model, optimizer)
        for step in range(3):
            optimizer.zero_grad()
            model(torch.tensor([session.rank, step, step])).square().sum().backward()
            optimizer.step()
        return model.weight.detach()

    found = []
    for sparse in (True, False):
        with in_process(shards=2, workers=2) as cluster:
            found.append(cluster.run(partial(train, sparse=sparse))[1])
    assert torch.equal(found[0], found[1])


def test_unusual_memory_layouts_are_kept() -> None:
    """A parameter in channels-last order, cut by shard boundaries, trains as any other and keeps its strides."""

    def work(session: Session) -> tuple[Tensor, Tensor]:
        model = nn.Conv2d(3, 4, 2, bias=False)
        with torch.no_grad():
            model.weight.copy_(torch.arange(48.0).view(4, 3, 2, 2))
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # torch's stubs lack this overload
        before = model.weight.detach().clone()
        optimizer = sgd(model, lr=1.0)
        session.wrap(model, optimizer)
        model.weight.grad = torch.arange(48.0).view(4, 3, 2, 2).square()
        optimizer.step()
        assert model.weight.is_contiguous(memory_format=torch.channels_last)
        return before, model.weight.detach()

    with in_process(shards=5, workers=1) as cluster:
        before, after = alone(cluster, work)
    assert torch.equal(after, before - torch.arange(48.0).view(4, 3, 2, 2).square())


def test_a_model_larger_than_a_chunk() -> None:
    """Pushes and updates of several chunks of 1 MiB per shard, both ways, seed and snapshot included."""

    def work(session: Session) -> tuple[nn.Linear, int]:
        model = nn.Linear(700, 1000, bias=False)
        nn.init.zeros_(model.weight)
        optimizer = sgd(model, lr=1.0)
        session.wrap(model, optimizer)
        for _ in range(2):
            model.weight.grad = torch.arange(700_000.0).view(1000, 700) * (session.rank + 1)
            optimizer.step()
        return model, min(session.statistics().push_bytes)

    with in_process(shards=2, workers=2) as cluster:
        results = cluster.run(work)
    for model, push_bytes in results:
        assert torch.equal(model.weight, -3 * torch.arange(700_000.0).view(1000, 700))
        assert push_bytes > 2 * 350_000 * 4


def test_uneven_data() -> None:
    """A worker that is done leaves; the others go on, and the divisor is the number of those who are there."""

    def work(session: Session) -> tuple[Tensor, int]:
        model = Scale(4)
        optimizer = sgd(model, lr=1.0)
        session.wrap(model, optimizer)
        for _ in range(1 + session.rank):
            set_gradients(model, 6.0 * (session.rank + 1))
            optimizer.step()
        return model.bias.detach(), session.step

    with in_process(shards=2, workers=3) as cluster:
        results = cluster.run(work)
        shards = cluster.statistics()
    means = [(6 + 12 + 18) / 3, (12 + 18) / 2, 18.0]
    for rank, (bias, steps) in enumerate(results):
        assert steps == rank + 1
        assert torch.equal(bias, torch.full((4,), -sum(means[: rank + 1])))
    assert {(shard.state, shard.version) for shard in shards} == {("finished", 3)}
