"""With and without a memory: pairs that differ in nothing else, and the threshold that gives a density without one."""

from collections import Counter

import pytest
import torch

from benchmarks.papers import without_feedback
from benchmarks.papers.recipe import Row
from benchmarks.papers.seeds import PILOT
from benchmarks.papers.training import Run, Training


def test_top_k_differs_in_nothing_but_the_memory() -> None:
    cells = [cell for cell in without_feedback.cells("full") if cell.training.method.startswith("Top-k")]
    found = Counter(
        (cell.training.feedback.partition("(")[2], cell.training.task, cell.seed, cell.target) for cell in cells
    )
    assert set(found.values()) == {2}


def test_each_threshold_without_feedback_is_below_the_one_with_it() -> None:
    for cell in without_feedback.cells("full"):
        if "HardThreshold" in cell.training.feedback:
            used = float(cell.training.feedback.partition("Threshold(")[2].strip(")"))
            alone = without_feedback.ALONE[cell.training.task][cell.target]
            assert used == alone if "without" in cell.training.method else used > alone


@pytest.mark.usefixtures("tiny_tasks")
def test_the_threshold_is_the_quantile_of_all_gradients_of_the_run() -> None:
    density = 0.2
    found = without_feedback.threshold_alone("images", density)
    run = Run(Training("images", "Top-k", f"NoFeedback(TopK({density}))", PILOT, "full", evaluations=1))
    gradients = []
    for step in range(run.plan.rounds):
        gradients.append(run.task.gradient(0, run.simulator.synced, step).abs())
        run.advance(step)
    reached = float((torch.cat(gradients) >= found).float().mean())
    assert reached == pytest.approx(density, rel=0.1)


def test_each_method_is_drawn() -> None:
    methods = ["Top-k", "Top-k, without feedback", "hard threshold", "hard threshold, without feedback"]
    same: Row = {"task": "images", "target": 0.01, "quality": 80.0, "density": 0.01}
    (panel,) = without_feedback.RECIPE.draw([same | {"method": method} for method in methods]).axes
    assert panel.get_legend_handles_labels()[1] == methods
