"""Methods that the papers did not compare, at equal bytes: what the frames on the wire take, with our coding.

``python -m benchmarks.papers.beyond`` finds the scales that bring the bytes together, on a seed of its own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Final, final

from matplotlib.figure import Figure

from benchmarks.papers.comparison import Compared, compared, draw_by_task
from benchmarks.papers.recipe import Form, Recipe, Row
from benchmarks.papers.seeds import PILOT, seeds
from benchmarks.papers.task import Task
from benchmarks.papers.thresholds import LAMBDAS
from benchmarks.papers.training import TASKS, TaskName, Training

# A budget is what Top-k of the entire model takes at such a density.
BUDGETS: Final = (0.01, 0.001)
SCALES: Final[Mapping[tuple[TaskName, str, float], float]] = {}
"""Task, method and budget → what the density that is asked for is multiplied by; 1 where none is named."""
NEAR: Final = 0.1  # bytes that differ by no more than this fraction are equal
TRIES: Final = 3
METHODS: Final = ("Top-k", "hard threshold", "budget", "SIDCo", "DEF", "DGC", "EF21")


@final
@dataclass(frozen=True)
class Beyond:
    """One run of one method within one budget."""

    task: TaskName
    method: str
    budget: float
    seed: int
    form: Form


def cells(form: Form) -> list[Beyond]:
    """All methods on all tasks; in short within the larger budget only."""
    return [
        Beyond(task, method, budget, seed, form)
        for seed in seeds(form)
        for task in TASKS
        for budget in (BUDGETS[:1] if form == "short" else BUDGETS)
        for method in METHODS
    ]


def run(cell: Beyond) -> list[Row]:
    """One row, of the end, with the bytes of a worker's frames in a round, up and down."""
    training = training_of(cell, TASKS[cell.task](cell.seed))
    return [
        row
        | {
            "up_bytes_per_round": float(row["up_bytes"]) / int(row["round"]),
            "down_bytes_per_round": float(row["down_bytes"]) / int(row["round"]),
        }
        for row in compared(Compared(training, cell.budget))
    ]


def training_of(cell: Beyond, task: Task, scale: float | None = None) -> Training:
    """The run: each at the task's own rate, with nothing tuned for any of them but what meets the budget.

    The momentum is where the method wants it: in the worker for DEF and DGC, else at the server. ``scale`` takes the
    place of the one in :data:`SCALES`.
    """
    scale = SCALES.get((cell.task, cell.method, cell.budget), 1.0) if scale is None else scale
    density = cell.budget * scale
    training = Training(cell.task, cell.method, "", cell.seed, cell.form, evaluations=1)
    match cell.method:
        case "DEF":
            feedback = f"DetachedErrorFeedback(TopK({density}), 0.3)"
            return replace(training, feedback=feedback, placement="update")
        case "DGC":
            return replace(training, feedback=dgc(task, cell.form, density), momentum=0.0)
        case "budget":
            return replace(training, feedback="ErrorFeedback(HardThreshold())", budget=density)
        case "hard threshold":
            threshold = LAMBDAS[cell.task][cell.budget] / scale  # what flows is about proportional to 1/λ
            return replace(training, feedback=f"ErrorFeedback(HardThreshold({threshold:.4g}))")
        case "SIDCo":
            return replace(training, feedback=f"ErrorFeedback(SIDCo({density}))")
        case "EF21":
            return replace(training, feedback=f"EF21(TopK({density}))")
        case _:
            return replace(training, feedback=f"ErrorFeedback(TopK({density}))")


def dgc(task: Task, form: Form, density: float) -> str:
    """DGC with the momentum of the task in the workers (none where that is Adam's), without its clipping and warm-up.

    It sends biases and norms whole. What the budget leaves for the matrices may be nothing; one coordinate of each is
    the least it sends.
    """
    plan = task.plan(form)
    sizes = [(len(shape) > 1, prod(shape)) for shape in task.network.shapes]
    whole, matrices = (sum(size for is_matrix, size in sizes if is_matrix == wanted) for wanted in (False, True))
    left = max(density * (whole + matrices) - whole, 1.0) / matrices
    return f"DGC(density={left:.4g}, momentum={plan.momentum}, nesterov={plan.nesterov and plan.momentum > 0})"


def scale_for(bytes_of: Callable[[float], float], wanted: float) -> float:
    """The scale at which a method takes ``wanted`` bytes, the nearest of a few tries; each corrects the last."""
    tried: dict[float, float] = {}
    scale = 1.0
    for _ in range(TRIES):
        tried[scale] = bytes_of(scale) / wanted
        if abs(tried[scale] - 1.0) <= NEAR:
            break
        scale = float(f"{scale / tried[scale]:.3g}")
    return min(tried, key=lambda scale: abs(tried[scale] - 1.0))


def pilot(task: TaskName, budget: float) -> dict[str, float]:
    """The scales of all methods but Top-k, which sets the measure, in the full form."""

    def bytes_of(method: str, scale: float) -> float:
        cell = Beyond(task, method, budget, PILOT, "full")
        return float(compared(Compared(training_of(cell, TASKS[task](PILOT), scale), budget))[0]["up_bytes"])

    wanted = bytes_of("Top-k", 1.0)
    return {method: scale_for(partial(bytes_of, method), wanted) for method in METHODS if method != "Top-k"}


def draw(rows: list[Row]) -> Figure:
    """Quality against the bytes of a worker's frames in a round, for each task."""
    return draw_by_task(rows, "up_bytes_per_round", "bytes a worker sends in a round")


RECIPE: Final = Recipe(
    name="beyond",
    shows="the comparison that neither paper makes: quality at equal bytes on the wire",
    cells=cells,
    run=run,
    draw=draw,
)

if __name__ == "__main__":
    for name in TASKS:
        for asked in BUDGETS:
            print(f"{name} at {asked}: {pilot(name, asked)}", flush=True)
