"""ACCORDION, which sends more while gradients change in size, against constant Top-k and a constant threshold."""

from dataclasses import dataclass
from typing import Final, final

from benchmarks.papers.comparison import Compared, compared, draw_by_task
from benchmarks.papers.recipe import Form, Recipe, Row
from benchmarks.papers.seeds import seeds
from benchmarks.papers.thresholds import LAMBDAS
from benchmarks.papers.training import TASKS, TaskName, Training
from thresher.compression import paper_threshold

LOW: Final = 0.001
HIGH: Final = 0.01
METHODS: Final = ("Top-k", "Top-k, high", "ACCORDION", "hard threshold", "hard threshold, by the paper's rule")
# Checks in a run: every 10 of 300 epochs for images, every 5 of 90 for the language model, as in the paper.
CHECKS: Final[dict[str, int]] = {"images": 30, "language": 18}


@final
@dataclass(frozen=True)
class Adapted:
    """One run of one of the methods."""

    task: TaskName
    method: str
    seed: int
    form: Form


def cells(form: Form) -> list[Adapted]:
    """Images; in full the language model too, with one seed."""
    images = [Adapted("images", method, seed, form) for seed in seeds(form) for method in METHODS]
    return images if form == "short" else images + [Adapted("language", method, 0, form) for method in METHODS]


def run(cell: Adapted) -> list[Row]:
    """One row, of the end."""
    task = TASKS[cell.task](cell.seed)
    feedback = feedback_of(cell, rounds=task.plan(cell.form).rounds, numel=task.network.point.numel())
    training = Training(cell.task, cell.method, feedback, cell.seed, cell.form, evaluations=1)
    return compared(Compared(training, HIGH if cell.method == "Top-k, high" else LOW))


def feedback_of(cell: Adapted, *, rounds: int, numel: int) -> str:
    """The call that makes the method for a run of ``rounds`` and a model of ``numel`` parameters.

    ACCORDION looks at the norm of the sum of all gradients between two checks. The paper's rule is λ = 1 / (2 √k) with
    the k of the low density.
    """
    low, high = f"LayerWise(TopK({LOW}))", f"LayerWise(TopK({HIGH}))"
    match cell.method:
        case "ACCORDION":
            return f"Accordion({low}, {high}, {max(1, rounds // CHECKS[cell.task])}, every_epochs=1)"
        case "Top-k":
            return f"ErrorFeedback({low})"
        case "Top-k, high":
            return f"ErrorFeedback({high})"
        case "hard threshold":
            return f"ErrorFeedback(HardThreshold({LAMBDAS[cell.task][LOW]}))"
        case _:
            return f"ErrorFeedback(HardThreshold({paper_threshold(LOW * numel)}))"


RECIPE: Final = Recipe(
    name="accordion",
    shows="arXiv:2108.00951, Tables 5 to 7: comparison with ACCORDION",
    cells=cells,
    run=run,
    draw=draw_by_task,
)
