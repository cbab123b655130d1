"""A parameter server inside one process: it begins and ends with its block, and hands on what its workers do."""

import threading

import pytest
import torch

from thresher.deploy.in_process import in_process
from thresher.protos.errors import ProtocolError, RoundFailedError
from thresher.worker import Method, Session


def one_step(session: Session) -> int:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    session.wrap(model, optimizer)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return session.rank


def test_results_come_by_rank() -> None:
    """`run` returns what each rank returned, in order; afterwards all shards have finished."""
    with in_process(shards=2, workers=3) as cluster:
        assert cluster.run(one_step) == [0, 1, 2]
        assert [(shard.state, shard.version) for shard in cluster.statistics()] == [("finished", 1)] * 2


def test_the_cause_is_raised_and_not_its_consequences() -> None:
    """When one worker fails, the others fail because of it; `run` raises what the first one raised."""
    told: list[BaseException] = []

    def work(session: Session) -> None:
        if session.rank == 2:
            model = torch.nn.Linear(2, 1)
            session.wrap(model, torch.optim.SGD(model.parameters(), lr=1.0))
            raise KeyError("of rank 2")
        try:
            one_step(session)
        except RoundFailedError as error:
            told.append(error)
            raise

    with in_process(shards=1, workers=3) as cluster, pytest.raises(KeyError, match="of rank 2"):
        cluster.run(work)
    assert len(told) == 2
    assert all("KeyError: 'of rank 2'" in str(error) for error in told)


def test_nothing_is_left_behind() -> None:
    """No thread outlives the block, whether it ends well, by an exception, or before it began."""
    before = set(threading.enumerate())
    with in_process(shards=2, workers=1) as cluster:
        cluster.run(one_step)
    with pytest.raises(ZeroDivisionError), in_process(shards=2, workers=1):
        raise ZeroDivisionError
    with pytest.raises(TypeError, match="nonsense"), in_process(shards=1, workers=1, nonsense=1):
        pass
    named = {thread for thread in set(threading.enumerate()) - before if thread.name.startswith("shard")}
    assert not named


def test_options_reach_the_shards_and_the_method_the_workers() -> None:
    """What is given to the block is what holds in it; one worker may be given another method."""
    with in_process(shards=1, workers=2, method=Method(threshold=0.5), start_timeout=0.2) as cluster:
        session = cluster.connect(0)
        with pytest.raises(RoundFailedError, match="worker 1 has never registered"):
            one_step(session)
        session.abort("nobody else came")
        assert cluster.connect(0)._settings.method == Method(threshold=0.5)
        assert cluster.connect(1, Method(threshold=0.25))._settings.method == Method(threshold=0.25)


def test_runs_are_apart() -> None:
    """Two clusters at one time know nothing of each other."""
    with in_process(shards=1, workers=1) as one, in_process(shards=1, workers=1) as other:
        one.run(one_step)
        assert [cluster.statistics()[0].version for cluster in (one, other)] == [1, 0]


def test_after_the_block_the_shards_are_gone() -> None:
    """A session that is still open then says so at its next step, instead of waiting."""
    with in_process(shards=1, workers=1) as cluster:
        session = cluster.connect(0)
        model = torch.nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        session.wrap(model, optimizer)
    model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(RoundFailedError, match=f"has lost shard 0 at {cluster.addresses[0]}"):
        optimizer.step()
    session.abort("the shards are gone")
    with pytest.raises(ProtocolError, match="closed"):
        optimizer.step()
