"""A parameter server inside one process: it begins and ends with its block, and hands on what its workers do."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from thresher.deploy.in_process import in_process
from thresher.protos import faults
from thresher.protos.consistency import Consistency
from thresher.protos.errors import ConnectionTimeoutError, ProtocolError, RoundFailedError
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
    with in_process(shards=1, workers=1, reconnect_timeout=0.3, lease=0.3) as cluster:
        session = cluster.connect(0)
        model = torch.nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        session.wrap(model, optimizer)
    model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(ConnectionTimeoutError, match=f"has lost shard 0 at {cluster.addresses[0]}"):
        optimizer.step()
    session.abort("the shards are gone")
    with pytest.raises(ProtocolError, match="closed"):
        optimizer.step()


def steps(count: int) -> Callable[[Session], torch.Tensor]:
    """Return the work of some steps on gradients that are a function of rank and step; it returns the parameters."""

    def work(session: Session) -> torch.Tensor:
        model = torch.nn.Linear(4, 3)
        torch.nn.init.ones_(model.weight)
        torch.nn.init.zeros_(model.bias)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        session.wrap(model, optimizer)
        for step in range(count):
            generator = torch.Generator().manual_seed(1000 * session.rank + step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        session.close()
        return torch.cat([parameter.detach().view(-1) for parameter in model.parameters()])

    return work


@pytest.mark.parametrize("phase", ["round open", "apply", "append", "tell", "checkpoint"])
def test_a_shard_killed_anywhere_and_started_again_changes_no_bit(tmp_path: Path, phase: str) -> None:
    """A plan of faults strikes at one shard, which goes on from its folder: the parameters are those without it."""
    with in_process(shards=2, workers=2) as cluster:
        expected = cluster.run(steps(6))
    struck: list[str] = []

    def strike(who: str, where: str) -> None:
        if (who, where) == ("shard 1", phase):
            reached.append(where)
            if len(reached) == 3:
                struck.append(where)
                cluster.kill(1)
                cluster.start(1)

    reached: list[str] = []
    with in_process(shards=2, workers=2, state_dir=tmp_path, checkpoint_every=2) as cluster, faults.plan(strike):
        found = cluster.run(steps(6))
        assert [shard.version for shard in cluster.statistics()] == [6, 6]
        assert [sum(member.steps for member in shard.members) for shard in cluster.statistics()] == [12, 12]
    assert struck == [phase]
    assert all(torch.equal(one, expected[0]) for one in found)


def test_a_shard_that_is_killed_writes_no_checkpoint(tmp_path: Path) -> None:
    """Nothing but its first one is there afterwards, while one that ends in peace writes another."""

    def checkpoints() -> int:
        return len(list((tmp_path / "shard-0").glob("*.safetensors")))

    with in_process(shards=1, workers=2, state_dir=tmp_path, checkpoint_every=0) as cluster:
        cluster.run(steps(3))
        assert checkpoints() == 1
        cluster.kill(0)
        assert checkpoints() == 1
        cluster.start(0)
    assert checkpoints() == 2


def test_a_shard_is_killed_and_started_from_outside(tmp_path: Path) -> None:
    """`kill` and `start` from a thread of the user's: workers wait meanwhile; each twice in a row is refused."""
    gone = threading.Event()

    def work(session: Session) -> torch.Tensor:
        if session.rank == 1:
            assert gone.wait(30)
        return steps(3)(session)

    with in_process(shards=1, workers=2, state_dir=tmp_path) as cluster:
        with pytest.raises(ProtocolError, match="shard 0 runs"):
            cluster.start(0)

        def trouble() -> None:
            cluster.kill(0)
            with pytest.raises(ProtocolError, match="does not run"):
                cluster.kill(0)
            cluster.start(0)
            gone.set()

        thread = threading.Thread(target=trouble)
        thread.start()
        one, other = cluster.run(work)
        thread.join()
    assert torch.equal(one, other)


def test_consistency_and_folder_reach_shards_and_workers(tmp_path: Path) -> None:
    """What is given to the block holds in it: mode, and where the state lies."""
    with in_process(shards=1, workers=2, consistency=Consistency("async"), state_dir=tmp_path) as cluster:
        cluster.run(steps(3))
        assert cluster.statistics()[0].version == 6
    assert {path.name for path in tmp_path.iterdir()} == {"shard-0", "workers"}
    assert sorted(path.name for path in (tmp_path / "workers").iterdir()) == ["worker-0.state", "worker-1.state"]
