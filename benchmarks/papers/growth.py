"""The total error of Top-k and of the hard threshold in training, round by round, at about one volume."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.papers.drawing import curve, panels
from benchmarks.papers.recipe import Form, Recipe, Row
from benchmarks.papers.thresholds import LAMBDAS
from benchmarks.papers.training import TASKS, Run, TaskName, Training
from thresher.protos.errors import NonFiniteGradientError

DENSITY: Final = 0.001
METHODS: Final = ("Top-k", "hard threshold")
ROWS: Final = 80  # of a run, about
EVALUATIONS: Final = 8


@final
@dataclass(frozen=True)
class Growth:
    """One run: at the nominal density of 0.1 %."""

    task: TaskName
    method: str
    seed: int
    form: Form

    def training(self) -> Training:
        """Top-k tensor by tensor as in the paper, whose runs are all layer-wise; a hard threshold knows no tensors."""
        compressor = {
            "Top-k": f"LayerWise(TopK({DENSITY}))",
            "hard threshold": f"HardThreshold({LAMBDAS[self.task][DENSITY]})",
        }[self.method]
        return Training(self.task, self.method, f"ErrorFeedback({compressor})", self.seed, self.form)


def cells(form: Form) -> list[Growth]:
    """All tasks; those besides the images with one seed."""
    first = [Growth(task, method, 0, form) for task in TASKS for method in METHODS]
    more = [Growth("images", method, seed, form) for seed in (1, 2) for method in METHODS]
    return first if form == "short" else first + more


def run(cell: Growth) -> list[Row]:
    """Rows of ``error``, (1/n) Σ ‖residual‖², and its sum so far, both in gradient units squared; some with quality."""
    run = Run(cell.training())
    rounds = run.plan.rounds
    evaluated = {round((rounds - 1) * (number + 1) / EVALUATIONS) for number in range(EVALUATIONS)}
    rows: list[Row] = []
    total = density = 0.0
    for step in range(rounds):
        for optimizer in run.simulator.optimizers:
            optimizer.param_groups[0]["lr"] = run.plan.rate_at(step)
        try:
            (done,) = run.simulator.run(1)
        except NonFiniteGradientError:
            break  # the rows end where the run diverged
        total += done.error
        density += done.density
        if step % max(1, rounds // ROWS) == 0 or step in evaluated:
            row: Row = {"task": cell.task, "method": cell.method, "seed": cell.seed, "round": step + 1}
            row |= {"error": done.error, "total_error": total, "density": density / (step + 1)}
            rows.append(row | ({"quality": run.task.quality(done.x)} if step in evaluated else {}))
    return rows


def draw(rows: list[Row]) -> Figure:
    """A column for each task: quality, error and total error over the rounds; of the first seed."""
    tasks = list(dict.fromkeys(str(row["task"]) for row in rows))
    figure, axes = panels(len(tasks), rows=3, height=2.9)
    for column, task in enumerate(tasks):
        mine = [row for row in rows if row["task"] == task and row["seed"] == 0]
        quality, error, total = axes[column :: len(tasks)]
        for method in dict.fromkeys(str(row["method"]) for row in mine):
            series = [row for row in mine if row["method"] == method]
            label = f"{method}, density {100 * float(series[-1]['density']):.2g} %"
            _curve(quality, method, [row for row in series if "quality" in row], "quality", label)
            _curve(error, method, series, "error", label)
            _curve(total, method, series, "total_error", label)
        quality.set(title=task, ylabel=TASKS[mine[0]["task"]].quality_name)  # type: ignore[index]
        error.set(ylabel="mean ‖residual‖²", yscale="log")
        total.set(xlabel="round", ylabel="its sum so far: total error", yscale="log")
        quality.legend(fontsize=7)
    return figure


def _curve(axes: Axes, method: str, rows: Sequence[Row], column: str, label: str) -> None:
    curve(axes, method, [float(row["round"]) for row in rows], [float(row[column]) for row in rows], label=label)


RECIPE: Final = Recipe(
    name="growth",
    shows="arXiv:2108.00951, Figures 3, 5 and 6: error accumulation and total error",
    cells=cells,
    run=run,
    draw=draw,
)
