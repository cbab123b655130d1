"""What goes up and down."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.deploy.report.written import BEGIN, shard_row, write_lines, write_run

from thresher.deploy.report.runs import Run, read_runs
from thresher.deploy.report.series import Curves, LeftOut, curve_figures
from thresher.deploy.report.steps import Printed


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return read_runs([write_run(tmp_path_factory.mktemp("runs") / "one")])[0]


def figures_of(*runs: Run) -> dict[str, Curves]:
    return {figure.name: figure for figure in curve_figures(runs) if isinstance(figure, Curves)}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(st.lists(st.floats(BEGIN - 5, BEGIN + 60), min_size=1, max_size=30).map(sorted))
def test_what_was_printed_is_placed_by_its_time(run: Run, times: Sequence[float]) -> None:
    """At the rounds that were closed by then, and the bytes that had moved."""
    printed = {"loss": Printed(np.array(times), np.ones(len(times)))}
    loss = figures_of(replace(run, printed=printed))["loss"]
    closed = [bisect_right(run.rounds["time"].tolist(), time) for time in times]
    by_bytes, by_iteration = (panel.curves[0].points.x.tolist() for panel in loss.panels)
    assert by_iteration == [float(count) for count in closed]
    assert by_bytes == [float(run.moved[count - 1]) if count else 0.0 for count in closed]


def test_without_what_was_printed_a_result_has_the_end(run: Run) -> None:
    """One point, at the end of the run."""
    accuracy = figures_of(replace(run, printed={}))["accuracy"]
    assert [panel.curves[0].points.x.tolist() for panel in accuracy.panels] == [[float(run.moved[-1])], [40.0]]
    assert accuracy.caption == (f"one: 90.00% after {run.moved[-1] / 1000:.3g} kB and 40 iterations.",)


def test_captions_say_what_is_seen(run: Run) -> None:
    """In numbers: they are those of the rows."""
    captions = {name: figure.caption[0] for name, figure in figures_of(run).items()}
    assert captions["loss"].startswith(
        "one: from 2 to 0.0506 (mean of the last twentieth) after 21 kB and 40 iterations"
    )
    assert captions["bytes"].startswith("one: up 216 B on average (210 B … 222 B), 8.64 kB in all; down 310 B")
    assert captions["density"].startswith("one: pushes 14.06% on average (12.50% … 15.62%); updates")
    assert captions["threshold"] == "one: 0.01 throughout."
    assert captions["residual"].endswith("; 0.447 at the end.")
    assert captions["total-error"] == f"one: {sum(8 / version for version in range(1, 41)):.3g} after 40 iterations."


def test_loss_that_is_not_finite_is_counted(run: Run) -> None:
    """It cannot be drawn, and must not be overlooked."""
    printed = {"loss": Printed(np.array([BEGIN + 1.5, BEGIN + 2.5]), np.array([1.0, np.nan]))}
    (caption,) = figures_of(replace(run, printed=printed))["loss"].caption
    assert "(without 1 of 2 that are not finite)" in caption
    nothing = {"loss": Printed(np.array([BEGIN + 1.5]), np.array([np.inf]))}
    (caption,) = figures_of(replace(run, printed=nothing))["loss"].caption
    assert "no finite value" in caption


def test_rounds_for_a_mean_only_are_no_part_of_what_compression_does(tmp_path: Path) -> None:
    """In densities, λ and what is kept they are no points, and what they carry counts for nothing; bytes are bytes."""
    mean = {"only_mean": True, "push_density": 1.0, "update_density": 1.0, "residual_squared": 0.0, "threshold": 9.0}
    rows = [shard_row(0, 1), shard_row(0, 2, **mean), shard_row(0, 3), shard_row(0, 4, **mean)]
    write_lines(tmp_path / "shard-0.iterations.jsonl", rows)
    figures = figures_of(*read_runs([tmp_path]))
    for name in ("density", "threshold", "residual"):
        for panel in figures[name].panels:
            assert panel.curves[0].points.x.tolist() == [1.0, 3.0], name
    assert figures["residual"].caption[0].endswith("1.58 on average (1.15 … 2); 1.15 at the end.")
    assert figures["threshold"].caption[0].endswith("0.01 throughout.")
    assert figures["total-error"].caption[0].endswith("5.33 after 4 iterations.")
    assert figures["bytes"].panels[0].curves[0].points.x.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_total_error_stands_still_in_rounds_for_a_mean_only(run: Run) -> None:
    """Whatever their rows say."""
    only_mean = np.arange(40) % 3 == 1
    squared = np.where(only_mean, 7.0, run.rounds["residual_squared"])
    rounds = {**run.rounds, "only_mean": only_mean.astype(float), "residual_squared": squared}
    (panel,) = figures_of(replace(run, rounds=rounds))["total-error"].panels
    grown = np.diff(panel.curves[0].points.mean)
    assert (grown[only_mean[1:]] == 0).all()
    assert (grown[~only_mean[1:]] > 0).all()


def test_runs_keep_their_place_in_every_figure(run: Run) -> None:
    """Also where another is missing: colour and line go by it."""
    bare = replace(run, name="bare", printed={}, result={}, rounds={**run.rounds, "threshold": np.full(40, np.nan)})
    figures = figures_of(bare, run)
    assert [curve.run for curve in figures["loss"].panels[0].curves] == [1]
    assert [curve.run for curve in figures["threshold"].panels[0].curves] == [1]
    assert [curve.run for curve in figures["bytes"].panels[0].curves] == [0, 1]


def test_what_no_run_has_is_left_out(run: Run) -> None:
    """And why is said."""
    bare = replace(run, printed={}, result={}, rounds={**run.rounds, "threshold": np.full(40, np.nan)})
    left_out = {one.title: one.why for one in curve_figures([bare]) if isinstance(one, LeftOut)}
    assert left_out.keys() == {
        "Loss against bytes and iterations",
        "Accuracy against bytes and iterations",
        "Threshold",
    }
    assert "printed.jsonl" in left_out["Loss against bytes and iterations"]


def test_the_table_has_every_point(run: Run) -> None:
    """Of every panel, a line each."""
    figure = figures_of(run)["bytes"]
    header, *rows = figure.table()
    assert header == ("run", "quantity", "against", "at", "mean", "least", "most")
    assert len(rows) == sum(curve.points.x.size for panel in figure.panels for curve in panel.curves)
    assert sum(row[4] for row in rows if row[1].startswith("up")) == run.rounds["push_bytes"].sum()
