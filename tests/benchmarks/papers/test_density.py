"""Quality against density: which runs there are, and the figure."""

import math

from matplotlib.figure import Figure

from benchmarks.papers import density
from benchmarks.papers.recipe import Row
from thresher.compression import parse_feedback


def test_all_methods_meet_at_all_densities() -> None:
    short, full = density.cells("short"), density.cells("full")
    assert len(short) == 3 * 7
    assert len(full) == len(set(full)) == 3 * 7 * 3
    for task in ("images", "language", "recommendation"):
        of_task = [cell for cell in short if cell.training.task == task]
        for method in ("Top-k", "hard threshold"):
            assert [cell.target for cell in of_task if cell.training.method == method] == [0.01, 0.003, 0.001]
        assert [cell.target for cell in of_task if cell.training.method == "dense"] == [1.0]


def test_all_feedbacks_are_of_the_catalogue() -> None:
    for cell in density.cells("short"):
        parse_feedback(cell.training.feedback, [(100,), (20, 30)], ["bias", "weight"])


def test_drawing_has_a_panel_for_each_task_and_dense_as_a_line_across() -> None:
    rows: list[Row] = [
        {"task": task, "method": method, "target": target, "seed": seed, "density": target, "quality": quality + seed}
        for task in ("images", "recommendation")
        for seed in (0, 1)
        for method, target, quality in (("dense", 1.0, 9.0), ("Top-k", 0.01, 8.0), ("hard threshold", 0.01, math.nan))
    ]
    figure = density.draw(rows)
    assert isinstance(figure, Figure)
    assert [axes.get_title() for axes in figure.axes] == ["images", "recommendation"]
    assert figure.axes[0].get_legend_handles_labels()[1] == ["dense", "Top-k", "hard threshold"]
