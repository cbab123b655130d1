"""A hard threshold does not see where one tensor ends and another begins; Top-k does."""

import pytest

from benchmarks.papers import layerwise
from benchmarks.papers.comparison import compared
from benchmarks.papers.recipe import Row
from benchmarks.papers.thresholds import LAMBDAS


@pytest.mark.usefixtures("tiny_tasks")
def test_the_hard_threshold_is_the_same_tensor_by_tensor() -> None:
    threshold = f"HardThreshold({LAMBDAS['images'][0.01]})"
    pair = [cell for cell in layerwise.cells("short") if threshold in cell.training.feedback]
    assert len(pair) == 2
    (oracle,) = layerwise.oracles([row for cell in pair for row in compared(cell)])
    assert oracle["name"] == "layerwise_threshold_difference"
    assert oracle["measured"] == 0.0
    assert oracle["ok"]


@pytest.mark.parametrize("column", ["quality", "density", "up_bytes", "total_error"])
def test_a_difference_breaks_the_oracle(column: str) -> None:
    same: Row = {"task": "images", "seed": 0, "target": 0.01}
    same |= {"quality": 80.0, "density": 0.01, "up_bytes": 4e5, "total_error": 3.0}
    twin = same | {column: 2.0 * float(same[column])}
    (oracle,) = layerwise.oracles([same | {"method": "hard threshold"}, twin | {"method": layerwise.LAYER_WISE}])
    assert oracle["measured"] == pytest.approx(1.0)
    assert not oracle["ok"]


def test_each_method_is_drawn() -> None:
    methods = ["Top-k", "Top-k, entire model", "hard threshold", "hard threshold, layer-wise"]
    same: Row = {"task": "images", "target": 0.01, "quality": 80.0, "density": 0.01}
    (panel,) = layerwise.RECIPE.draw([same | {"method": method} for method in methods]).axes
    assert panel.get_legend_handles_labels()[1] == methods


def test_each_run_is_made_once() -> None:
    cells = layerwise.cells("full")
    assert len(set(cells)) == len(cells)
    assert sum(cell.training.method == layerwise.LAYER_WISE for cell in cells) == 2
