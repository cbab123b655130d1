"""A worker that is killed beside agreements: those of a loop that is over are not asked again, all others are."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.worker.training import Killed, Scale, cluster, sgd
from torch.utils.data import DataLoader, TensorDataset

from thresher.protos import faults
from thresher.protos.errors import ProtocolError
from thresher.worker import Session


def script(session: Session, *, passes: bool) -> dict[Any, float]:
    """Two loops over data in each epoch; agreements in them, behind them and before everything."""
    model = Scale()
    optimizer = sgd(model, lr=0.1)
    session.wrap(model, optimizer)
    found: dict[Any, float] = {"before": session.mean({"x": -1.0 - session.rank})["x"]}
    for epoch in session.passes(2) if passes else range(2):
        for loop, count in enumerate((16, 8)):
            for (batch,) in session.batches(DataLoader(TensorDataset(torch.arange(float(count))), batch_size=2)):
                optimizer.zero_grad()
                loss = model(batch[:1].expand(2)).square().sum()
                torch.autograd.backward(loss)
                optimizer.step()
                found[session.step] = session.mean({"x": float(loss.detach())})["x"]
            found[epoch, loop] = session.mean({"x": 100.0 * epoch + 10 * loop + session.rank})["x"]
    return found


@pytest.mark.parametrize("passes", [True, False], ids=["passes", "range"])
@pytest.mark.parametrize("count", [3, 6, 7, 12])
@pytest.mark.parametrize("phase", ["gradient", "flip"])
def test_killed_beside_agreements(phase: str, count: int, passes: bool, tmp_path: Path) -> None:
    """In the first and in the second loop of the first and of the second epoch."""
    reached = 0

    def strike(who: str, where: str) -> None:
        nonlocal reached
        reached += (who, where) == ("worker 0", phase)
        if (who, where, reached) == ("worker 0", phase, count):
            reached += 1
            raise Killed

    def work(session: Session) -> dict[Any, float]:
        return script(session, passes=passes)

    with cluster(1, 2) as served:
        expected = served.run(work)
    with cluster(1, 2, tmp_path, worker_memory=True) as served, faults.plan(strike):
        results = served.run(work)
    assert reached > count
    assert expected[1] == results[1]
    assert all(expected[0][place] == value for place, value in results[0].items())
    assert {"before", (1, 0), (1, 1)} <= results[0].keys()


def test_a_loop_inside_a_loop(tmp_path: Path) -> None:
    """It is refused in the first life already, and the worker's next life would be, too."""

    def work(session: Session) -> None:
        model = Scale()
        session.wrap(model, sgd(model))
        loader = DataLoader(TensorDataset(torch.arange(4.0)), batch_size=1)
        for _ in session.batches(loader):
            for _ in session.batches(loader):
                pytest.fail("a batch of the inner loop")

    with cluster(1, 1) as served, pytest.raises(ProtocolError, match="evaluate with the loader itself"):
        served.run(work)


def test_a_loop_that_is_left_early_is_over() -> None:
    """By ``break`` or by an exception: the next may begin."""

    def work(session: Session) -> list[float]:
        model = Scale()
        session.wrap(model, sgd(model))
        loader = DataLoader(TensorDataset(torch.arange(4.0)), batch_size=1)
        for _ in session.batches(loader):
            break
        with suppress(ValueError):
            for _ in session.batches(loader):
                raise ValueError
        return [float(batch) for (batch,) in session.batches(loader)]

    with cluster(1, 1) as served:
        assert served.run(work) == [[0.0, 1.0, 2.0, 3.0]]
