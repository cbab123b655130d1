"""What is made up of parts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.deploy.report.written import SIZES, shard_row, worker_row, write_lines, write_run

from thresher.deploy.report.breakdown import (
    PHASES,
    LayerDensity,
    ShardBytes,
    Times,
    layer_figure,
    shard_figure,
    time_figure,
)
from thresher.deploy.report.runs import Run, read_runs
from thresher.deploy.report.series import LeftOut

seconds = st.floats(0, 10)
in_one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return read_runs([write_run(tmp_path_factory.mktemp("runs") / "one")])[0]


@in_one_folder
@given(st.lists(st.tuples(seconds, seconds, seconds, seconds), min_size=1, max_size=12))
def test_phases_add_up_to_what_the_workers_measured(tmp_path: Path, steps: list[tuple[float, ...]]) -> None:
    """The wait is taken from the exchange, never more than it took; nothing is lost or counted twice."""
    rounds = [shard_row(0, step, barrier_seconds=[wait, 0.0]) for step, (*_, wait) in enumerate(steps, 1)]
    rows = [
        worker_row(0, step, compute_seconds=compute, compress_seconds=compress, exchange_seconds=exchange)
        for step, (compute, compress, exchange, _) in enumerate(steps, 1)
    ]
    write_lines(tmp_path / "shard-0.iterations.jsonl", rounds)
    write_lines(tmp_path / "worker-0.iterations.jsonl", rows)
    figure = time_figure(read_runs([tmp_path]))
    assert isinstance(figure, Times)
    total = figure.runs[0].total
    assert sum(total.values()) == pytest.approx(sum(sum(step[:3]) for step in steps))
    assert total["wait"] == pytest.approx(sum(min(exchange, wait) for _, _, exchange, wait in steps))
    assert min(total.values()) >= 0


def test_time_is_a_mean_over_workers(run: Run) -> None:
    """Of an iteration, and of the run; the longest iteration is named."""
    figure = time_figure([run])
    assert isinstance(figure, Times)
    (part,) = figure.runs
    assert part.seconds["compute"].tolist() == pytest.approx([0.02] * 40)
    assert part.total == pytest.approx({"compute": 0.8, "compress": 0.12, "wait": 0.08, "exchange": 0.32})
    assert figure.caption[0].startswith("one: compute 0.8 s (61%), compress 0.12 s (9%), wait 0.08 s (6%), exchange")
    header, *rows = figure.table()
    assert header == ("run", "iteration", *(f"{phase}_seconds" for phase in PHASES))
    assert [row[1] for row in rows] == [*map(float, range(1, 41)), "all"]


def test_a_step_in_no_round_that_is_there_has_not_waited(run: Run) -> None:
    """As where a worker is ahead of the slowest shard."""
    columns = {**run.workers[0].columns, "version": run.workers[0].columns["version"] + 100}
    figure = time_figure([replace(run, workers={0: replace(run.workers[0], columns=columns)})])
    assert isinstance(figure, Times)
    assert figure.runs[0].total["wait"] == 0.0


@pytest.mark.parametrize("missing", ["workers", "waits"])
def test_time_is_left_out_where_it_was_not_measured(run: Run, missing: str) -> None:
    """By workers or by shards; where another run has it, the figure says who is missing."""
    bare = replace(
        run, name="bare", rounds={k: v for k, v in run.rounds.items() if missing == "workers" or "wait" not in k}
    )
    bare = replace(bare, workers={} if missing == "workers" else run.workers)
    alone = time_figure([bare])
    assert isinstance(alone, LeftOut)
    assert "barrier_seconds" in alone.why
    both = time_figure([bare, run])
    assert isinstance(both, Times)
    assert [part.run for part in both.runs] == [1]
    assert both.caption[-1] == "Not shown, because their files do not say it: bare."


def test_bytes_by_shard_are_those_of_its_rows(run: Run) -> None:
    """Both directions, each shard."""
    figure = shard_figure([run])
    assert isinstance(figure, ShardBytes)
    assert [(bar.name, bar.shard, bar.down) for bar in figure.bars] == [("one", 0, 6000.0), ("one", 1, 6400.0)]
    assert sum(bar.up + bar.down for bar in figure.bars) == run.moved[-1]
    assert next(figure.table()) == ("run", "shard", "push_bytes", "pull_bytes")


def test_bytes_by_shard_are_left_out_where_nobody_tells_shards_apart(run: Run) -> None:
    """The merged file of a run in lockstep."""
    assert isinstance(shard_figure([replace(run, shards={-1: run.rounds})]), LeftOut)


@in_one_folder
@given(st.lists(st.dictionaries(st.sampled_from(sorted(SIZES)), st.integers(0, 4)), min_size=1, max_size=250))
def test_density_by_layer_is_pushed_over_could(run: Run, pushed: list[dict[str, Any]]) -> None:
    """Over all rows that have a layer; one that no row has is not shown."""
    versions = np.arange(1.0, len(pushed) + 1)
    names = {name for row in pushed for name in row}
    layers = {name: np.array([row.get(name, np.nan) for row in pushed], dtype=float) for name in names}
    worker = replace(run.workers[0], layer_versions=versions, layers=layers)
    figure = layer_figure([replace(run, workers={0: worker})])
    assert isinstance(figure, LayerDensity) == bool(names)
    if isinstance(figure, LayerDensity):
        (part,) = figure.runs
        assert set(part.layers) == names
        for name, mean, row in zip(part.layers, part.mean, part.density, strict=True):
            seen = [one[name] for one in pushed if name in one]
            assert mean == pytest.approx(sum(seen) / (len(seen) * SIZES[name]))
            assert np.nanmax(row) <= 1.0
        assert part.density.shape[1] <= 100
        assert part.iteration[-1] == len(pushed)


def test_layers_are_left_out_until_their_sizes_are_known(run: Run) -> None:
    """The model is saved at the end."""
    figure = layer_figure([replace(run, layer_sizes={})])
    assert isinstance(figure, LeftOut)
    assert "model.safetensors" in figure.why


def test_the_caption_names_the_densest_and_the_sparsest_layer(run: Run) -> None:
    """With their densities."""
    figure = layer_figure([run])
    assert isinstance(figure, LayerDensity)
    assert figure.caption == (
        "one: first.bias is the densest of 2 layers with 50.00% on average, first.weight the sparsest with 10.00%.",
    )
    header, *rows = figure.table()
    assert header == ("run", "layer", "iteration", "density")
    assert len(rows) == 2 * 5


def test_the_caption_names_no_layer_where_all_are_equally_dense(run: Run) -> None:
    """As where everything is sent."""
    worker = run.workers[0]
    everything = {name: np.full(worker.layer_versions.size, float(size)) for name, size in SIZES.items()}
    figure = layer_figure([replace(run, workers={0: replace(worker, layers=everything)})])
    assert isinstance(figure, LayerDensity)
    assert figure.caption == ("one: each of 2 layers has 100.00% on average.",)
