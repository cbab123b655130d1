"""The script's side: what works in a torch training loop works after `Session.wrap`."""

import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.worker.training import Scale, set_gradients, sgd
from torch import Tensor, nn

from thresher.deploy.in_process import InProcess, in_process
from thresher.protos.errors import (
    NonFiniteGradientError,
    ProtocolError,
    RoundFailedError,
)
from thresher.worker import Method, Session


def alone(cluster: InProcess, work: Callable[[Session], Any]) -> Any:
    """Run with one worker, and return its result."""
    return cluster.run(work)[0]


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
