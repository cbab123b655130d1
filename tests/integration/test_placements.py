"""Update-placed runs through real shards: DEF, local steps, an outer optimizer, and where a model is evaluated."""

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from thresher.compression import parse_feedback
from thresher.compression.base import Round
from thresher.deploy.in_process import in_process
from thresher.protos.errors import ConfigurationError, OptimizerError, ProtocolError, RoundFailedError
from thresher.protos.mean import mean_of
from thresher.worker import Method, Session

WORKERS = 2
NUMEL = 12


def gradient(rank: int, step: int, point: Tensor) -> Tensor:
    """Of a quadratic whose minimum differs from worker to worker."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    noise = torch.randn(NUMEL, generator=generator)
    return point * torch.linspace(0.5, 2.0, NUMEL) - rank + 0.1 * noise


def session_run(method: Method, steps: int, optimize: Callable[[Any], torch.optim.Optimizer]) -> list[list[Tensor]]:
    """The point at which each worker takes each gradient, and last the parameters after closing."""

    def work(session: Session) -> list[Tensor]:
        model = nn.Linear(NUMEL, 1, bias=False)
        torch.nn.init.ones_(model.weight)
        optimizer = optimize(model.parameters())
        session.wrap(model, optimizer)
        points = []
        for step in range(steps):
            points.append(model.weight.detach().view(-1).clone())
            model.weight.grad = gradient(session.rank, step, points[-1]).view(1, -1)
            optimizer.step()
        session.close()
        return [*points, model.weight.detach().view(-1).clone()]

    with in_process(shards=3, workers=WORKERS, method=method) as cluster:
        return cluster.run(work)


def reference_run(method: Method, steps: int, optimize: Callable[[Any], torch.optim.Optimizer]) -> list[list[Tensor]]:
    """The same from the pages of the papers: arXiv:2004.05298, algorithm of DEF, with local steps."""
    x = torch.ones(NUMEL)
    feedbacks = [parse_feedback(method.compressor, [(1, NUMEL)]) for _ in range(WORKERS)]
    leaves = [nn.Parameter(x.clone()) for _ in range(WORKERS)]
    optimizers = [optimize([leaf]) for leaf in leaves]
    shared = nn.Parameter(x.clone())
    outer = torch.optim.SGD([shared], lr=0.5, momentum=0.5) if method.outer else torch.optim.SGD([shared], lr=1.0)
    starts = [x.clone() for _ in range(WORKERS)]
    points: list[list[Tensor]] = [[] for _ in range(WORKERS)]
    for step in range(steps):
        for rank, (leaf, optimizer) in enumerate(zip(leaves, optimizers, strict=True)):
            points[rank].append(leaf.detach().clone())
            leaf.grad = gradient(rank, step, leaf.detach())
            optimizer.step()
        if (step + 1) % method.period:
            continue
        round_ = Round(step // method.period, 0, method.threshold, optimizers[0].param_groups[0]["lr"])
        sent = [
            feedback.compress(start - leaf.detach(), round_)
            for feedback, start, leaf in zip(feedbacks, starts, leaves, strict=True)
        ]
        shared.grad = mean_of(sent, WORKERS).densify().clone()
        outer.step()
        for rank, (leaf, feedback) in enumerate(zip(leaves, feedbacks, strict=True)):
            starts[rank] = torch.sub(shared.detach(), feedback.residual, alpha=feedback.detached)
            leaf.data.copy_(starts[rank])
    return [[*own, shared.detach().clone()] for own in points]


def heavy_ball(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.05)


@pytest.mark.parametrize("optimize", [heavy_ball, adam])
@pytest.mark.parametrize(
    "method",
    [
        Method(threshold=0.5, placement="update"),
        Method("TopK(0.25)", placement="update", period=3),
        Method("DetachedErrorFeedback(HardThreshold)", threshold=0.5, placement="update"),
        Method("DetachedErrorFeedback(RandomBlock(0.25))", placement="update", period=2),
        Method("DetachedErrorFeedback(TopK(0.25), coefficient=1.0)", placement="update"),
        Method("ErrorReset(TopK(0.5), 3)", placement="update"),
        Method("TopK(0.25)", placement="update", period=3, outer="SGD(lr=0.5, momentum=0.5)"),
    ],
    ids=lambda method: method.describe(),
)
def test_a_run_follows_the_algorithm(method: Method, optimize: Any) -> None:
    """Each worker takes every gradient where the algorithm says, bit for bit, and all end at the shards' x."""
    steps = 9
    found, expected = session_run(method, steps, optimize), reference_run(method, steps, optimize)
    for mine, wanted in zip(found, expected, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(mine, wanted, strict=True))


def test_evaluation_points() -> None:
    """``synced`` is x, ``virtual`` is x - mean residual; afterwards the model is where it was (arXiv:2004.05298)."""

    def work(session: Session) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        model = nn.Linear(NUMEL, 1, bias=False)
        torch.nn.init.ones_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        session.wrap(model, optimizer)
        for step in range(3):
            model.weight.grad = gradient(session.rank, step, model.weight.detach().view(-1)).view(1, -1)
            optimizer.step()
        point = model.weight.detach().clone()
        with session.evaluating():
            synced = model.weight.detach().view(-1).clone()
        with session.evaluating("virtual"):
            virtual = model.weight.detach().view(-1).clone()
        assert torch.equal(model.weight, point)
        return synced, virtual, point.view(-1), session.residual.clone(), torch.tensor(session.step)

    method = Method("DetachedErrorFeedback(TopK(0.25), coefficient=0.5)", placement="update")
    with in_process(shards=2, workers=WORKERS, method=method) as cluster:
        results = cluster.run(work)
    mean = (results[0][3] + results[1][3]) / WORKERS
    for synced, virtual, point, residual, step in results:
        assert torch.equal(synced, results[0][0])
        assert torch.equal(point, synced - 0.5 * residual)
        assert torch.equal(virtual, synced - mean)
        assert not torch.equal(virtual, synced)
        assert int(step) == 3


def test_the_virtual_point_needs_updates() -> None:
    """A residual in gradient units cannot be subtracted from parameters; the message says what to choose."""

    def work(session: Session) -> None:
        with pytest.raises(ProtocolError, match="wrap an optimizer first"), session.evaluating():
            pass
        model = nn.Linear(NUMEL, 1, bias=False)
        session.wrap(model, torch.optim.SGD(model.parameters(), lr=0.5))
        refused = pytest.raises(ConfigurationError, match="placement 'update', and no outer optimizer")
        with refused, session.evaluating("virtual"):
            pass

    for method in (Method(threshold=1.0), Method(threshold=1.0, placement="update", outer="SGD(lr=0.5)")):
        with in_process(shards=1, workers=1, method=method) as cluster:
            cluster.run(work)


def test_workers_that_disagree_on_a_mean_are_told() -> None:
    """One steps while the other wants the virtual point: refused by name, not averaged and not waited for."""

    def work(session: Session) -> None:
        model = nn.Linear(NUMEL, 1, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        session.wrap(model, optimizer)
        if session.rank == 0:
            with session.evaluating("virtual"):
                pass
        else:
            model.weight.grad = torch.ones(1, NUMEL)
            optimizer.step()

    told = pytest.raises(RoundFailedError, match=r"disagree in step 0: one wants a mean only|stopped after")
    with in_process(shards=1, workers=2, method=Method(threshold=1.0, placement="update")) as cluster, told:
        cluster.run(work)


def test_momentum_on_both_sides_is_refused() -> None:
    """DGC keeps its momentum at the workers: an optimizer with one of its own is refused at wrapping."""

    def work(session: Session) -> None:
        model = nn.Linear(NUMEL, 1, bias=False)
        with pytest.raises(OptimizerError, match="set momentum=0"):
            session.wrap(model, torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9))

    with in_process(shards=1, workers=1, method=Method("MomentumCorrection(TopK(0.1))")) as cluster:
        cluster.run(work)


def digits() -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / "digits.py"
    if not path.is_file():
        pytest.skip("the examples are not in a wheel")
    spec = importlib.util.spec_from_file_location("digits", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("period", [1, 4, 16])
@pytest.mark.parametrize("feedback", ["ErrorFeedback", "DetachedErrorFeedback"])
def test_local_steps_converge(feedback: str, period: int) -> None:
    """Digits, with momentum at the workers: above 95 % after ten passes with 1, 4 or 16 steps per round."""
    example = digits()
    train, test = example.data()
    torch.manual_seed(0)
    untrained = example.network()

    def work(session: Session) -> float:
        model = copy.deepcopy(untrained)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        session.wrap(model, optimizer)
        for _ in range(10):
            for images, labels in session.batches(DataLoader(train, batch_size=32, shuffle=True)):
                optimizer.zero_grad()
                torch.autograd.backward(nn.functional.cross_entropy(model(images), labels))
                optimizer.step()
        with session.evaluating():
            accuracy: float = example.evaluate(model, test)["accuracy"]
            return accuracy

    method = Method(f"{feedback}(TopK(0.05))", placement="update", period=period)
    with in_process(shards=2, workers=2, method=method) as cluster:
        accuracies = cluster.run(work)
    assert accuracies[0] == accuracies[1]
    assert accuracies[0] > 0.95
