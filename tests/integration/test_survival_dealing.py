"""However often the number of workers changes, and wherever they were then: all loops come to one place again."""

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.worker.conversing import Proxy, wait_until
from tests.worker.training import Cluster, Killed, abandon, cluster
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from thresher.protos import faults
from thresher.protos.consistency import Consistency
from thresher.worker import Session

SAMPLES, PASSES = 24, 7
MODES = {
    "sync": Consistency(),
    "quorum": Consistency(quorum=1),
    "ssp": Consistency("ssp", staleness=2),
    "async": Consistency("async"),
}


@dataclass
class Life:
    """One life of a worker.

    Attributes:
        dealt: By pass: the steps at which it began, as this worker knew it, and the samples it was given.
        reached: How often it was where it is to die.
        agreed: What was agreed behind each pass.
        end: Steps and rounds, where it came to an end.
    """

    dealt: dict[int, tuple[set[int], list[int]]] = field(default_factory=dict)
    reached: int = 0
    agreed: list[float] = field(default_factory=list)
    end: tuple[int, int] = (0, 0)


def script(session: Session, life: Life, *, agrees: bool = True) -> None:
    """Loop over the data, one sample at a time, with a rate of its own for each step; agree behind each pass."""
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    session.wrap(model, optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda count: 0.99**count)
    session.keep(scheduler=scheduler)
    for number in session.passes(PASSES):
        for (batch,) in session.batches(DataLoader(TensorDataset(torch.arange(SAMPLES)), shuffle=True)):
            model.weight.grad = torch.ones(1, 1)
            remembering = session._remembering
            if remembering is None or remembering.kept is None:  # otherwise an earlier life has made it
                begins, seen = life.dealt.setdefault(number, (set(), []))
                begins.add(session._progress.pass_step)
                seen += batch.tolist()
            optimizer.step()
            scheduler.step()
        if agrees:
            life.agreed.append(session.mean({"pass": float(number)})["pass"])
    life.end = session.step, session._rounds.number


@dataclass
class Group:
    """Workers that are started together.

    Attributes:
        deaths: By rank: where it dies, and how often it has been there then. Empty where all come to their end.
        lives: By rank.
    """

    deaths: list[tuple[str, int]] = field(default_factory=list)
    lives: dict[int, Life] = field(default_factory=dict)

    def __call__(self, who: str, where: str) -> None:
        kind, rank = who.split()
        if kind == "worker" and self.deaths:
            life, (phase, count) = self.lives[int(rank)], self.deaths[int(rank)]
            life.reached += phase == where
            if life.reached == count:
                raise Killed

    def run(self, served: Cluster, workers: int) -> None:
        """Run until each has died or come to its end; where fewer are to die than are told of, the rest never comes."""
        self.lives = {rank: Life() for rank in range(len(self.deaths) or workers)}

        def work(rank: int) -> None:
            with served.connect(rank, workers=workers) as session:
                try:
                    script(session, self.lives[rank])
                except Killed:
                    abandon(session)

        with faults.plan(self), ThreadPoolExecutor(workers) as pool:
            for one in [pool.submit(work, rank) for rank in self.lives]:
                one.result()

    def dealt_once(self, begin: int) -> None:
        """From pass ``begin`` on all were in all passes, which began for all at one step, each sample given once."""
        for number in range(begin, PASSES):
            dealt = [life.dealt[number] for life in self.lives.values()]
            assert len({frozenset(begins) for begins, _ in dealt}) == 1
            assert Counter(one for _, seen in dealt for one in seen) == Counter(range(SAMPLES))
        assert len({life.end[0] for life in self.lives.values()}) == 1


deaths = st.lists(
    st.tuples(st.sampled_from(["gradient", "compress", "flip", "in flight"]), st.integers(1, 6)), min_size=1, max_size=4
)


def begin_together(mode: str, ended: list[list[tuple[str, int]]], workers: int) -> None:
    """Behind the pass in which the last one comes in each pass is dealt once, to all, whatever came before.

    Outside of lockstep workers hear of each other's places as they push, so it is so a pass later.
    """
    told = MODES[mode]
    groups, last = [Group(some) for some in ended], Group()
    with (
        TemporaryDirectory() as folder,
        cluster(1, 4, Path(folder), told=0, consistency=told, worker_memory=True, lease=0.2) as served,
    ):
        for group in groups:
            group.run(served, len(group.deaths))
        last.run(served, workers)
    seen = [max(life.dealt, default=0) for group in groups for life in group.lives.values()]
    seen += [min(life.dealt, default=0) for life in last.lives.values()]
    begin = max(seen) + (1 if told.lockstep else 2)
    assert begin < PASSES, "there are passes to look at"
    last.dealt_once(begin)


histories = st.tuples(st.sampled_from(list(MODES)), st.lists(deaths, min_size=1, max_size=3), st.integers(1, 4))


@settings(max_examples=4)
@example(("async", [[("gradient", 2), ("gradient", 6)]], 3))
@example(("ssp", [[("gradient", 6), ("gradient", 4)]], 3))
@given(histories)
def test_the_passes_of_all_workers_begin_together(history: tuple[str, list[list[tuple[str, int]]], int]) -> None:
    """Law: however often the number of workers changes, in every mode."""
    begin_together(*history)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=200)
@given(histories)
def test_the_passes_of_all_workers_begin_together_often(history: tuple[str, list[list[tuple[str, int]]], int]) -> None:
    """The same law, for some minutes."""
    begin_together(*history)


def test_two_then_four_then_two_workers(tmp_path: Path) -> None:
    """One dies before it has kept a step among four: it remembers one that was dealt for two, as the data are now."""
    last = Group()
    with cluster(1, 2, tmp_path, worker_memory=True, lease=5.0) as served:
        Group([("gradient", 6), ("in flight", 6)]).run(served, 2)
        Group([("in flight", 2), ("gradient", 1)]).run(served, 4)
        last.run(served, 2)
    last.dealt_once(1)


def test_another_number_of_workers_before_the_first_round(tmp_path: Path) -> None:
    """One has pushed what was dealt for two, and those started again with two more have not pushed anything."""
    last = Group()
    with cluster(1, 2, tmp_path, told=0, worker_memory=True, lease=5.0) as served:
        Group([("in flight", 1), ("gradient", 1)]).run(served, 2)
        last.run(served, 4)
    last.dealt_once(1)


def live(strike: Callable[[str, str], None], works: list[Callable[[], None]]) -> None:
    """Let workers live, each on a thread, while ``strike`` strikes."""
    with faults.plan(strike), ThreadPoolExecutor(len(works)) as pool:
        for one in [pool.submit(work) for work in works]:
            one.result()


def test_a_worker_without_a_memory_beside_a_shard_that_was_refilled() -> None:
    """The shard knows from the other worker's replica where its loop is, and the newcomer goes on there."""
    group, due = Group(lives={0: Life(), 1: Life()}), [15]

    def strike(who: str, where: str) -> None:
        if (who, where) == ("worker 1", "gradient") and due:
            due[0] -= 1
            if not due[0]:
                due.clear()
                group.lives[1].dealt[1][1].pop()  # its newcomer makes that step
                served.kill(0)
                threading.Timer(0.2, served.start, [0]).start()
                raise Killed

    with cluster(1, 2, lease=20.0) as served:
        one = partial(script, agrees=False)  # of agreements a shard that was refilled knows nothing
        live(strike, [partial(served.work, partial(one, life=group.lives[rank]), rank) for rank in (0, 1)])
    group.dealt_once(0)
    assert {life.end for life in group.lives.values()} == {(PASSES * SAMPLES // 2,) * 2}


def test_a_worker_that_was_cut_off_and_lives_goes_on_where_the_others_are() -> None:
    """In their pass, and with their rate: its own schedule goes by its own count."""
    lives = {rank: Life() for rank in range(3)}
    with cluster(1, 3, lease=0.1) as served:
        proxy = Proxy(served.settings.addresses[0])
        held: list[bool] = []

        def strike(who: str, where: str) -> None:
            if (who, where) == ("worker 2", "compress") and len(lives[2].dealt[0][1]) == 4 and not held:
                held.append(True)
                proxy.hold(60.0)
            if (who, where) == ("worker 0", "compress") and 3 in lives[0].dealt and held == [True]:
                held.append(False)
                proxy.hold(0.0)
                wait_until(lambda: served.statistics().members[2].state == "exchanging")

        addresses = [*[served.settings.addresses] * 2, (proxy.address,)]
        live(
            strike, [partial(served.work, partial(script, life=lives[r]), r, addresses=addresses[r]) for r in range(3)]
        )
        proxy.close()
    assert set(lives[2].dealt) == {0, 3, 4, 5, 6}
    Group(lives=lives).dealt_once(4)
    assert len({life.end for life in lives.values()}) == 1
    assert [life.agreed for life in lives.values()] == [[0, 1, 2, 3, 4, 5, 6]] * 2 + [[0, 3, 4, 5, 6]]
