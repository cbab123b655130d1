"""Where the momentum is: at the server (Algorithm 2), or in each worker, with factor masking (Algorithm 3)."""

from dataclasses import replace
from typing import Final

from benchmarks.papers.comparison import Compared, compared, draw_by_task
from benchmarks.papers.recipe import Form, Recipe
from benchmarks.papers.seeds import seeds
from benchmarks.papers.training import Training

DENSITIES: Final = (0.01, 0.001)


def cells(form: Form) -> list[Compared]:
    """Images; the paper's figure has Top-k, so the hard threshold runs with one seed.

    v of Algorithm 3 sums up velocities, so a λ of Algorithm 2 is of no use there: the budget finds both. Nesterov's
    momentum either way, as the task has it: the server's, or DGC's form of it in each worker.
    """
    return [
        one
        for seed in seeds(form)
        for density in DENSITIES
        for one in (
            *_both("Top-k", f"LayerWise(TopK({density}))", density, seed, form, budget=None),
            *(_both("hard threshold", "HardThreshold()", density, seed, form, budget=density) if seed == 0 else ()),
        )
    ]


def _both(
    method: str, compressor: str, density: float, seed: int, form: Form, *, budget: float | None
) -> tuple[Compared, Compared]:
    server = Training("images", method, f"ErrorFeedback({compressor})", seed, form, budget=budget, evaluations=1)
    worker = replace(
        server,
        method=f"{method}, Algorithm 3",
        feedback=f"MomentumCorrection({compressor}, nesterov=True)",
        momentum=0.0,
    )
    return Compared(server, density), Compared(worker, density)


RECIPE: Final = Recipe(
    name="momentum",
    shows="arXiv:2108.00951, Figure 13: gradient compression (Algorithm 2) against update compression (Algorithm 3)",
    cells=cells,
    run=compared,
    draw=draw_by_task,
)
