"""Momentum at the server or in the workers: the same where all is sent, if nothing is masked."""

from dataclasses import replace

import pytest

from benchmarks.papers import momentum
from benchmarks.papers.recipe import Row
from benchmarks.papers.training import Training, trained


@pytest.mark.usefixtures("tiny_tasks")
def test_both_algorithms_are_one_where_all_is_sent_and_nothing_masked() -> None:
    server = Training("images", "dense", "ErrorFeedback(Identity())", 0, "short", evaluations=1)
    feedback = "MomentumCorrection(Identity(), nesterov=True, masking=False)"
    (one,), (other,) = trained(server), trained(replace(server, feedback=feedback, momentum=0.0))
    assert one["quality"] == other["quality"]
    assert one["up_bytes"] == other["up_bytes"]


def test_the_algorithms_differ_in_where_the_momentum_is_and_nothing_else() -> None:
    cells = momentum.cells("full")
    for two, three in zip(cells[::2], cells[1::2], strict=True):
        assert "ErrorFeedback" in two.training.feedback
        assert three.training.feedback.startswith("MomentumCorrection(")
        assert three.training.momentum == 0.0
        assert two.training.momentum is None
        assert (
            replace(three.training, method=two.training.method, feedback=two.training.feedback, momentum=None)
            == two.training
        )
        assert two.target == three.target


def test_each_method_is_drawn() -> None:
    methods = ["Top-k", "Top-k, Algorithm 3"]
    same: Row = {"task": "images", "target": 0.01, "quality": 80.0, "density": 0.01}
    (panel,) = momentum.RECIPE.draw([same | {"method": method} for method in methods]).axes
    assert panel.get_legend_handles_labels()[1] == methods
