"""Every place at which a process can be killed, one by one, in every mode: nothing is lost, nothing counts twice."""

import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.worker.training import Killed, abandon, snapshot
from torch import Tensor, nn

from thresher.deploy.in_process import InProcess, in_process
from thresher.protos import faults
from thresher.protos.consistency import Consistency
from thresher.worker import Method, Session

STEPS, SIZE = 6, 24
WORKERS = 2  # a power of two: means are exact
SPARSE = Method(threshold=2.5)
LOCKSTEP, QUORUM = Consistency(), Consistency(quorum=1, grace=0.005)
MODES = [LOCKSTEP, QUORUM, Consistency("ssp", staleness=2), Consistency("async")]


@dataclass(frozen=True)
class Trained:
    """What one worker can say at its end: what it computed of the steps that count, kept back, and has as a model."""

    inputs: Tensor
    residual: Tensor
    parameters: Tensor


def gradient(rank: int, step: int) -> Tensor:
    """Small whole numbers: their sums are exact, in whatever order they are added."""
    return torch.randint(-3, 4, (SIZE,), generator=torch.Generator().manual_seed(1000 * step + rank)).float()


def train(session: Session, momentum: float = 0.0, before_leaving: Callable[[], object] = lambda: None) -> Trained:
    """Make the steps; with SGD and a learning rate of 1 parameters are minus the sum of all means."""
    model = nn.Linear(SIZE, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=momentum)
    session.wrap(model, optimizer)
    while session.step < STEPS:
        model.weight.grad = gradient(session.rank, session.step).view(1, SIZE)
        optimizer.step()
    inputs = sum((gradient(session.rank, step) for step in range(STEPS)), torch.zeros(SIZE))
    residual = session.residual.clone()
    before_leaving()
    session.close()
    return Trained(inputs, residual, model.weight.detach().view(-1).clone())


def living(cluster: InProcess, work: Callable[[Session], Trained]) -> list[Trained]:
    """Call ``work`` as the script of every worker; one that a plan kills is started again."""

    def lives(session: Session) -> Trained:
        while True:
            try:
                return work(session)
            except Killed:
                abandon(session)
                session = cluster.connect(session.rank)

    return cluster.run(lives)


class Plan:
    """Kills whatever comes to a place for the third time, worker 1 or shard 1, which begins its next life at once."""

    def __init__(self, cluster: InProcess, phase: str) -> None:
        self._cluster, self._phase = cluster, phase
        self._seen: Counter[str] = Counter()
        self.struck: list[str] = []

    def __call__(self, who: str, where: str) -> None:
        if who not in ("shard 1", "worker 1"):
            return
        self._seen[where] += 1
        if self._phase == where == "recovery" and self._seen[where] == 1:
            self.struck.append(who)
            raise Killed
        if self._phase == "recovery" and where == "tell" and self._seen[where] == 3:
            self._cluster.kill(1)
            with suppress(Killed):
                self._cluster.start(1)
            self._cluster.start(1)
        elif where == self._phase and self._seen[where] == 3:
            self.struck.append(who)
            if who == "worker 1":
                raise Killed
            self._cluster.kill(1)
            self._cluster.start(1)


@pytest.fixture(scope="module")
def undisturbed() -> Tensor:
    """Parameters of a run in lockstep that nothing has happened to."""
    with in_process(shards=2, workers=WORKERS, method=SPARSE) as cluster:
        return cluster.run(lambda session: train(session, momentum=0.5))[0].parameters


@pytest.mark.parametrize("phase", faults.PHASES)
def test_killed_at_any_place_no_bit_changes(phase: str, undisturbed: Tensor, tmp_path: Path) -> None:
    """In lockstep; every place there is, so that none is forgotten: a place that nobody reaches fails its test."""
    with in_process(shards=2, workers=WORKERS, method=SPARSE, state_dir=tmp_path, checkpoint_every=2) as cluster:
        plan = Plan(cluster, phase)
        with faults.plan(plan):
            results = living(cluster, lambda session: train(session, momentum=0.5))
        steps = [[member.steps for member in shard.members] for shard in cluster.statistics()]
    assert len(plan.struck) == 1
    assert steps == [[STEPS] * WORKERS] * 2
    assert all(torch.equal(one.parameters, undisturbed) for one in results)


@pytest.mark.parametrize("phase", faults.PHASES)
@pytest.mark.parametrize("mode", MODES[1:], ids=Consistency.describe)
def test_killed_at_any_place_nothing_is_lost(mode: Consistency, phase: str, tmp_path: Path) -> None:
    """Outside of lockstep: sum of applied means · N + residuals = sum of inputs, exactly, and each push counts once."""
    done = threading.Barrier(WORKERS)  # nobody leaves before all are done: one divisor throughout
    options: dict[str, Any] = {"method": SPARSE, "consistency": mode, "state_dir": tmp_path, "checkpoint_every": 2}
    with in_process(shards=2, workers=WORKERS, **options) as cluster:
        plan = Plan(cluster, phase)
        with faults.plan(plan):
            results = living(cluster, lambda session: train(session, before_leaving=done.wait))
        steps = [[member.steps for member in shard.members] for shard in cluster.statistics()]
        parameters = torch.cat([snapshot(address).state["parameters"] for address in cluster.addresses])
    assert len(plan.struck) == 1
    assert steps == [[STEPS] * WORKERS] * 2
    assert torch.equal(-WORKERS * parameters, sum((one.inputs - one.residual for one in results), torch.zeros(SIZE)))


@pytest.mark.parametrize("whom", ["all shards", "a shard and a worker", "all shards and a worker"])
def test_killed_together_no_bit_changes(whom: str, undisturbed: Tensor, tmp_path: Path) -> None:
    """Several processes in one instant: each goes on from its folder."""
    reached = 0

    def strike(who: str, where: str) -> None:
        nonlocal reached
        reached += (who, where) == ("worker 0", "in flight")
        if (who, where) != ("worker 0", "in flight") or reached != 4:
            return
        shards = (0, 1) if whom.startswith("all shards") else (1,)
        for shard in shards:
            cluster.kill(shard)
        for shard in shards:
            cluster.start(shard)
        if whom.endswith("worker"):
            raise Killed

    with in_process(shards=2, workers=WORKERS, method=SPARSE, state_dir=tmp_path) as cluster, faults.plan(strike):
        results = living(cluster, lambda session: train(session, momentum=0.5))
        steps = [[member.steps for member in shard.members] for shard in cluster.statistics()]
    assert reached > 4
    assert steps == [[STEPS] * WORKERS] * 2
    assert all(torch.equal(one.parameters, undisturbed) for one in results)
