"""What error feedback is for: both sparsifiers without it, beside those with it, at about one volume.

``python -m benchmarks.papers.without_feedback`` finds the thresholds without feedback, on a seed of its own.
"""

from typing import Final

import numpy as np

from benchmarks.papers.comparison import Compared, compared, draw_by_task
from benchmarks.papers.recipe import Form, Recipe
from benchmarks.papers.seeds import PILOT, seeds
from benchmarks.papers.thresholds import LAMBDAS
from benchmarks.papers.training import Run, TaskName, Training

DENSITIES: Final = (0.01, 0.001)
ALONE: Final[dict[TaskName, dict[float, float]]] = {
    "images": {0.01: 0.033, 0.001: 0.084},
    "language": {0.01: 0.001, 0.001: 0.0033},
}
"""Average density → the threshold that gives it without feedback in the full form, by :func:`threshold_alone`.

Where nothing accumulates, a threshold for residuals lets far less through.
"""


def cells(form: Form) -> list[Compared]:
    """Images; in full the language model too, with one seed."""
    images = [one for seed in seeds(form) for one in _of("images", seed, form)]
    return images if form == "short" else images + _of("language", 0, form)


def _of(task: TaskName, seed: int, form: Form) -> list[Compared]:
    return [
        Compared(Training(task, method, feedback, seed, form, evaluations=1), density)
        for density in DENSITIES
        for method, feedback in {
            "Top-k": f"ErrorFeedback(LayerWise(TopK({density})))",
            "hard threshold": f"ErrorFeedback(HardThreshold({LAMBDAS[task][density]}))",
            "Top-k, without feedback": f"NoFeedback(LayerWise(TopK({density})))",
            "hard threshold, without feedback": f"NoFeedback(HardThreshold({ALONE[task][density]}))",
        }.items()
    ]


def threshold_alone(task: TaskName, density: float) -> float:
    """The λ, to two digits, that this fraction of all gradients of a run reaches.

    The run is one of Top-k of that density, without feedback; the gradients are those of the first worker in all
    rounds of the full form, counted in bins of a fortieth of a decade.
    """
    run = Run(Training(task, "Top-k", f"NoFeedback(TopK({density}))", PILOT, "full", evaluations=1))
    edges = np.logspace(-8, 2, 401)
    counts = np.zeros(len(edges) - 1)
    for step in range(run.plan.rounds):
        gradient = run.task.gradient(0, run.simulator.synced, step).abs().numpy()
        counts += np.histogram(np.clip(gradient, edges[0], edges[-1]), edges)[0]
        run.advance(step)
    reached = counts[::-1].cumsum()[::-1] / counts.sum()
    return float(f"{edges[int((reached > density).sum())]:.2g}")


RECIPE: Final = Recipe(
    name="without_feedback",
    shows="arXiv:2108.00951, Figure 12: convergence without error feedback",
    cells=cells,
    run=compared,
    draw=draw_by_task,
)

if __name__ == "__main__":
    for name, found in ALONE.items():
        for asked, used in found.items():
            print(f"{name} at {asked}: {threshold_alone(name, asked)}, in use {used}", flush=True)
