"""A task of a few parameters, which stands in for every deep task: no data set, and a run in some milliseconds."""

from typing import final

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.papers.recipe import Form
from benchmarks.papers.task import Flat, Plan, Task
from benchmarks.papers.training import TASKS


@final
class Tiny(Task):
    """Two Gaussian clouds to tell apart; the same gradients for a seed, a worker and a round."""

    quality_name = "accuracy in %"
    higher_is_better = True

    def __init__(self, seed: int) -> None:
        self._seed = seed
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.network = Flat(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)))

    def plan(self, form: Form) -> Plan:
        return Plan(rounds=4 if form == "short" else 8, rate=0.1, momentum=0.9)

    def gradient(self, worker: int, point: Tensor, step: int) -> Tensor:
        x, y = self._batch(1000 * step + worker, 16)
        return self.network.gradient(point, lambda network: cross_entropy(network(x), y))

    def quality(self, point: Tensor) -> float:
        x, y = self._batch(-1, 200)
        with torch.no_grad():
            return 100.0 * float((self.network.at(point)(x).argmax(1) == y).float().mean())

    def _batch(self, number: int, size: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed((self._seed << 32) + number + 1)
        y = torch.randint(2, (size,), generator=generator)
        return torch.randn(size, 6, generator=generator) + 2.0 * y.unsqueeze(1), y


@pytest.fixture
def tiny_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("images", "language", "recommendation"):
        monkeypatch.setitem(TASKS, name, Tiny)
