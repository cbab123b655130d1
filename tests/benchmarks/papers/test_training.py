"""A run of a deep recipe, on a task small enough to know what comes out."""

import math

import pytest
import torch
from torch import Tensor, nn

from benchmarks.papers import training
from benchmarks.papers.recipe import Form
from benchmarks.papers.task import WORKERS, Flat, Plan, Task
from benchmarks.papers.training import DENSE, Run, Training, trained

NUMEL = 40


class Quadratic(Task):
    """½‖x - c_i‖² at worker i; the centres are around 1, and the quality is the distance from their mean."""

    quality_name = "distance"
    higher_is_better = False

    def __init__(self, seed: int) -> None:
        self.network = Flat(nn.Linear(NUMEL, 1, bias=False))
        self.network.point.zero_()
        self.centres = 1 + torch.randn(WORKERS, NUMEL, generator=torch.Generator().manual_seed(seed))

    def plan(self, form: Form) -> Plan:
        return Plan(rounds=20 if form == "short" else 60, rate=0.5, warm_up=0.0, drops=())

    def gradient(self, worker: int, point: Tensor, step: int) -> Tensor:
        del step
        return point - self.centres[worker]

    def quality(self, point: Tensor) -> float:
        return float((point - self.centres.mean(0)).norm())


@pytest.fixture(autouse=True)
def quadratic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(training.TASKS, "images", Quadratic)


def of(feedback: str, **settings: object) -> Training:
    return Training("images", "some", feedback, seed=0, form="short", **settings)  # type: ignore[arg-type]


def test_dense_run_is_gradient_descent() -> None:
    rows = trained(of(DENSE))
    start = Quadratic(0).quality(torch.zeros(NUMEL))
    assert [row["round"] for row in rows] == [6, 11, 15, 20]
    assert [row["quality"] for row in rows[:2]] == pytest.approx([start * 0.5**6, start * 0.5**11], rel=1e-3)
    assert all(row["density"] == 1 and row["error"] == 0 and row["total_error"] == 0 for row in rows)
    assert all(math.isnan(float(row["virtual_quality"])) for row in rows)


def test_equal_runs_give_equal_rows() -> None:
    cell = of("ErrorFeedback(TopK(0.1))", placement="update")
    assert trained(cell) == trained(cell)


def test_density_is_what_was_sent() -> None:
    rows = trained(of("ErrorFeedback(TopK(0.1))"))
    assert [row["density"] for row in rows] == pytest.approx([0.1] * 4)


def test_errors_add_up_over_the_rounds() -> None:
    rows = trained(of("ErrorFeedback(HardThreshold(0.3))", evaluations=19))
    assert [row["round"] for row in rows] == list(range(2, 21))
    total = float(rows[0]["total_error"]) - float(rows[0]["error"])  # of the first round
    for row in rows:
        total += float(row["error"])
        assert row["total_error"] == pytest.approx(total)
        assert float(row["error"]) <= NUMEL * 0.3**2  # an absolute compressor's residual


def test_bytes_grow_with_every_round_and_with_what_is_sent() -> None:
    few, many = (trained(of(f"ErrorFeedback(TopK({density}))"))[-1] for density in (0.1, 0.5))
    assert 0 < float(few["up_bytes"]) < float(many["up_bytes"])
    assert float(few["up_bytes"]) <= float(few["down_bytes"])
    one, both = (row["up_bytes"] for row in trained(of("ErrorFeedback(TopK(0.1))", evaluations=2)))
    assert float(both) == pytest.approx(2 * float(one), rel=0.1)


def test_where_updates_are_sent_both_points_are_judged() -> None:
    dense, sparse = (trained(of(call, placement="update"))[-1] for call in (DENSE, "ErrorFeedback(TopK(0.1))"))
    assert dense["virtual_quality"] == dense["quality"]
    assert sparse["virtual_quality"] != sparse["quality"]


def test_a_run_that_diverges_says_so_and_goes_no_further() -> None:
    rows = trained(of(DENSE, rate=1e20))
    assert len(rows) == 4
    assert all(math.isnan(float(row["quality"])) for row in rows)


def test_settings_change_the_plan() -> None:
    changed = of(DENSE, rate=0.5, momentum=0.9, nesterov=False).plan(Quadratic(0))
    assert (changed.rate, changed.momentum, changed.nesterov) == (0.25, 0.9, False)
    assert of(DENSE).plan(Quadratic(0)).momentum == 0.0


def test_budget_steers_the_threshold_to_its_density() -> None:
    run = Run(Training("images", "budget", "ErrorFeedback(HardThreshold())", 0, "full", budget=0.1))
    before = run.simulator.threshold
    last = run.rows()[-1]
    assert run.simulator.threshold != before
    assert float(last["density"]) == pytest.approx(0.1, rel=0.5)
