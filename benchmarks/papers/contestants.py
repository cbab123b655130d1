"""Methods within a budget of bytes: what each is made of, and what it takes on the wire."""

from dataclasses import dataclass, replace
from math import prod
from typing import Final, final

from benchmarks.papers.comparison import Compared, compared
from benchmarks.papers.recipe import Form, Row
from benchmarks.papers.task import Task
from benchmarks.papers.thresholds import LAMBDAS
from benchmarks.papers.training import TASKS, TaskName, Training

# A budget is what Top-k of the entire model takes at such a density.
BUDGETS: Final = (0.01, 0.001)
METHODS: Final = ("Top-k", "hard threshold", "budget", "SIDCo", "DEF", "DGC", "EF21")


@final
@dataclass(frozen=True)
class Contestant:
    """One run of one method within one budget; ``scale`` is what the density that is asked for is multiplied by."""

    task: TaskName
    method: str
    budget: float
    seed: int
    form: Form
    scale: float = 1.0


def contested(cell: Contestant) -> list[Row]:
    """One row, of the end, with the bytes of a worker's frames in a round, up and down."""
    training = training_of(cell, TASKS[cell.task](cell.seed))
    return [
        {"scale": cell.scale}
        | row
        | {
            "up_bytes_per_round": float(row["up_bytes"]) / int(row["round"]),
            "down_bytes_per_round": float(row["down_bytes"]) / int(row["round"]),
        }
        for row in compared(Compared(training, cell.budget))
    ]


def training_of(cell: Contestant, task: Task) -> Training:
    """The run: each at the task's own rate, with nothing tuned for any of them but what meets the budget.

    The momentum is where the method wants it: in the worker for DEF and DGC, else at the server.
    """
    density = float(f"{cell.budget * cell.scale:.4g}")
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
            threshold = LAMBDAS[cell.task][cell.budget] / cell.scale  # what flows is about proportional to 1/λ
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
