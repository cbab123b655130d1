"""Top-k tensor by tensor against Top-k of the entire model, and the hard threshold, to which they are one."""

from collections.abc import Sequence
from typing import Final

from benchmarks.papers.comparison import Compared, compared, draw_by_task
from benchmarks.papers.recipe import Form, Oracle, Recipe, Row, oracle
from benchmarks.papers.seeds import seeds
from benchmarks.papers.thresholds import LAMBDAS
from benchmarks.papers.training import TaskName, Training

DENSITIES: Final = (0.01, 0.001)
LAYER_WISE: Final = "hard threshold, layer-wise"


def cells(form: Form) -> list[Compared]:
    """Images; in full the language model too, with one seed. The hard threshold tensor by tensor once for each task."""
    images = [one for seed in seeds(form) for one in _of("images", seed, form)] + _threshold("images", form)
    return images if form == "short" else images + _of("language", 0, form) + _threshold("language", form)


def _of(task: TaskName, seed: int, form: Form) -> list[Compared]:
    return [
        Compared(Training(task, method, f"ErrorFeedback({compressor})", seed, form, evaluations=1), density)
        for density in DENSITIES
        for method, compressor in {
            "Top-k": f"LayerWise(TopK({density}))",
            "Top-k, entire model": f"TopK({density})",
            "hard threshold": f"HardThreshold({LAMBDAS[task][density]})",
        }.items()
    ]


def _threshold(task: TaskName, form: Form) -> list[Compared]:
    density = DENSITIES[0]
    feedback = f"ErrorFeedback(LayerWise(HardThreshold({LAMBDAS[task][density]})))"
    return [Compared(Training(task, LAYER_WISE, feedback, 0, form, evaluations=1), density)]


def oracles(rows: Sequence[Row]) -> list[Oracle]:
    """A hard threshold is the same tensor by tensor: the largest relative difference of any number of such a pair."""
    twins = [
        (row, other)
        for row in rows
        if row["method"] == LAYER_WISE
        for other in rows
        if other["method"] == "hard threshold"
        and all(row[column] == other[column] for column in ("task", "seed", "target"))
    ]
    differences = [
        abs(float(row[column]) - float(other[column])) / max(1e-30, abs(float(other[column])))
        for row, other in twins
        for column in ("quality", "density", "up_bytes", "total_error")
    ]
    return [oracle("layerwise_threshold_difference", max(differences), expected=0.0, tolerance=0.0)]


RECIPE: Final = Recipe(
    name="layerwise",
    shows="arXiv:2108.00951, Figure 11: Top-k of the entire model",
    cells=cells,
    run=compared,
    draw=draw_by_task,
    oracles=oracles,
)
