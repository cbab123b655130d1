"""Rounds with shards that die, workers that were away, and every mode: nothing is lost, nothing counts twice."""

import re
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.worker.conversing import Proxy
from tests.worker.training import Killed, Scale, cluster, set_gradients, sgd
from torch import Tensor, nn

from thresher.protos import faults
from thresher.protos.consistency import Consistency
from thresher.protos.errors import DataLossError
from thresher.worker import Method, Session, connect

STEPS = 8
SPARSE = Method(threshold=2.5)


def gradient(rank: int, step: int, size: int) -> Tensor:
    """Small whole numbers: their sums are exact, in whatever order they are added."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(-3, 4, (size,), generator=generator).float()


@dataclass(frozen=True)
class Trained:
    inputs: Tensor
    residual: Tensor
    parameters: Tensor
    steps: int


def train(session: Session, steps: int = STEPS, pause: float = 0.0, before_leaving: Any = lambda: None) -> Trained:
    """Add whole numbers: with SGD and a learning rate of 1, parameters are minus the sum of all means."""
    size = 40
    model = nn.Linear(size, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    session.wrap(model, optimizer)
    inputs = torch.zeros(size)
    while session.step < steps:
        values = gradient(session.rank, session.step, size)
        inputs += values
        model.weight.grad = values.view(1, size)
        optimizer.step()
        time.sleep(pause)
    residual = session.residual.clone()
    before_leaving()
    session.close()
    return Trained(inputs, residual, model.weight.detach().view(-1).clone(), session.step)


def total(results: list[Trained]) -> Tensor:
    """What the sum of all means times N must be."""
    return sum((one.inputs - one.residual for one in results), torch.zeros(()))


@pytest.fixture(scope="module")
def undisturbed() -> Tensor:
    with cluster(2, 2, method=SPARSE) as served:
        return served.run(train)[0].parameters


def at(who: str, phase: str, *numbers: int) -> Any:
    """Return a test of whether ``who`` reaches ``phase`` for one of these times."""
    seen = 0

    def reached(one: str, where: str) -> bool:
        nonlocal seen
        seen += (one, where) == (who, phase)
        return (one, where) == (who, phase) and seen in numbers

    return reached


@pytest.mark.parametrize("phase", ["compress", "in flight"])
@pytest.mark.parametrize("durable", [True, False], ids=["journal", "refill"])
def test_a_shard_that_dies(phase: str, durable: bool, undisturbed: Tensor, tmp_path: Path) -> None:
    """From its folder, or from a worker's replica where it has none: the run goes on as if nothing had been."""
    due = at("worker 0", phase, 3, 9)
    with cluster(2, 2, tmp_path if durable else None, method=SPARSE) as served:

        def strike(who: str, where: str) -> None:
            if due(who, where):
                served.kill(1)
                served.start(1)

        with faults.plan(strike):
            results = served.run(train)
        for shard in range(2):
            assert served.statistics(shard).version == STEPS
    assert all(torch.equal(one.parameters, undisturbed) for one in results)


def test_all_shards_die_at_once_without_a_folder(undisturbed: Tensor) -> None:
    """The workers' replicas are the run."""
    due = at("worker 1", "compress", 4)
    with cluster(2, 2, method=SPARSE) as served:

        def strike(who: str, where: str) -> None:
            if due(who, where):
                for shard in range(2):
                    served.kill(shard)
                for shard in range(2):
                    served.start(shard)

        with faults.plan(strike):
            results = served.run(train)
    assert all(torch.equal(one.parameters, undisturbed) for one in results)


@pytest.mark.parametrize(
    "consistency", [Consistency("async"), Consistency("ssp", staleness=3, downlink="shadow")], ids=["async", "shadow"]
)
def test_what_cannot_be_refilled(consistency: Consistency) -> None:
    """Where no replica is all that the shard knew, the run ends with an error that says so, and what to do."""
    due = at("worker 0", "compress", 4)
    with cluster(1, 1, method=SPARSE, consistency=consistency) as served:

        def strike(who: str, where: str) -> None:
            if due(who, where):
                served.kill(0)
                served.start(0)

        with faults.plan(strike), pytest.raises(DataLossError, match="restore its state folder"):
            served.run(train)


# Away for longer than the lease


def test_a_worker_that_was_away_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    """The others go on without it; its push comes back, and it goes on from a snapshot, at the step of the others.

    Shard, the others and itself say so, with rank, shard, version and step.
    """
    with cluster(1, 2, method=SPARSE, lease=0.2) as served:
        proxy = Proxy(served.settings.addresses[0])

        def strike(who: str, phase: str) -> None:
            if away(who, phase):
                proxy.hold(1.0)

        def work(session: Session) -> Trained:
            if session.rank == 0:
                return train(session, 100, pause=0.03)
            return train(connect(settings=replace(session._settings, addresses=(proxy.address,))), 30)

        away = at("worker 1", "compress", 5)
        with faults.plan(strike):
            results = served.run(work)
        proxy.close()
        found = served.statistics()
    assert found.verdicts["returned"] == 1
    assert [member.steps for member in found.members] == [100, 29]
    assert [one.steps for one in results] == [100, 30]
    for said in (
        r"shard 0 at version \d+ goes on without worker 1 \(.*\), which was lost .* after 4 steps: its lease is 0\.2 s",
        r"worker 0: worker 1 does not belong to the run from version \d+ of shard 0 at \S+ on",
        r"worker 1 has step 4 back from shard 0 at \S+: ",
        r"worker 1 waits to be let in at version \d+ of shard 0 at \S+",
        r"worker 1 is let in from step \d+ on",
        r"shard 0 at version \d+ lets in worker 1 \(.*\), after 4 steps of its own",
    ):
        assert any(re.search(said, message) for message in caplog.messages), said


def test_a_worker_that_was_away_loses_nothing() -> None:
    """What the shard did not take is in the residual again: whole numbers in, whole numbers out."""
    with cluster(1, 2, method=SPARSE, lease=0.2) as served:
        proxy = Proxy(served.settings.addresses[0])
        away = at("worker 1", "compress", 3)

        def strike(who: str, phase: str) -> None:
            if away(who, phase):
                proxy.hold(0.8)

        found: list[tuple[Tensor, Tensor]] = []

        def one(session: Session) -> None:
            scale = Scale(4)
            session = connect(settings=replace(session._settings, addresses=(proxy.address,)))
            optimizer = sgd(scale)
            session.wrap(scale, optimizer)
            for value in (4.0, 1.0, 4.0):
                set_gradients(scale, value)
                optimizer.step()
            found.append((session.residual.clone(), torch.tensor(session.step)))
            session.close()

        def other(session: Session) -> None:
            scale = Scale(4)
            optimizer = sgd(scale)
            session.wrap(scale, optimizer)
            while not found:
                set_gradients(scale, 0.0)
                optimizer.step()
                time.sleep(0.03)
            session.close()

        with faults.plan(strike):
            served.run(lambda session: one(session) if session.rank else other(session))
        proxy.close()
    ((residual, steps),) = found
    assert torch.equal(residual, torch.full((8,), 5.0)), "1 was kept back, 4 came back"
    assert int(steps) == 3


def test_a_fresh_rank_joins_a_running_run() -> None:
    """It is let in at a round's end, gets everything from a snapshot, and counts from then on."""
    with cluster(2, 1, method=SPARSE) as served:
        joined = threading.Event()
        found: list[Trained] = []

        def late() -> None:
            settings = replace(served.settings, rank=1, workers=2)
            with connect(settings=settings) as session:
                found.append(train(session, 10))
            joined.set()

        newcomer = threading.Thread(target=late)

        def work(session: Session) -> int:
            scale = nn.Linear(40, 1, bias=False)
            nn.init.zeros_(scale.weight)
            optimizer = torch.optim.SGD(scale.parameters(), lr=1.0)
            session.wrap(scale, optimizer)
            newcomer.start()
            while not joined.is_set():
                scale.weight.grad = torch.ones(1, 40)
                optimizer.step()
                time.sleep(0.01)
            return session.step

        steps = served.run(work)
        newcomer.join()
        members = served.statistics().members
    assert [member.steps for member in members] == [steps[0], 10]


def test_a_worker_whose_state_was_lost() -> None:
    """Shards that have heard different numbers of its pushes are told that one is lost; then all agree again."""
    due = at("worker 1", "in flight", 5)  # of its third step, one of the two shards has been told
    with cluster(2, 2, method=SPARSE) as served:

        def strike(who: str, where: str) -> None:
            if due(who, where):
                time.sleep(0.2)
                raise Killed

        with faults.plan(strike):
            results = served.run(train_by_version)
        versions = [served.statistics(shard).version for shard in range(2)]
        steps = [[member.steps for member in served.statistics(shard).members] for shard in range(2)]
    assert versions == [STEPS, STEPS]
    assert steps == [[STEPS, STEPS]] * 2
    assert torch.equal(results[0], results[1])


def train_by_version(session: Session) -> Tensor:
    """A script that counts by the run's rounds, not by its own steps."""
    linear = nn.Linear(40, 1, bias=False)
    nn.init.zeros_(linear.weight)
    optimizer = torch.optim.SGD(linear.parameters(), lr=1.0)
    session.wrap(linear, optimizer)
    while session._rounds.number < STEPS:
        linear.weight.grad = gradient(session.rank, session._rounds.number, 40).view(1, 40)
        optimizer.step()
    session.close()
    return linear.weight.detach().clone()


# Every mode


@pytest.mark.parametrize("downlink", ["updates", "shadow"])
@pytest.mark.parametrize(
    "mode",
    [
        Consistency(),
        Consistency(quorum=1, grace=0.01),
        Consistency("ssp", staleness=2),
        Consistency("async"),
        Consistency("async", max_staleness=2),
    ],
    ids=Consistency.describe,
)
def test_nothing_is_lost_in_any_mode(mode: Consistency, downlink: Any) -> None:
    """Sum of applied means · N + residuals = sum of inputs, exactly; and no worker is kept from any of its steps."""
    consistency = replace(mode, downlink=downlink)
    workers = 4  # a power of two: means are exact

    done = threading.Barrier(workers)  # nobody leaves before all are done: a divisor of 4 throughout
    with cluster(2, workers, method=SPARSE, consistency=consistency) as served:
        results = served.run(lambda session: train(session, 12, 0.01 * session.rank, done.wait))
        found = served.snapshots()
        counted = [[member.steps for member in served.statistics(shard).members] for shard in range(2)]
        returned = [served.statistics(shard).verdicts["returned"] for shard in range(2)]
    parameters = torch.cat([snapshot.state["parameters"] for snapshot in found])
    assert torch.equal(-workers * parameters, total(results))
    assert [sum(steps) for steps in counted] == [12 * workers - one for one in returned]
    assert all(one.steps == 12 for one in results)


@pytest.mark.parametrize(
    "mode", [Consistency(), Consistency("ssp", staleness=1), Consistency("async")], ids=Consistency.describe
)
def test_workers_that_copy_a_shadow_have_its_bits(mode: Consistency) -> None:
    """Who has heard of the last update has the shards' shadow as a model, which lags behind x; in lockstep all have."""
    consistency = replace(mode, downlink="shadow", shadow_threshold=1.75)
    done = threading.Barrier(2)
    with cluster(2, 2, method=SPARSE, consistency=consistency) as served:
        results = served.run(lambda session: train(session, 6, 0.05 * session.rank, done.wait))
        found = served.snapshots()
    shadow = torch.cat([snapshot.visible for snapshot in found])
    exact = torch.cat([snapshot.state["parameters"] for snapshot in found])
    last = results if mode.lockstep else results[1:]  # rank 1 is the slower one
    assert all(torch.equal(one.parameters, shadow) for one in last)
    assert 0 < float((exact - shadow).abs().max()) < 1.75
