"""Shards looked at: real ones, that answer, are gone, come back, say no, or say nothing."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thresher.deploy.in_process import InProcess, in_process
from thresher.deploy.watching import ShardLook, Watch, totals_of, workers_of
from thresher.deploy.watching_places import Place
from thresher.protos.errors import RoundFailedError
from thresher.v1 import aggregation_pb2 as pb
from thresher.worker import Session

WorkerDrawn = tuple[str, int, int, int, int, int, float]
STATES = ("aborted", "lost", "waited for", "registered", "exchanging", "left")


def place_of(*addresses: str) -> Place:
    return Place("run", tuple(partial(str, address) for address in addresses))


def one_step(session: Session) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    session.wrap(model, optimizer)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()


@contextmanager
def served(tmp_path: Path) -> Iterator[tuple[InProcess, Watch]]:
    """Two shards with a state folder after a step of two workers, and who looks at them."""
    with in_process(shards=2, workers=2, state_dir=tmp_path) as cluster:
        cluster.run(one_step)
        with Watch(place_of(*cluster.addresses), "the test", 10.0) as watch:
            yield cluster, watch


def look_until(watch: Watch, shard: int, state: str) -> ShardLook:
    deadline = time.monotonic() + 30
    while (look := watch.look()[shard]).state != state:
        assert time.monotonic() < deadline, look
        time.sleep(0.05)
    return look


def test_what_is_seen_is_what_the_shards_count(tmp_path: Path) -> None:
    with served(tmp_path) as (cluster, watch):
        looks, counted = watch.look(), cluster.statistics()
    assert [(look.shard, look.state, look.reason) for look in looks] == [(n, "SERVING", "finished") for n in (0, 1)]
    assert [look.where for look in looks] == list(cluster.addresses)
    members = [member for shard in counted for member in shard.members]
    totals = totals_of(looks)
    assert (totals.iterations, totals.workers, totals.members) == (1, 2, 0)
    assert totals.push_bytes == sum(member.push_bytes for member in members)
    assert totals.pull_bytes == sum(member.pull_bytes for member in members)
    assert totals.density == 1.0
    assert all(look.has_finished for look in looks)


def test_a_shard_that_is_killed_is_silent_and_serves_again_when_it_is_back(tmp_path: Path) -> None:
    """The other one has its row all the while, and what the lost one counted last stays known."""
    with in_process(shards=2, workers=1, state_dir=tmp_path) as cluster:
        session = cluster.connect(0)
        one_step(session)
        with Watch(place_of(*cluster.addresses), "the test", 10.0) as watch:
            assert [look.state for look in watch.look()] == ["SERVING", "SERVING"]
            cluster.kill(1)
            gone = look_until(watch, 1, "SILENT")
            assert "the test has lost shard 1" in gone.reason
            assert gone.statistics is not None
            assert gone.statistics.version == 1
            assert watch.look()[0].state == "SERVING"
            cluster.start(1)
            assert look_until(watch, 1, "SERVING").statistics is not None
        session.close()


def test_a_shard_that_is_gone_after_it_had_finished_has_ended(tmp_path: Path) -> None:
    with served(tmp_path) as (cluster, watch):
        assert watch.look()[0].has_finished
        cluster.kill(0)
        ended = look_until(watch, 0, "ENDED")
        assert "had finished" in ended.reason
        assert watch.look()[0] == ended


def test_a_run_that_has_failed_stays_failed_when_its_shards_are_gone() -> None:
    with in_process(shards=1, workers=2, start_timeout=0.2) as cluster:
        session = cluster.connect(0)
        with pytest.raises(RoundFailedError):
            one_step(session)
        session.abort("nobody else came")
        with Watch(place_of(*cluster.addresses), "the test", 10.0) as watch:
            failed = look_until(watch, 0, "FAILED")
            assert "worker 1 has never registered" in failed.reason
            cluster.kill(0)
            assert [watch.look()[0] for _ in range(3)] == [failed] * 3


def test_a_shard_that_says_nothing_is_silent_at_the_deadline_and_holds_up_nobody() -> None:
    """Something listens there and does not speak: a machine that hangs, or another program."""
    with socket.socket() as mute, in_process(shards=1, workers=1) as cluster:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        with Watch(place_of(address, *cluster.addresses), "the test", 0.5) as watch:
            looks = watch.look()
    assert [look.state for look in looks] == ["SILENT", "SERVING"]
    assert "did not answer the test in time" in looks[0].reason or "has not answered in 0.5 s" in looks[0].reason


def test_a_directory_that_is_slow_holds_up_nobody() -> None:
    """To find a shard may take as long as it likes; the answer of one look is there for a later one."""
    found = threading.Event()
    with in_process(shards=1, workers=1) as cluster:

        def slow() -> str:
            found.wait(30)
            return cluster.addresses[0]

        with Watch(Place("run", (slow, *place_of(*cluster.addresses).shards)), "the test", 10.0) as watch:
            looks = watch.look(2.0)
            assert [(look.state, look.where) for look in looks] == [
                ("SILENT", ""), ("SERVING", cluster.addresses[0]),
            ]  # fmt: skip
            assert looks[0].reason == "it has not answered yet"
            found.set()
            assert look_until(watch, 0, "SERVING").where == cluster.addresses[0]


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied", "shard-0.log"), RuntimeError()])
def test_what_nobody_expected_makes_a_shard_silent_until_it_is_over(error: Exception) -> None:
    """It is told as it is, and the shard is looked for again: the look is never that of before."""
    with in_process(shards=1, workers=1) as cluster:
        found = iter([error])

        def unsteady() -> str:
            for wrong in found:
                raise wrong
            return cluster.addresses[0]

        with Watch(Place("run", (unsteady,)), "the test", 10.0) as watch:
            (look,) = watch.look()
            assert (look.state, look.reason) == ("SILENT", str(error) or repr(error))
            assert look_until(watch, 0, "SERVING").where == cluster.addresses[0]


def test_a_run_whose_outcome_is_known_has_ended_and_nobody_is_asked() -> None:
    def never() -> str:
        raise AssertionError("asked")

    with Watch(Place("run", (never,), outcome=lambda: "it came to this"), "the test", 10.0) as watch:
        (look,) = watch.look()
    assert (look.state, look.reason, look.statistics) == ("ENDED", "it came to this", None)


@given(
    st.lists(
        st.tuples(
            st.integers(1, 1000),
            st.lists(st.tuples(st.sampled_from(STATES), *[st.integers(0, 2**40)] * 5, st.floats(0, 1)), max_size=4),
        ),
        max_size=4,
    )
)
def test_a_worker_is_summed_over_the_shards_that_know_it(
    shards: list[tuple[int, list[WorkerDrawn]]],
) -> None:
    """Counters add up, whichever shard knows of how many workers; it has come as far as for the last of them."""
    told = [
        pb.StatisticsResponse(
            numel=numel,
            workers=[
                pb.WorkerStatistics(
                    rank=rank, state=state, steps=steps, push_bytes=push, pull_bytes=pull, pushed_elements=pushed,
                    pushable_elements=pushable, density=density,
                    counts=steps % 2 == 0,
                )
                for rank, (state, steps, push, pull, pushed, pushable, density) in enumerate(workers)
            ],
        )
        for numel, workers in shards
    ]  # fmt: skip
    found, every = workers_of(told), [worker for shard in told for worker in shard.workers]
    assert [one.rank for one in found] == list(range(max((len(workers) for _, workers in shards), default=0)))
    for name in ("push_bytes", "pull_bytes", "pushed_elements", "pushable_elements"):
        assert sum(getattr(one, name) for one in found) == sum(getattr(worker, name) for worker in every)
    for one in found:
        seen = [worker for worker in every if worker.rank == one.rank]
        assert one.counts == all(worker.counts for worker in seen)
        assert one.steps == min(worker.steps for worker in seen)
        assert STATES.index(one.state) == min(STATES.index(worker.state) for worker in seen)
        assert min(w.density for w in seen) - 1e-9 <= one.density <= max(w.density for w in seen) + 1e-9
