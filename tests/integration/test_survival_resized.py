"""Workers without a memory go on where the others are, and a run goes on with another number of workers."""

import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from tests.integration.test_survival_members import closed_rounds
from tests.worker.conversing import wait_until
from tests.worker.training import Cluster, Killed, abandon, cluster
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from thresher.protos import faults
from thresher.protos.codec import decode
from thresher.protos.layout import Layout, TensorSpec
from thresher.server.facts import Closed
from thresher.worker import Method, Session

SIZE, SAMPLES, BATCH, PASSES = 12, 96, 2, 3
SPARSE = Method(threshold=13.0)
PIECES = Layout((TensorSpec("weight", (1, SIZE), "float32"),)).slices(2)


@dataclass
class Book:
    """What all lives of all workers have done.

    Attributes:
        inputs: What each push was made of, by rank and number.
        samples: In which pass it was, and on which samples.
        lost: What workers had kept back that lost it.
        residuals: What workers had kept back at their end.
        ends: Rounds and steps of each worker at its end.
    """

    inputs: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    samples: dict[tuple[int, int], tuple[int, list[int]]] = field(default_factory=dict)
    lost: Tensor = field(default_factory=lambda: torch.zeros(SIZE))
    residuals: Tensor = field(default_factory=lambda: torch.zeros(SIZE))
    ends: list[tuple[int, int]] = field(default_factory=list)

    def script(self, session: Session) -> None:
        """Loop over the data; gradients are multiples of 12, so that sums, and means over 2, 3 or 4, are exact."""
        model = nn.Linear(SIZE, 1, bias=False)
        nn.init.zeros_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        session.wrap(model, optimizer)
        loader = DataLoader(TensorDataset(torch.arange(SAMPLES)), batch_size=BATCH, shuffle=True)
        for number in session.passes(PASSES):
            for (batch,) in session.batches(loader):
                values = 12.0 * torch.randint(-2, 3, (SIZE,))
                model.weight.grad = values.view(1, SIZE)
                remembering = session._remembering
                if remembering is None or remembering.kept is None:  # otherwise its message is the kept one
                    place = session.rank, session._rounds.number
                    self.inputs[place], self.samples[place] = values, (number, batch.tolist())
                optimizer.step()
                time.sleep(0.005)
        self.residuals += session.residual
        self.ends.append((session._rounds.number, session.step))

    def forget(self, session: Session) -> None:
        """Strike out the push that a worker will never make."""
        place = session.rank, session._rounds.number
        del self.inputs[place], self.samples[place]

    def seen_in(self, number: int) -> Counter[int]:
        """How often each sample came in a pass."""
        return Counter(one for passed, batch in self.samples.values() if passed == number for one in batch)

    def check(self, folder: Path) -> list[Closed]:
        """Everybody has come to one end, and what was put in is what was applied, is kept, or is lost; exactly."""
        sent = torch.zeros(SIZE)
        for shard, piece in enumerate(PIECES):
            rounds = closed_rounds(folder / f"shard-{shard}", piece)
            for update in (one.sealed.update for one in rounds):
                if update.mean is not None:
                    sent[piece.begin : piece.end] += update.mean.densify() * update.members
            assert {number for number, _ in self.ends} == {len(rounds)}
        assert len(set(self.ends)) == 1
        assert torch.equal(sent, sum(self.inputs.values(), torch.zeros(SIZE)) - self.residuals - self.lost)
        return closed_rounds(folder / "shard-0", PIECES[0])


@dataclass
class Deaths:
    """Kills workers in one round: each in the phase named for it, once.

    Attributes:
        phases: By rank.
        due: Whether a worker is in that round.
        last: Called with each worker that is about to die.
        sessions: Newest life of each worker.
        dead: Who has been killed.
    """

    phases: dict[int, str]
    due: Callable[[Session], bool]
    last: Callable[[Session], object]
    sessions: dict[int, Session] = field(default_factory=dict)
    dead: set[int] = field(default_factory=set)

    def __call__(self, who: str, where: str) -> None:
        rank = int(who.split()[1]) if who.startswith("worker") else -1
        if rank in self.dead or self.phases.get(rank) != where or not self.due(self.sessions[rank]):
            return
        self.dead.add(rank)
        time.sleep(0.1)  # what it has pushed arrives
        self.last(self.sessions[rank])
        raise Killed


def run(
    served: Cluster,
    script: Callable[[Session], None],
    workers: int,
    deaths: Deaths,
    again: Callable[[], object] | None = None,
    **changes: bool,
) -> None:
    """Run a script on ``workers`` threads, until it ends or is killed; it starts again when ``again`` returns."""

    def work(rank: int) -> None:
        while True:
            with served.connect(rank, workers=workers, **changes) as session:
                deaths.sessions[rank] = session
                try:
                    return script(session)
                except Killed:
                    abandon(session)
                    if again is None:
                        return None
                    again()

    with faults.plan(deaths), ThreadPoolExecutor(workers) as pool:
        for one in [pool.submit(work, rank) for rank in range(workers)]:
            one.result()


def in_round(number: int) -> Callable[[Session], bool]:
    """Return what is true in that round."""
    return lambda session: session._rounds.number == number


def when_all_are_in(workers: int, rounds: int) -> Callable[[Session], bool]:
    """Return what is true in the one round that comes so many rounds after all workers have become members."""
    due: list[int] = []
    one_at_a_time = threading.Lock()

    def at(session: Session) -> bool:
        with one_at_a_time:
            if not due and session._rounds.membership.ranks == tuple(range(workers)):
                due.append(session._rounds.number + rounds)
            return session._rounds.number in due

    return at


NOBODY = Deaths({}, in_round(-1), print)


@pytest.mark.parametrize(
    ("first", "others"), [("in flight", "in flight"), ("in flight", "gradient"), ("gradient", "in flight")]
)
def test_a_run_that_goes_on_with_another_number_of_workers(first: str, others: str, tmp_path: Path) -> None:
    """Two, then four, then three: all are killed in one round, and those started again deal out what is left.

    Of each pass each sample comes once, but for a step that was on its way, and for the shares of those who were not
    let in yet. The one that does not come back takes with it what it had kept back.
    """
    book = Book()

    def last(session: Session) -> None:
        phase = first if session.rank == 0 else others
        if phase == "gradient":
            book.forget(session)
        if session.rank == 3:
            book.lost += session.residual
            book.lost += untold(session) if phase == "in flight" else 0.0

    with cluster(2, 2, tmp_path, method=SPARSE, worker_memory=True, lease=0.5) as served:
        for workers, rounds in ((2, 15), (4, 14)):
            phases = {rank: first if rank == 0 else others for rank in range(workers)}
            deaths = Deaths(phases, when_all_are_in(workers, rounds), last)
            run(served, book.script, workers, deaths)
            assert deaths.dead == set(range(workers))
        run(served, book.script, 3, NOBODY)
    rounds_made = book.check(tmp_path)
    places = [closed.sealed.update.bookmark for closed in rounds_made]
    dealt = [place.workers for place in places if place is not None]
    assert len(dealt) == len(rounds_made)
    assert [workers for before, workers in zip([0, *dealt], dealt, strict=False) if before != workers] == [2, 4, 3]
    # What was dealt is the data, up to the rest that each change and each pass may leave.
    assert abs(sum(dealt) * BATCH - PASSES * SAMPLES) <= (2 + 4 + 4 + 3) * BATCH
    for number in range(PASSES):
        seen = book.seen_in(number)
        assert seen.total() - len(seen) <= 4 * BATCH
        assert len(seen) >= SAMPLES - 12 * BATCH
    assert [one.rank for one in rounds_made[-1].contributions] == [0, 1, 2]


def untold(session: Session) -> Tensor:
    """What is in a push of which the first shard has been told, and the second has not."""
    found, piece = torch.zeros(SIZE), session._rounds.shards[1].slice
    found[piece.begin : piece.end] = decode(session._rounds.pending[1][1], numel=piece.numel).densify()
    return found


@pytest.mark.parametrize(("rank", "phase"), [(0, "gradient"), (0, "in flight"), (1, "gradient"), (2, "in flight")])
def test_a_worker_without_its_memory_goes_on_where_the_others_are(
    rank: int, phase: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The run makes as many rounds as an undisturbed one, and of each pass each sample comes once."""
    book = Book()

    def lose(session: Session) -> None:
        (tmp_path / "workers" / f"worker-{session.rank}.state").unlink()
        book.lost += session.residual
        if phase == "gradient":
            book.forget(session)
        else:
            book.lost += untold(session)

    deaths = Deaths({rank: phase}, in_round(22), lose)
    with cluster(2, 3, tmp_path, method=SPARSE, worker_memory=True) as served:
        run(served, book.script, 3, deaths, again=lambda: None)
    assert deaths.dead == {rank}
    assert f"worker {rank} goes on where the others are, behind step {21 + (phase == 'in flight')}" in caplog.text
    assert len(book.check(tmp_path)) == PASSES * SAMPLES // (3 * BATCH)
    assert [book.seen_in(number) for number in range(PASSES)] == [Counter(range(SAMPLES))] * PASSES


def test_what_is_gone_with_a_memory_is_booked(tmp_path: Path) -> None:
    """Each shard knows what its slice of it was; by a hard threshold none of it reaches that."""
    book, lost = Book(), torch.zeros(SIZE)

    def lose(session: Session) -> None:
        (tmp_path / "workers" / f"worker-{session.rank}.state").unlink()
        lost.copy_(session.residual)
        book.forget(session)

    with cluster(2, 3, tmp_path, method=SPARSE, worker_memory=True) as served:
        run(served, book.script, 3, Deaths({1: "gradient"}, in_round(22), lose), again=lambda: None)
        booked = [served.statistics(shard).lost_squared_total for shard in (0, 1)]
    assert SPARSE.threshold is not None
    assert 0 < lost.abs().max() < SPARSE.threshold
    assert booked == [float(lost[piece.begin : piece.end].square().sum()) for piece in PIECES]


def test_a_worker_that_was_away_goes_on_where_the_others_are(tmp_path: Path) -> None:
    """It comes back with its memory when its lease is over: all come to one end, and what it had kept back is sent."""
    book = Book()

    def wait() -> None:
        wait_until(lambda: deaths.sessions[0]._rounds.membership.ranks == (0, 1))

    deaths = Deaths({2: "in flight"}, in_round(8), lambda _: None)
    with cluster(2, 3, tmp_path, method=SPARSE, worker_memory=True, lease=0.3) as served:
        run(served, book.script, 3, deaths, again=wait)
    rounds = book.check(tmp_path)
    assert len(rounds) == PASSES * SAMPLES // (3 * BATCH)
    assert [one.rank for one in rounds[-1].contributions] == [0, 1, 2]


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]] = {
    "from the rate in force": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
    "by its own count": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda count: 0.5**count),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_hyper_parameters_in_force_are_those_of_who_kept_its_schedule(
    schedule: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Who lost its own begins with them, and follows the others where its schedule says something else."""
    book, rates, models = Book(), {}, []

    def script(session: Session) -> None:
        model = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        session.wrap(model, optimizer)
        scheduler = SCHEDULES[schedule](optimizer)
        session.keep(scheduler=scheduler)
        for number in session.passes(4):
            for (batch,) in session.batches(DataLoader(TensorDataset(torch.ones(8, 2)), batch_size=2)):
                model(batch).sum().backward()
                rates[session.rank, number] = optimizer.param_groups[0]["lr"]
                optimizer.step()
            scheduler.step()
        book.ends.append((session._rounds.number, session.step))
        models.append(model.weight.detach().clone())

    def lose(session: Session) -> None:
        (tmp_path / "workers" / f"worker-{session.rank}.state").unlink()

    with cluster(2, 2, tmp_path, worker_memory=True) as served:
        run(served, script, 2, Deaths({1: "gradient"}, in_round(5), lose), again=lambda: None)
    assert {number: rates[0, number] for number in range(4)} == {number: 0.5**number for number in range(4)}
    assert [rates[1, number] for number in range(3)] == [1.0, 0.5, 0.25]
    assert (rates[1, 3] == rates[0, 3]) == (schedule == "from the rate in force")
    assert book.ends == [(8, 8)] * 2
    assert torch.equal(*models)
    assert "behind step 4; what is kept as scheduler begins as the script made it" in caplog.text


@pytest.mark.parametrize("other", ["an old copy", "another run"])
def test_a_memory_in_a_local_folder_that_does_not_fit_is_discarded(
    other: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As if there were none: a newer one may be on another machine."""
    book, copies = Book(), tmp_path / "copies"
    early = Deaths(dict.fromkeys(range(3), "gradient"), in_round(5), lambda _: None)
    with cluster(2, 3, tmp_path / "other", method=SPARSE, worker_memory=True) as served:
        run(served, Book().script, 3, early)
        shutil.copytree(tmp_path / "other" / "workers", copies)
        if other == "an old copy":
            run(served, Book().script, 3, Deaths(early.phases, in_round(9), lambda _: None))
            shutil.copy(copies / "worker-1.state", tmp_path / "other" / "workers")
            run(served, book.script, 3, NOBODY, state_is_local=True)
    if other == "another run":
        shutil.copytree(copies, tmp_path / "workers")
        with cluster(2, 3, tmp_path, method=SPARSE, worker_memory=True) as served:
            run(served, book.script, 3, NOBODY, state_is_local=True)
    assert book.ends == [(PASSES * SAMPLES // (3 * BATCH),) * 2] * 3
    said = "the file is older than that, and what was kept back since is lost. It is discarded"
    said = said if other == "an old copy" else "worker 1 remembers run"
    assert said in caplog.text


def test_a_resized_run_learns_what_a_fixed_one_learns(tmp_path: Path) -> None:
    """Three classes around three points: two, four and three workers in turn find them as two workers do."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(240) % 3
    inputs = torch.eye(3)[labels] + 0.35 * torch.randn(240, 3, generator=generator)
    found: list[float] = []

    def script(session: Session) -> None:
        torch.manual_seed(0)
        model = nn.Linear(3, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        session.wrap(model, optimizer)
        loader = DataLoader(TensorDataset(inputs, labels), batch_size=4, shuffle=True)
        for _ in session.passes(4):
            for batch, targets in session.batches(loader):
                optimizer.zero_grad()
                torch.autograd.backward(nn.functional.cross_entropy(model(batch), targets))
                optimizer.step()
        found.append(float((model(inputs).argmax(1) == labels).float().mean()))

    method = Method(density=0.25)
    with cluster(2, 2, method=method) as served:
        run(served, script, 2, NOBODY)
    with cluster(2, 2, tmp_path, method=method, worker_memory=True, lease=0.5) as served:
        for workers, rounds in ((2, 30), (4, 20)):
            deaths = Deaths(dict.fromkeys(range(workers), "gradient"), when_all_are_in(workers, rounds), lambda _: None)
            run(served, script, workers, deaths)
        run(served, script, 3, NOBODY)
    fixed, resized = found[:2], found[2:]
    assert len(set(fixed)) == len(set(resized)) == 1
    assert len(resized) == 3
    assert resized[0] > fixed[0] - 0.05
    assert fixed[0] > 0.85
