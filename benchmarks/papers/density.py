"""Paper 1, figure 2: quality against average density, for the hard threshold and for Top-k, on three tasks."""

from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.papers.comparison import Compared, Point, compared, draw_line, lines
from benchmarks.papers.drawing import colour_of, panels
from benchmarks.papers.recipe import Form, Recipe, Row
from benchmarks.papers.seeds import seeds
from benchmarks.papers.thresholds import LAMBDAS, TARGETS
from benchmarks.papers.training import DENSE, TASKS, TaskName, Training


def cells(form: Form) -> list[Compared]:
    """Each task without compression, and with both methods at each density."""
    return [
        Compared(Training(task, method, feedback, seed, form, evaluations=1), target)
        for task in TASKS
        for seed in seeds(form)
        for method, feedback, target in kinds(task)
    ]


def kinds(task: TaskName) -> list[tuple[str, str, float]]:
    """Method, feedback and wanted density of the runs of ``task``: Top-k is layer-wise, as in the paper's figure."""
    return [
        ("dense", DENSE, 1.0),
        *(("Top-k", f"ErrorFeedback(LayerWise(TopK({density})))", density) for density in TARGETS),
        *(
            ("hard threshold", f"ErrorFeedback(HardThreshold({LAMBDAS[task][density]}))", density)
            for density in TARGETS
        ),
    ]


def draw(rows: list[Row]) -> Figure:
    """Mean and standard deviation of the quality over the seeds, at the mean density that came out."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, axes = panels(len(tasks))
    for task, panel in zip(tasks, axes, strict=True):
        for method, along in lines([row for row in rows if row["task"] == task]).items():
            if method == "dense":
                _draw_band(panel, along[0])
            else:
                draw_line(panel, method, along)
        ylabel = next(kind.quality_name for name, kind in TASKS.items() if name == task)
        panel.set(title=str(task), xscale="log", xlabel="average density", ylabel=ylabel)
        panel.legend()
    return figure


def _draw_band(axes: Axes, dense: Point) -> None:
    low, high = dense.quality - dense.deviation, dense.quality + dense.deviation
    axes.axhline(dense.quality, color=colour_of("dense"), linewidth=1.0, label="dense")
    axes.axhspan(low, high, color=colour_of("dense"), alpha=0.12)


RECIPE: Final = Recipe(
    name="density",
    shows="paper 1, figure 2 (settings of tables 1 to 3): quality against average density",
    cells=cells,
    run=compared,
    draw=draw,
)
