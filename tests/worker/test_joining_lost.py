"""Joining a shard that is killed meanwhile: it is found again, and the run is the one it would have been."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tests.worker.conversing import wait_until
from tests.worker.losing import before_the_first, lose
from tests.worker.test_rounds_broken import SPARSE, Trained, train
from tests.worker.training import cluster
from torch import Tensor

from thresher.worker import Session
from thresher.worker.calls import ShardCalls


@pytest.fixture(scope="module")
def undisturbed() -> Tensor:
    with cluster(2, 2, method=SPARSE) as served:
        return served.run(train)[0].parameters


@pytest.mark.parametrize("durable", [True, False], ids=["journal", "nothing kept"])
def test_a_shard_killed_while_a_worker_waits_for_the_seed(durable: bool, undisturbed: Tensor, tmp_path: Path) -> None:
    """It is found again, told once more who waits, and waits with it."""
    with cluster(2, 2, tmp_path if durable else None, method=SPARSE) as served:
        killed = threading.Event()

        def work(session: Session) -> Trained:
            if session.rank == 0:
                assert killed.wait(60)
            return train(session)

        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(served.run, work)
            wait_until(lambda: served.statistics(1).members[1].state == "registered")
            threading.Event().wait(0.2)
            for shard in range(2):
                served.kill(shard)
                served.start(shard)
            killed.set()
            results = running.result()
    assert all(torch.equal(one.parameters, undisturbed) for one in results)


@pytest.mark.parametrize("call", ["register", "seed", "snapshot"])
def test_a_shard_killed_under_a_call_of_one_who_joins(
    call: str, undisturbed: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them is repeated, and changes nothing when it has been heard before."""
    with cluster(2, 2, tmp_path, method=SPARSE) as served:

        def strike(calls: ShardCalls) -> bool:
            if calls.shard == 1:
                lose(served, 1)
            return calls.shard == 1

        struck = before_the_first(monkeypatch, ShardCalls, call, strike)
        results = served.run(train)
    assert struck
    assert all(torch.equal(one.parameters, undisturbed) for one in results)
