"""A worker that is killed and started again ends where the undisturbed one ends, bit for bit."""

from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.worker.training import EVERYTHING, Killed, Scale, abandon, cluster, set_gradients, sgd
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from thresher.protos import faults
from thresher.protos.errors import ConfigurationError, DataLossError
from thresher.worker import Method, Session
from thresher.worker.memory import MemoryFileError

PHASES = ("gradient", "compress", "flip", "in flight")


class Average:
    """A moving average of a model's parameters: what users keep."""

    def __init__(self, model: nn.Module) -> None:
        self.values = [parameter.detach().clone() for parameter in model.parameters()]

    def update(self, model: nn.Module) -> None:
        for value, parameter in zip(self.values, model.parameters(), strict=True):
            value.lerp_(parameter.detach(), 0.25)

    def state_dict(self) -> dict[str, Any]:
        return {str(index): value.clone() for index, value in enumerate(self.values)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for index, value in enumerate(self.values):
            value.copy_(state[str(index)])


@dataclass
class Script:
    """A training script, as users write them; `kill` of the cluster's fault plan ends it anywhere.

    Attributes:
        passes: Whether it loops over ``session.passes`` or over a plain ``range``.
        accumulate: Batches per step.
        per_step: The scheduler moves with every step, not with every pass.
        stop_at: The pass after which rank 1 wishes to stop.
        optimizer: Makes it.
        loader: Further options of the loader.
    """

    passes: bool = True
    accumulate: int = 1
    per_step: bool = True
    stop_at: int = 99
    momentum: float = 0.9
    loader: dict[str, Any] = field(default_factory=dict)

    def __call__(self, session: Session) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(5)
        data = TensorDataset(torch.randn(16, 4, generator=generator), torch.randn(16, 2, generator=generator))
        loader = DataLoader(data, batch_size=2 // self.accumulate, shuffle=True, **self.loader)
        model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, momentum=0.5), nn.Linear(3, 2))
        for index, parameter in enumerate(model.parameters()):
            nn.init.constant_(parameter, 0.1 + 0.1 * index)
        model[1].eval()  # batches of one
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=self.momentum)
        session.wrap(model, optimizer)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
        average = Average(model)
        session.keep(scheduler=scheduler, average=average)
        means: dict[int, float] = {}
        stopped = -1
        for number in session.passes(3) if self.passes else range(3):
            for index, (inputs, target) in enumerate(session.batches(loader)):
                model[1].running_mean += inputs.mean() / 8  # a buffer that moves with every forward pass
                loss = (model(inputs) - target).square().mean()
                torch.autograd.backward(loss)
                if (index + 1) % self.accumulate:
                    continue
                optimizer.step()
                optimizer.zero_grad()
                average.update(model)
                if self.per_step:
                    scheduler.step()
            if not self.per_step:
                scheduler.step()
            means[number] = session.mean({"average": float(average.values[0].sum())})["average"]
            if session.stop(number == self.stop_at and session.rank == 1):
                stopped = number
                break
        return {
            "model": {name: value.clone() for name, value in model.state_dict().items()},
            "average": average.state_dict(),
            "rate": optimizer.param_groups[0]["lr"],
            "moved": scheduler.last_epoch,
            "steps": session.step,
            "residual": session.residual.clone(),
            "means": means,
            "stopped": stopped,
        }


class Plan:
    """Kills workers when they reach a place for the n-th time."""

    def __init__(self, kills: list[tuple[str, str, int]]) -> None:
        self._kills = set(kills)
        self._seen: Counter[tuple[str, str]] = Counter()
        self.struck = 0

    def __call__(self, who: str, phase: str) -> None:
        if not who.startswith("worker"):
            return
        self._seen[who, phase] += 1
        if (who, phase, self._seen[who, phase]) in self._kills:
            self.struck += 1
            raise Killed


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    return bool(one == other)


def compare(
    folder: Path,
    script: Script,
    kills: list[tuple[str, str, int]],
    method: Method,
    workers: int = 2,
) -> None:
    """Run undisturbed and with kills; everything that the script knows at its end must be the same."""
    with cluster(2, workers, method=method) as served:
        expected = served.run(script)
        applied = [member.steps for member in served.statistics().members]
    plan = Plan(kills)
    with cluster(2, workers, folder, method=method, worker_memory=True) as served, faults.plan(plan):
        found = served.run(script)
        for shard in range(2):
            assert [member.steps for member in served.statistics(shard).members] == applied
    assert plan.struck == len(kills)
    for one, other in zip(found, expected, strict=True):
        for name in other:
            if name == "means":  # a script that was killed has forgotten what it printed before
                assert all(other["means"][number] == mean for number, mean in one["means"].items())
            else:
                assert same(one[name], other[name]), name


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("passes", [True, False], ids=["passes", "range"])
def test_killed_in_every_phase(phase: str, passes: bool, tmp_path: Path) -> None:
    """In the first step, in the middle of a pass, and right after one; scheduler, average and buffers included."""
    kills = [("worker 0", phase, 1), ("worker 0", phase, 4), ("worker 1", phase, 6), ("worker 0", phase, 11)]
    compare(tmp_path, Script(passes=passes), kills, Method(threshold=0.05))


@pytest.mark.parametrize(
    ("script", "method"),
    [
        (Script(per_step=False), EVERYTHING),
        (Script(per_step=False, passes=False), EVERYTHING),
        (Script(stop_at=1), EVERYTHING),
        (Script(stop_at=1, passes=False), EVERYTHING),
        (Script(accumulate=2), Method(threshold=0.05)),
        (Script(), Method(density=0.2)),
        (Script(), Method(density=0.2, rule="calibrated")),
        (Script(), Method(threshold=0.02, placement="update", period=4)),
        (Script(), Method(threshold=0.02, placement="update", period=4, outer="SGD(lr=0.7, momentum=0.9)")),
    ],
)
def test_killed_in_every_kind_of_run(script: Script, method: Method, tmp_path: Path) -> None:
    """Schedules per pass, early stopping, accumulation, steered thresholds, local steps."""
    rare = method.period > 1
    kills = [
        ("worker 0", "gradient", 6),
        ("worker 1", "in flight", 1 if rare else 7),
        ("worker 0", "flip", 2 if rare else 8),
    ]
    compare(tmp_path, script, kills, method)


def test_killed_beside_a_loader_with_processes(tmp_path: Path) -> None:
    """The loader's processes end with the worker, and the next life's loader goes on at its batch."""
    kills = [("worker 0", phase, count) for phase, count in (("gradient", 3), ("flip", 6), ("in flight", 11))]
    compare(tmp_path, Script(loader={"num_workers": 2}), kills, EVERYTHING, workers=1)


def test_overflows_are_skipped_again(tmp_path: Path) -> None:
    """A step that a GradScaler skipped is skipped by the next life too, and the scaler backs off once."""
    plan = Plan([("worker 0", "in flight", 2), ("worker 0", "gradient", 4)])

    def work(session: Session) -> tuple[Tensor, float, int]:
        model = Scale()
        optimizer = sgd(model, lr=1.0)
        session.wrap(model, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=1000)
        session.keep(scaler=scaler)
        loader = DataLoader(TensorDataset(torch.tensor([1.0, torch.inf, 2.0, 4.0, 1.0])), batch_size=1)
        for (factor,) in session.batches(loader):
            optimizer.zero_grad()
            scaler.scale(model(factor.expand(2)).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        return model.weight.detach().clone(), scaler.get_scale(), session.step

    with cluster(1, 1) as served:
        (expected,) = served.run(work)
    with cluster(1, 1, tmp_path, worker_memory=True) as served, faults.plan(plan):
        (found,) = served.run(work)
    assert plan.struck == 2
    assert torch.equal(found[0], expected[0])
    assert found[1:] == expected[1:] == (8.0, 5)


# Memories of somebody else


def one_step(session: Session, size: int = 2) -> None:
    model = Scale(size)
    optimizer = sgd(model)
    session.wrap(model, optimizer)
    set_gradients(model, 1.0)
    optimizer.step()


def leave_a_memory(folder: Path) -> None:
    with cluster(1, 1, folder, worker_memory=True, method=EVERYTHING) as served:
        session = served.connect(0)
        one_step(session)
        abandon(session)


def test_the_memory_of_another_run(tmp_path: Path) -> None:
    """It is refused, and the message says which folder, and what to do."""
    leave_a_memory(tmp_path)
    with cluster(1, 1) as served, pytest.raises(DataLossError, match=r"remembers run .*give it the folder of this run"):
        served.work(one_step, 0, state_dir=tmp_path / "workers")


@pytest.mark.parametrize(
    ("size", "method"), [(3, EVERYTHING), (2, Method(threshold=0.5))], ids=["another model", "another method"]
)
def test_the_memory_of_another_worker(size: int, method: Method, tmp_path: Path) -> None:
    """It is refused before anything is sent."""
    leave_a_memory(tmp_path)
    with cluster(1, 1) as served:
        with pytest.raises(ConfigurationError, match="give this run a folder of its own"):
            served.work(partial(one_step, size=size), 0, state_dir=tmp_path / "workers", method=method)
        assert served.statistics().model_numel == 0


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    """A file is in its way."""
    (tmp_path / "workers").write_text("")
    with cluster(1, 1) as served, pytest.raises(MemoryFileError, match=r"worker 0 cannot keep its state in .*workers"):
        served.work(one_step, 0, state_dir=tmp_path / "workers")


def test_who_has_left_is_forgotten(tmp_path: Path) -> None:
    """A worker that left in peace begins anew in the next run, in the same folder."""
    for _ in range(2):
        with cluster(1, 1) as served:
            served.work(one_step, 0, state_dir=tmp_path / "workers")
            assert served.statistics().version == 1
