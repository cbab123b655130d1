"""A shard that is killed while a worker catches up with it, refills it or leaves it: the run goes on."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.worker.conversing import Proxy, wait_until
from tests.worker.losing import before_the_first, lose
from tests.worker.test_rounds_broken import SPARSE, STEPS, Trained, at, total, train
from tests.worker.training import Cluster, cluster
from torch import Tensor

from thresher.protos import faults
from thresher.protos.consistency import Consistency
from thresher.worker import Session, connect
from thresher.worker.calls import ShardCalls
from thresher.worker.client import ShardClient

ASYNC = Consistency("async")


@pytest.fixture(scope="module")
def undisturbed() -> Tensor:
    with cluster(2, 2, method=SPARSE) as served:
        return served.run(train)[0].parameters


@pytest.mark.parametrize(
    ("owner", "call"),
    [(ShardCalls, "register"), (ShardCalls, "seed"), (ShardClient, "reopen")],
    ids=["register", "seed", "reopen"],
)
def test_a_shard_killed_again_while_it_is_refilled(
    owner: type, call: str, undisturbed: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who refills it tells it once more who it is, and all that it had."""
    due = at("worker 0", "compress", 3)
    with cluster(2, 2, method=SPARSE) as served:
        lost = threading.Event()

        def strike(who: str, where: str) -> None:
            if due(who, where):
                served.kill(1)
                served.start(1)
                lost.set()

        def again(one: ShardCalls | ShardClient) -> bool:
            calls = one.calls if isinstance(one, ShardClient) else one
            if lost.is_set() and calls.shard == 1:
                lose(served, 1)
                return True
            return False

        struck = before_the_first(monkeypatch, owner, call, again)
        with faults.plan(strike):
            results = served.run(train)
        assert [served.statistics(shard).version for shard in range(2)] == [STEPS, STEPS]
    assert struck
    assert all(torch.equal(one.parameters, undisturbed) for one in results)


def far_behind(served: Cluster, *, when_leaving: bool) -> list[Trained]:
    """Train two workers, of which one is cut off after two steps, until what it lacks is no longer in the shard's log.

    It comes back in its third step, or to leave.
    """
    proxy = Proxy(served.settings.addresses[0])
    cut, done = threading.Event(), threading.Event()

    def fall_behind() -> None:
        proxy.hold(60)
        cut.set()
        wait_until(lambda: served.statistics().version == 7)
        served.kill(0)
        served.start(0)
        proxy.hold(0)

    def strike(who: str, where: str) -> None:
        if due(who, where):
            fall_behind()

    def work(session: Session) -> Trained:
        if session.rank == 1:
            assert cut.wait(60)
            return train(session, 5, before_leaving=lambda: done.wait(60))
        session = connect(settings=replace(session._settings, addresses=(proxy.address,)))
        try:
            return train(session, 2, before_leaving=fall_behind) if when_leaving else train(session, 3)
        finally:
            done.set()

    due = at("worker 0", "compress", 3)
    try:
        with faults.plan(strike):
            return served.run(work)
    finally:
        proxy.close()


def test_a_shard_killed_while_a_worker_catches_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked for until it has a snapshot to give."""
    with cluster(1, 2, tmp_path, method=SPARSE, consistency=ASYNC) as served:

        def strike(_: ShardCalls) -> bool:
            behind = served.statistics().version == 7
            if behind:
                lose(served, 0)
            return behind

        struck = before_the_first(monkeypatch, ShardCalls, "snapshot", strike)
        results = far_behind(served, when_leaving=False)
        (found,) = served.snapshots()
    assert struck
    assert torch.equal(-2 * found.state["parameters"], total(results))


def test_a_worker_that_is_far_behind_when_it_leaves(tmp_path: Path) -> None:
    """It takes a snapshot as it would for a push, and says its leave again."""
    with cluster(1, 2, tmp_path, method=SPARSE, consistency=ASYNC) as served:
        results = far_behind(served, when_leaving=True)
        (found,) = served.snapshots()
        assert {member.state for member in served.statistics().members} == {"left"}
    assert torch.equal(-2 * found.state["parameters"], total(results))


def test_a_shard_killed_while_workers_leave(undisturbed: Tensor) -> None:
    """Without a folder too: who leaves refills it first."""
    with cluster(2, 2, method=SPARSE) as served:

        def strike() -> None:
            served.kill(1)
            served.start(1)

        trained = threading.Barrier(2, strike)
        results = served.run(lambda session: train(session, before_leaving=trained.wait))
        found = served.snapshots()
    assert all(torch.equal(one.parameters, undisturbed) for one in results)
    assert torch.equal(torch.cat([one.state["parameters"] for one in found]), undisturbed)
