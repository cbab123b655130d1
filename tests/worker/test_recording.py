"""What rows say is what was counted: bytes at the worker and at the shards, seconds by the clock, whatever happens."""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.worker.training import Cluster, Killed, Scale, cluster, set_gradients, sgd
from torch.utils.data import DataLoader, TensorDataset

from thresher.protos import faults
from thresher.protos.consistency import Consistency, Downlink
from thresher.protos.errors import ConfigurationError
from thresher.protos.layout import Layout, TensorSpec
from thresher.protos.sparse import SparseGradient
from thresher.worker import Method, Session, WorkerRow
from thresher.worker.recording import Layers, Recorder

WORKERS, STEPS = 2, 12
SOME = Method(threshold=0.2)


def train(session: Session) -> None:
    """Steps of different density, with batches that are dealt by the session."""
    model = Scale(40)
    optimizer = sgd(model, lr=0.01)
    session.wrap(model, optimizer)
    for (inputs,) in session.batches(DataLoader(TensorDataset(torch.arange(STEPS * WORKERS * 1.0)), batch_size=1)):
        optimizer.zero_grad()
        (model(torch.linspace(0, 1, 40) * float(inputs + session.rank)).square().sum() / 100).backward()
        optimizer.step()


def rows_of(path: Path) -> list[WorkerRow]:
    return [WorkerRow(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def run(served: Cluster, folder: Path) -> list[list[WorkerRow]]:
    """Train on all workers, those that are killed once more; return their rows by rank."""
    paths = [folder / f"worker-{rank}.iterations.jsonl" for rank in range(WORKERS)]
    with ThreadPoolExecutor(WORKERS) as pool:
        for future in [pool.submit(served.work, train, rank, rows=path) for rank, path in enumerate(paths)]:
            future.result()
    return [rows_of(path) for path in paths]


def counted(served: Cluster, rank: int) -> tuple[int, int]:
    """Bytes pushed by a worker and pulled, as all shards together have counted them."""
    members = [served.statistics(shard).members[rank] for shard in range(2)]
    return sum(one.push_bytes for one in members), sum(one.pull_bytes for one in members)


def told(rows: list[WorkerRow]) -> tuple[int, int]:
    return sum(row.push_bytes for row in rows), sum(row.pull_bytes for row in rows)


class Plan:
    """Kills a worker when it reaches a phase for the n-th time."""

    def __init__(self, kills: set[tuple[str, str, int]]) -> None:
        self._kills, self._seen = kills, Counter[tuple[str, str]]()
        self.struck = 0

    def __call__(self, who: str, phase: str) -> None:
        self._seen[who, phase] += 1
        if (who, phase, self._seen[who, phase]) in self._kills:
            self.struck += 1
            raise Killed


@pytest.mark.parametrize("phase", ["gradient", "compress", "flip", "in flight"])
@pytest.mark.parametrize("downlink", ["updates", "shadow"])
def test_rows_have_every_step_and_every_byte_once_whoever_is_killed(
    phase: str, downlink: Downlink, tmp_path: Path
) -> None:
    """In lockstep what all rows say is what the shards have counted, to the byte, and no step is missing or twice."""
    plan = Plan({("worker 0", phase, 1), ("worker 1", phase, 5), ("worker 0", phase, 8), ("worker 0", phase, 9)})
    mode = Consistency(downlink=downlink, shadow_threshold=0.001) if downlink == "shadow" else Consistency()
    with cluster(2, WORKERS, tmp_path, method=SOME, consistency=mode, worker_memory=True) as served, faults.plan(plan):
        rows = run(served, tmp_path)
        assert plan.struck == 4
        for rank in range(WORKERS):
            assert [row.step for row in rows[rank]] == list(range(1, STEPS + 1))
            assert told(rows[rank]) == counted(served, rank)
            pushed = sum(served.statistics(shard).members[rank].pushed_elements for shard in range(2))
            assert sum(row.pushed_elements for row in rows[rank]) == pushed


def test_a_shard_that_is_killed_changes_no_row(tmp_path: Path) -> None:
    """What is said again to the shard that came back counts once, on both sides."""

    def kill_shard(row: WorkerRow) -> None:
        if row.step in (3, 7):
            served.kill(1)
            served.start(1)

    def work(session: Session) -> None:
        if session.rank == 0:
            session.on_step(kill_shard)
        train(session)

    with cluster(2, WORKERS, tmp_path, method=SOME) as served:
        paths = [tmp_path / f"{rank}.jsonl" for rank in range(WORKERS)]
        with ThreadPoolExecutor(WORKERS) as pool:
            for future in [pool.submit(served.work, work, rank, rows=path) for rank, path in enumerate(paths)]:
                future.result()
        assert [told(rows_of(path)) for path in paths] == [counted(served, rank) for rank in range(WORKERS)]


@pytest.mark.parametrize(
    ("mode", "method"),
    [
        (Consistency(), SOME),
        (Consistency(), Method(threshold=0.2, placement="update", period=3)),
        (Consistency(quorum=1), SOME),
        (Consistency(mode="ssp", staleness=2), SOME),
        (Consistency(mode="async"), SOME),
        (Consistency(mode="async", downlink="shadow", shadow_threshold=0.001), SOME),
    ],
    ids=["sync", "local steps", "quorum", "ssp", "async", "shadow"],
)
def test_rows_add_up_to_the_statistics(mode: Consistency, method: Method) -> None:
    """In every mode, after every row: bytes, elements and seconds are those that the worker has counted so far."""

    def work(session: Session) -> None:
        rows: list[WorkerRow] = []

        def check(row: WorkerRow) -> None:
            rows.append(row)
            now = session.statistics()
            assert told(rows) == (sum(now.push_bytes), sum(now.pull_bytes))
            assert sum(one.pushed_elements for one in rows) == now.pushed_elements
            assert (row.step, row.residual_norm, row.numel) == (session.step, now.residual_norm, now.numel)
            for phase in ("compute", "compress", "exchange"):
                total = sum(getattr(one, f"{phase}_seconds") for one in rows)
                assert total == pytest.approx(getattr(now, f"{phase}_seconds"))
            assert now.timed_steps == len(rows)

        session.on_step(check)
        train(session)
        assert len(rows) == STEPS // method.period

    with cluster(2, WORKERS, method=method, consistency=mode) as served:
        served.run(work)


@pytest.mark.parametrize("period", [1, 3])
def test_seconds_have_no_gap_and_no_overlap(period: int) -> None:
    """By a clock that goes on at each look, ever faster: durations add up to all of the time, local steps included."""
    looks: list[float] = []

    def clock() -> float:
        looks.append(float(len(looks) ** 2))
        return looks[-1]

    def work(session: Session) -> None:
        rows: list[WorkerRow] = []
        session._recorder = Recorder(0, clock)
        session.on_step(rows.append)
        model = Scale()
        optimizer = sgd(model)
        session.wrap(model, optimizer)
        begin = looks[-1]
        for _ in range(2 * period):
            set_gradients(model, 1.0)
            optimizer.step()
        seconds = [(row.compute_seconds, row.compress_seconds, row.exchange_seconds) for row in rows]
        assert len(rows) == 2
        assert sum(map(sum, seconds)) == looks[-1] - begin
        assert min(map(min, seconds)) > 0

    with cluster(1, 1, method=Method(threshold=0.2, placement="update", period=period)) as served:
        served.run(work)


# Listeners


def test_what_a_listener_raises_ends_the_run_as_any_error_of_the_script_does() -> None:
    """It comes out of ``optimizer.step()``; the step itself is over, and its row was told to who came before."""

    def work(session: Session) -> None:
        rows: list[WorkerRow] = []

        def refuse(row: WorkerRow) -> None:
            raise ValueError(f"step {row.step} is enough")

        session.on_step(rows.append)
        session.on_step(refuse)
        model = Scale()
        optimizer = sgd(model)
        session.wrap(model, optimizer)
        set_gradients(model, 1.0)
        with pytest.raises(ValueError, match="step 1 is enough"):
            optimizer.step()
        assert [row.step for row in rows] == [session.step] == [1]
        assert torch.equal(model.weight.detach(), torch.full((2,), 0.5))
        raise ValueError("step 1 is enough")

    with cluster(1, 1) as served, pytest.raises(ValueError, match="enough"):
        served.work(work, 0)


def test_a_listener_sees_the_model_of_its_row() -> None:
    """The parameters are in the model already, and the threshold is the one the step was made with."""

    def work(session: Session) -> None:
        seen: list[tuple[int, float, float | None]] = []
        model = Scale()
        optimizer = sgd(model)
        session.on_step(lambda row: seen.append((row.version, float(model.weight.detach()[0]), row.threshold)))
        session.wrap(model, optimizer)
        for _ in range(2):
            set_gradients(model, 1.0)
            optimizer.step()
        assert seen == [(1, 0.5, 0.25), (2, 0.0, 0.25)]

    with cluster(1, 1, method=Method(threshold=0.25)) as served:
        served.run(work)


def test_a_skipped_step_has_a_row() -> None:
    """With nothing pushed but a message that says so."""

    def work(session: Session) -> None:
        rows: list[WorkerRow] = []
        session.on_step(rows.append)
        model = Scale()
        optimizer = sgd(model)
        session.wrap(model, optimizer)
        set_gradients(model, float("nan"))
        optimizer.step()
        (row,) = rows
        assert row.layers == {"weight": 0, "bias": 0}
        assert (row.pushed_elements, session.statistics().skipped) == (0, 1)
        assert row.push_bytes > 0

    with cluster(1, 1, method=Method(threshold=0.25, nonfinite="skip")) as served:
        served.run(work)


def test_without_rows_nobody_is_told() -> None:
    """And a file that cannot be written is said before anything is sent."""

    def work(session: Session) -> None:
        one_step(session)

    with cluster(1, 1) as served:
        with pytest.raises(ConfigurationError, match="THRESHER_ROWS"):
            served.work(work, 0, rows=Path("/"))
        assert served.statistics().members[0].state == "waited for"
        served.work(work, 0)


def one_step(session: Session) -> None:
    model = Scale()
    optimizer = sgd(model)
    session.wrap(model, optimizer)
    set_gradients(model, 1.0)
    optimizer.step()


# Layers


@given(st.lists(st.integers(0, 6), min_size=1, max_size=300).filter(any), st.data())
def test_layers_are_counted_as_one_would_by_hand(sizes: list[int], data: st.DataObject) -> None:
    """Of the largest 256 tensors, empty ones included; all of them together where there are no more."""
    layout = Layout(tuple(TensorSpec(str(index), (size,), "float32", 0) for index, size in enumerate(sizes)))
    flags = data.draw(st.lists(st.booleans(), min_size=layout.numel, max_size=layout.numel))
    indices = torch.tensor([index for index, flag in enumerate(flags) if flag], dtype=torch.int64)
    found = Layers(layout).count(SparseGradient(indices, torch.ones(len(indices)), layout.numel))
    by_hand = {
        spec.name: sum(flags[begin : begin + spec.numel])
        for spec, begin in zip(layout.trained, layout.offsets, strict=False)
    }
    assert found == {name: by_hand[name] for name in found}
    assert len(found) == min(256, len(sizes))
    assert min(sizes[int(name)] for name in found) >= sorted(sizes, reverse=True)[len(found) - 1]


def test_of_a_push_of_everything_layers_are_counted_without_a_look_at_it() -> None:
    """Their sizes are known; on the meta device there is nothing to look at."""
    layout = Layout((TensorSpec("w", (2, 3), "float32", 0), TensorSpec("b", (4,), "float32", 0)))
    assert Layers(layout).count(SparseGradient.dense(torch.empty(10, device="meta"))) == {"w": 6, "b": 4}


def test_layers_are_in_the_first_row_and_every_tenth() -> None:
    """So that the file grows little with the number of tensors."""

    def work(session: Session) -> None:
        rows: list[WorkerRow] = []
        session.on_step(rows.append)
        train(session)
        assert [row.step for row in rows if row.layers is not None] == [1, 10, 20]
        for row in rows:
            assert row.layers is None or sum(row.layers.values()) == row.pushed_elements

    with cluster(1, 1, method=SOME) as served:
        served.run(work)
