"""ACCORDION is between its two densities, and checks as often in a run as the paper's does."""

import pytest

from benchmarks.papers import accordion
from benchmarks.papers.accordion import HIGH, LOW, Adapted, feedback_of
from benchmarks.papers.recipe import Row


@pytest.mark.parametrize(("task", "rounds", "interval"), [("images", 300, 10), ("images", 20, 1), ("language", 90, 5)])
def test_the_interval_is_the_papers_fraction_of_the_run(task: str, rounds: int, interval: int) -> None:
    cell = Adapted("images" if task == "images" else "language", "ACCORDION", 0, "full")
    feedback = feedback_of(cell, rounds=rounds, numel=1000)
    assert feedback == f"Accordion(LayerWise(TopK({LOW})), LayerWise(TopK({HIGH})), {interval}, every_epochs=1)"


def test_the_rule_gives_the_papers_threshold_for_its_own_network() -> None:
    """ResNet-18 with 11,173,962 parameters at 0.1 %: 4.73e-3 (arXiv:2108.00951, Table 5)."""
    feedback = feedback_of(Adapted("images", accordion.METHODS[-1], 0, "full"), rounds=300, numel=11_173_962)
    assert float(feedback.removeprefix("ErrorFeedback(HardThreshold(").strip(")")) == pytest.approx(4.73e-3, rel=1e-3)


@pytest.mark.usefixtures("tiny_tasks")
def test_it_sends_as_much_as_the_high_density_at_first_and_never_less_than_the_low(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(accordion, "LOW", 0.05)
    monkeypatch.setattr(accordion, "HIGH", 0.5)
    low, high, middle = (
        float(accordion.run(Adapted("images", method, 0, "short"))[-1]["density"])
        for method in ("Top-k", "Top-k, high", "ACCORDION")
    )
    assert low < middle <= high


def test_each_method_is_drawn() -> None:
    same: Row = {"task": "images", "target": 0.01, "quality": 80.0, "density": 0.01}
    (panel,) = accordion.RECIPE.draw([same | {"method": method} for method in accordion.METHODS]).axes
    assert panel.get_legend_handles_labels()[1] == list(accordion.METHODS)
