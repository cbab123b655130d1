"""The script's side: what works in a torch training loop works after `Session.wrap`."""

import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from thresher.deploy.in_process import InProcess, in_process
from thresher.protos.errors import (
    ConfigurationError,
    LayoutError,
    NonFiniteGradientError,
    OptimizerError,
    ProtocolError,
    RoundFailedError,
)
from thresher.worker import Method, Session, Settings, connect
from thresher.worker.client import ShardClient, Snapshot


class Scale(nn.Module):
    """weight · x, with a weight that begins at ones and is easy to compute with."""

    def __init__(self, size: int = 2, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(size, dtype=dtype))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.weight * inputs + self.bias


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], **{"lr": 0.5, **options})


def alone(cluster: InProcess, work: Callable[[Session], Any]) -> Any:
    """Run with one worker, and return its result."""
    return cluster.run(work)[0]


def snapshots(cluster: InProcess) -> list[Snapshot]:
    found = []
    for shard, address in enumerate(cluster.addresses):
        reader = ShardClient(shard, address, 0, incarnation=0)
        found.append(reader.snapshot(wait_seconds=5.0))
        reader.close()
    return found


def set_gradients(model: nn.Module, value: float) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)


# The optimizer stays the user's


def test_closure_is_called_once_and_its_loss_returned() -> None:
    """``step(closure)`` evaluates the closure before the exchange, also under no_grad, and returns its loss."""

    def work(session: Session) -> tuple[int, float, Tensor]:
        model, calls = Scale(), []
        optimizer = sgd(model)
        session.wrap(model, optimizer)

        def closure() -> Tensor:
            calls.append(1)
            optimizer.zero_grad()
            loss: Tensor = model(torch.ones(2)).sum()
            torch.autograd.backward(loss)
            return loss

        with torch.no_grad():
            loss = optimizer.step(closure)
        assert loss is not None
        return len(calls), float(torch.as_tensor(loss).detach()), model.weight.detach()

    with in_process(shards=1, workers=1) as cluster:
        calls, loss, weight = alone(cluster, work)
    assert (calls, loss) == (1, 2.0)
    assert torch.equal(weight, torch.full((2,), 0.5))


@pytest.mark.parametrize("early", [True, False], ids=["before", "after"])
def test_scheduler_may_be_made_before_or_after_wrapping(early: bool) -> None:
    """Either way the shards follow it from step to step, and torch does not warn of the order of calls."""

    def work(session: Session) -> list[float]:
        model = Scale()
        optimizer = sgd(model, lr=1.0)
        if not early:
            session.wrap(model, optimizer)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        if early:
            session.wrap(model, optimizer)
        weights = []
        for _ in range(3):
            set_gradients(model, 1.0)
            optimizer.step()
            scheduler.step()
            weights.append(float(model.weight[0].detach()))
        return weights

    with warnings.catch_warnings(), in_process(shards=1, workers=1) as cluster:
        warnings.simplefilter("error")
        assert alone(cluster, work) == [0.0, -0.5, -0.75]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_are_the_users_before_and_after_a_step(set_to_none: bool) -> None:
    """``.grad`` is the very tensor of before after ``step()``; ``zero_grad`` treats it as ever, in both of its ways."""

    def work(session: Session) -> Tensor:
        model = Scale()
        optimizer = sgd(model)
        session.wrap(model, optimizer)
        for _ in range(2):
            optimizer.zero_grad(set_to_none=set_to_none)
            model(torch.ones(2)).sum().backward()
            gradient = model.weight.grad
            optimizer.step()
            assert model.weight.grad is gradient
            assert gradient is not None
            assert torch.equal(gradient, torch.ones(2))
        return model.weight.detach()

    with in_process(shards=1, workers=1) as cluster:
        assert torch.equal(alone(cluster, work), torch.zeros(2))


def test_state_dict_resumes_in_plain_torch() -> None:
    """What ``state_dict()`` shows after some steps, loaded into a plain optimizer, goes on as if nothing had been."""

    def work(session: Session) -> tuple[dict[str, Any], list[Tensor], list[Tensor]]:
        model = Scale(5)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        session.wrap(model, optimizer)
        assert optimizer.state_dict()["state"] == {}
        middle: list[Tensor] = []
        state: dict[str, Any] = {}
        for step in range(5):
            set_gradients(model, float(step + 1))
            optimizer.step()
            if step == 2:
                middle = [p.detach().clone() for p in model.parameters()]
                state = optimizer.state_dict()
                state["state"] = {k: {n: v.clone() for n, v in s.items()} for k, s in state["state"].items()}
        return state, middle, [p.detach().clone() for p in model.parameters()]

    with in_process(shards=3, workers=1) as cluster:
        state, middle, end = alone(cluster, work)
    model = Scale(5)
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), middle, strict=True):
            parameter.copy_(value)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.9)
    optimizer.load_state_dict(state)
    for step in (3, 4):
        set_gradients(model, float(step + 1))
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), end, strict=True))


@pytest.mark.parametrize("kind", ["SGD", "Adam", "Adagrad"])
def test_a_loaded_state_seeds_the_shards(kind: str) -> None:
    """Rank 0's ``load_state_dict`` before wrapping goes on, bit for bit, as an uninterrupted run; scalars included."""

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = Scale(5)
        model.temperature = nn.Parameter(torch.tensor(2.0))
        options: dict[str, Any] = {"lr": 0.1} if kind != "SGD" else {"lr": 0.1, "momentum": 0.9}
        return model, getattr(torch.optim, kind)(model.parameters(), **options)

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, values: list[float]) -> None:
        for value in values:
            set_gradients(model, value)
            optimizer.step()

    whole, optimizer = make()
    steps(whole, optimizer, [1.0, -2.0, 3.0, 0.5])
    half, optimizer = make()
    steps(half, optimizer, [1.0, -2.0])
    weights, state = half.state_dict(), optimizer.state_dict()

    def work(session: Session) -> nn.Module:
        model, optimizer = make()
        if session.rank == 0:
            model.load_state_dict(weights)
            optimizer.load_state_dict(state)
        session.wrap(model, optimizer)
        steps(model, optimizer, [3.0, 0.5])
        return model

    with in_process(shards=4, workers=2) as cluster:
        for model in cluster.run(work):
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))


def test_loading_a_state_after_wrapping_is_refused() -> None:
    """It would change nothing at the shards, so it says where the state must be loaded."""

    def work(session: Session) -> None:
        model = Scale()
        optimizer = sgd(model)
        session.wrap(model, optimizer)
        with pytest.raises(ProtocolError, match="before the optimizer is wrapped"):
            optimizer.load_state_dict(optimizer.state_dict())

    with in_process(shards=1, workers=1) as cluster:
        alone(cluster, work)


def test_rank_0_brings_the_weights(caplog: pytest.LogCaptureFixture) -> None:
    """Its weights, frozen parameters and buffers replace the others', and those are told which of theirs went."""

    def work(session: Session) -> dict[str, Tensor]:
        model = nn.Sequential(Scale(), nn.BatchNorm1d(2))
        model[1].weight.requires_grad_(False)
        for value in model.state_dict().values():
            value.fill_(session.rank + 3)
        session.wrap(model, sgd(model))
        return model.state_dict()

    with caplog.at_level(logging.INFO, "thresher.worker"), in_process(shards=2, workers=2) as cluster:
        for state in cluster.run(work):
            assert all(bool((value == 3).all()) for value in state.values())
    assert "worker 1: the shards' values replaced those of 0.weight, 0.bias, 1.bias" in caplog.text
    assert "worker 0: the shards' values" not in caplog.text


# Skipped steps


def scaled_run(scales: list[dict[int, float]], method: Method, *, workers: int = 3) -> list[dict[str, Any]]:
    """Train with a GradScaler; ``scales[step]`` says which ranks get which input."""

    def work(session: Session) -> dict[str, Any]:
        model = Scale()
        optimizer = sgd(model, lr=1.0)
        session.wrap(model, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
        residuals = []
        for inputs in scales:
            optimizer.zero_grad()
            loss = model(torch.full((2,), inputs.get(session.rank, 1.0))).sum()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            residuals.append(session.residual.clone())
        return {
            "weight": model.weight.detach().clone(),
            "skipped": session.statistics().skipped,
            "scale": scaler.get_scale(),
            "residuals": residuals,
        }

    with in_process(shards=2, workers=workers, method=method) as cluster:
        return cluster.run(work)


def test_scaled_gradients_are_unscaled() -> None:
    """With a GradScaler and no overflow the step is that of the unscaled gradients."""
    for result in scaled_run([{0: 4.0, 1: 2.0, 2: 0.0}], Method(threshold=0.0)):
        assert torch.equal(result["weight"], torch.full((2,), -1.0))
        assert (result["skipped"], result["scale"]) == (0, 4.0)


def test_overflow_on_one_worker_skips_its_part_only() -> None:
    """The others' gradients count, the divisor stays N, and only the scaler that saw the overflow backs off."""
    results = scaled_run([{0: 3.0, 1: float("inf"), 2: 3.0}], Method(threshold=0.0))
    assert all(torch.equal(result["weight"], torch.full((2,), -1.0)) for result in results)
    assert [result["skipped"] for result in results] == [0, 1, 0]
    assert [result["scale"] for result in results] == [4.0, 2.0, 4.0]


def test_a_skipped_step_leaves_the_residual() -> None:
    """What a worker has not sent is untouched by a step that it skips, and not empty."""
    results = scaled_run([{}, {1: float("inf")}], Method(threshold=1.5))
    first, second = results[1]["residuals"]
    assert torch.equal(first, torch.ones(4))
    assert torch.equal(second, first)


def test_when_all_skip_the_model_stays_and_the_version_moves() -> None:
    """An overflow everywhere is a step without change, momentum and decay included; the next one is a usual one."""
    infinite = dict.fromkeys(range(3), float("inf"))
    results = scaled_run([infinite, dict.fromkeys(range(3), 2.0)], Method(threshold=0.0))
    assert all(torch.equal(result["weight"], torch.full((2,), -1.0)) for result in results)
    assert [result["skipped"] for result in results] == [1, 1, 1]


def test_unscaling_first_for_clipping() -> None:
    """``scaler.unscale_`` followed by clipping sends the clipped gradient, and does not unscale again."""

    def work(session: Session) -> Tensor:
        model = Scale(1)
        optimizer = sgd(model, lr=1.0)
        session.wrap(model, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(model(torch.full((1,), 16.0)).sum()).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_value_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        return torch.stack([model.weight.detach(), model.bias.detach()])

    with in_process(shards=1, workers=1) as cluster:
        assert torch.equal(alone(cluster, work), torch.tensor([[0.5], [-0.5]]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_gradient_that_is_not_finite_is_refused(bad: float) -> None:
    """The error names worker, step and parameter; nothing is sent; the other workers end, and read who it was."""
    told: dict[int, BaseException] = {}
    pushed: list[int] = []

    def work(session: Session) -> None:
        model = Scale()
        optimizer = sgd(model)
        session.wrap(model, optimizer)
        try:
            for step in range(2):
                set_gradients(model, 1.0)
                if (session.rank, step) == (1, 1):
                    model.bias.grad = torch.tensor([1.0, bad])
                    pushed.append(sum(session.statistics().push_bytes))
                optimizer.step()
        except Exception as error:
            told[session.rank] = error
            raise

    with in_process(shards=2, workers=2) as cluster:
        with pytest.raises(NonFiniteGradientError, match=r"worker 1 at step 1: bias \(1 of 2 elements\)"):
            cluster.run(work)
        assert sum(shard.members[1].push_bytes for shard in cluster.statistics()) == pushed[0]
    assert isinstance(told[0], RoundFailedError)
    assert "worker 1" in str(told[0])
    assert "at step 1: bias" in str(told[0])


def test_a_gradient_that_is_not_finite_is_skipped_on_demand(caplog: pytest.LogCaptureFixture) -> None:
    """With ``nonfinite="skip"`` the worker's part of this step has weight 0, its residual stays, a warning names it."""

    def work(session: Session) -> tuple[Tensor, int, Tensor]:
        model = Scale()
        optimizer = sgd(model, lr=1.0)
        session.wrap(model, optimizer)
        for step in range(2):
            set_gradients(model, float("nan") if (session.rank, step) == (1, 1) else 1.0)
            optimizer.step()
        return model.bias.detach().clone(), session.statistics().skipped, session.residual.clone()

    with in_process(shards=1, workers=2, method=Method(threshold=1.5, nonfinite="skip")) as cluster:
        results = cluster.run(work)
    # Rank 0 sends 1 + 1 in the second step, rank 1 nothing; the divisor is 2.
    assert all(torch.equal(bias, torch.full((2,), -1.0)) for bias, _, _ in results)
    assert [skipped for _, skipped, _ in results] == [0, 1]
    assert torch.equal(results[1][2], torch.ones(4))
    assert "skipped: NaN or infinity in the gradient of worker 1 at step 1" in caplog.text


def test_training_goes_on_after_a_refused_step() -> None:
    """A script that catches the refusal may make the same step with another batch."""

    def work(session: Session) -> tuple[int, Tensor]:
        model = Scale()
        optimizer = sgd(model, lr=1.0)
        session.wrap(model, optimizer)
        set_gradients(model, float("nan") if session.rank else 1.0)
        try:
            optimizer.step()
        except NonFiniteGradientError:
            set_gradients(model, 3.0)
            optimizer.step()
        return session.step, model.bias.detach()

    with in_process(shards=1, workers=2) as cluster:
        for step, bias in cluster.run(work):
            assert step == 1
            assert torch.equal(bias, torch.full((2,), -2.0))


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
        masters = [snapshot.state["parameters"] for snapshot in snapshots(cluster)]
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
        layout = snapshots(cluster)[0].layout
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
        found = snapshots(cluster)[0].untrained
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


# What is refused


def refused(
    model: nn.Module, optimizer: torch.optim.Optimizer, error: type[Exception], text: str, shards: int = 1
) -> None:
    """Expect `wrap` to fail before anything is registered."""
    with in_process(shards=shards, workers=1) as cluster:
        with pytest.raises(error, match=text), cluster.connect(0) as session:
            session.wrap(model, optimizer)
        assert all(not shard.model_numel for shard in cluster.statistics())


def test_more_shards_than_elements() -> None:
    """The message says how many there are of each."""
    model = Scale(1)
    refused(model, sgd(model), ConfigurationError, "3 shards are more than the model's 2 trained elements", shards=3)


def test_no_trainable_parameter() -> None:
    """A model whose parameters are all frozen has nothing to send."""
    model = Scale().requires_grad_(False)
    refused(model, torch.optim.SGD(model.parameters(), lr=1.0), LayoutError, "no trainable parameter")


@pytest.mark.parametrize("name", ["SparseAdam", "LBFGS", "NAdam"])
def test_unsupported_optimizers(name: str) -> None:
    """The message names it and lists those that the shards apply."""
    model = Scale()
    optimizer = getattr(torch.optim, name)(model.parameters())
    refused(model, optimizer, OptimizerError, rf"{name}.*they apply SGD, Adam, AdamW, Adagrad, RMSprop$")


def test_a_subclass_of_a_supported_optimizer() -> None:
    """It may do anything in its step, so it is not taken for its base class."""

    class MySGD(torch.optim.SGD):
        pass

    model = Scale()
    refused(model, MySGD(model.parameters(), lr=1.0), OptimizerError, "MySGD")


def test_a_tensor_of_another_model() -> None:
    """An optimizer that holds a tensor from elsewhere would train what nobody lays out."""
    optimizer = torch.optim.SGD([*Scale().parameters()], lr=1.0)
    refused(Scale(), optimizer, LayoutError, "2 tensors that are not parameters of the model")


@pytest.mark.parametrize("placement", ["gradient", "update"])
def test_a_parameter_group_that_is_added_later(placement: Any) -> None:
    """It is refused at the next step, before anything is sent or put into the residual."""

    def work(session: Session) -> None:
        model = Scale()
        optimizer = torch.optim.SGD([model.weight], lr=1.0)
        session.wrap(model, optimizer)
        optimizer.add_param_group({"params": [model.bias]})
        model.weight.grad = torch.ones(2)
        with pytest.raises(OptimizerError, match="added or removed after the optimizer was wrapped"):
            optimizer.step()
        assert sum(session.statistics().push_bytes) == 0
        assert not session.residual.any()

    with in_process(shards=1, workers=1, method=Method(threshold=5.0, placement=placement)) as cluster:
        alone(cluster, work)


def test_wrapping_twice() -> None:
    """One session is for one model."""

    def work(session: Session) -> None:
        model = Scale()
        session.wrap(model, sgd(model))
        with pytest.raises(ProtocolError, match="one session for one model"):
            session.wrap(model, sgd(model))

    with in_process(shards=1, workers=1) as cluster:
        alone(cluster, work)


def test_use_after_close() -> None:
    """A closed session neither steps nor wraps, says so, and may be closed again."""
    with in_process(shards=1, workers=1) as cluster:
        session = cluster.connect(0)
        model = Scale()
        optimizer = sgd(model)
        session.wrap(model, optimizer)
        session.close()
        session.close()
        session.abort("too late")
        set_gradients(model, 1.0)
        with pytest.raises(ProtocolError, match="closed"):
            optimizer.step()
        assert torch.equal(model.weight, torch.ones(2))
        assert cluster.statistics()[0].state == "finished"

    with in_process(shards=1, workers=1) as cluster:
        session = cluster.connect(0)
        session.close()
        with pytest.raises(ProtocolError, match="closed"):
            session.wrap(model, sgd(model))
        assert cluster.statistics()[0].model_numel == 0


def test_use_before_wrapping() -> None:
    """Without a model there is no residual; rank, step and statistics are known."""
    session = connect(settings=Settings(("127.0.0.1:1",), rank=1, workers=3))
    assert (session.rank, session.workers, session.step, session.statistics().steps) == (1, 3, 0, 0)
    with pytest.raises(ProtocolError, match="wrap an optimizer first"):
        _ = session.residual
    session.close()


def test_connect_reads_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """``connect()`` takes everything from THRESHER_*, and an argument wins over THRESHER_SHARDS."""
    settings = Settings(("127.0.0.1:1", "127.0.0.1:2"), rank=2, workers=4, method=Method(threshold=0.5))
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    assert connect()._settings == settings
    assert connect("127.0.0.1:7")._settings == replace(settings, addresses=("127.0.0.1:7",))


def test_an_address_beyond_this_machine_must_be_asked_for() -> None:
    """Plain text over a network is refused before anything is sent, unless the settings allow it."""
    settings = Settings(("192.0.2.1:5000",), rank=0, workers=1)
    with pytest.raises(ConfigurationError, match="THRESHER_INSECURE"):
        connect(settings=settings)
    connect(settings=replace(settings, insecure=True)).close()


# Data and randomness


def test_batches_key_randomness_by_seed_rank_and_step() -> None:
    """What a step draws depends on (seed, rank, step) and on its place in the step, not on what was drawn before."""

    def drawn(cluster: InProcess, rank: int, draws: int, seed: int = 0) -> list[list[float]]:
        session = connect(settings=Settings(cluster.addresses, rank, 2, seed=seed))
        loader = DataLoader(TensorDataset(torch.arange(8.0)), batch_size=1)
        found = []
        for _ in session.batches(loader):
            found.append(torch.rand(1).tolist())
            torch.rand(draws)
        return found

    with in_process(shards=1, workers=2) as cluster:
        reference = drawn(cluster, 0, draws=1)
        assert drawn(cluster, 0, draws=7) == reference
        assert len({value for (value,) in reference}) == len(reference), "batches of one step repeat each other"
        for other in (drawn(cluster, 1, draws=1), drawn(cluster, 0, draws=1, seed=1)):
            assert not {value for (value,) in other} & {value for (value,) in reference}


def test_randomness_of_a_step_is_its_own() -> None:
    """Two sessions that made the same number of steps draw the same in the next, however they came there."""

    def work(session: Session) -> list[float]:
        model = Scale()
        optimizer = sgd(model)
        session.wrap(model, optimizer)
        loader = DataLoader(TensorDataset(torch.arange(6.0)), batch_size=2, shuffle=True)
        found = []
        for _ in range(2):
            for (batch,) in session.batches(loader):
                found.append(float(torch.rand(()) + batch.sum()))
                set_gradients(model, 1.0)
                optimizer.step()
        return found

    runs = []
    for before in (1, 2):
        torch.manual_seed(before)
        with in_process(shards=1, workers=1) as cluster:
            runs.append(alone(cluster, work))
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 6
