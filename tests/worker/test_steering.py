"""Steering: what the controllers of the threshold hear, and what they propose."""

from collections.abc import Callable

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thresher.compression import Calibration, quantile_threshold
from thresher.protos.update import Update
from thresher.worker.steering import CALIBRATION_STEPS, Budgeted, Calibrated, Steering

NUMEL = 4096
WORKERS = 4


def update(elements: int, push_bytes: int) -> Update:
    return Update(1, WORKERS, tuple(range(WORKERS)), None, (True,), pushed_elements=elements, push_bytes=push_bytes)


def gradient(step: int) -> Tensor:
    return torch.randn(NUMEL, generator=torch.Generator().manual_seed(step)) * (1 + step % 7)


def drive(steering: Steering, steps: int, cost: Callable[[int], tuple[int, int]]) -> tuple[int, int]:
    """Feed error feedback's own residuals back for a number of rounds; return elements and bytes of all workers."""
    residual = torch.zeros(NUMEL)
    threshold, elements, spent = 0.0, 0, 0
    for step in range(steps):
        corrected = residual + gradient(step)
        threshold = threshold or quantile_threshold(corrected, steering.density)
        sent = corrected.abs() >= threshold
        residual = torch.where(sent, 0.0, corrected)
        count = int(sent.sum())
        threshold = steering.observe(lambda corrected=corrected: corrected, count / NUMEL) or 0.0  # type: ignore[misc]
        push_bytes, pull_bytes = cost(count)
        steering.settle([update(WORKERS * count, WORKERS * push_bytes)], pull_bytes)
        elements += WORKERS * count
        spent += WORKERS * (push_bytes + pull_bytes)
    return elements, spent


def test_a_calibration_ends() -> None:
    """The proposals are those of the calibration, and after its last round they stay."""
    steering, expected = Calibrated(0.01), Calibration(0.01, CALIBRATION_STEPS)
    for step in range(CALIBRATION_STEPS):
        corrected = gradient(step)
        steering.settle([update(WORKERS, 100)], 100)
        assert steering.observe(lambda corrected=corrected: corrected, 0.5) == expected.observe(corrected)  # type: ignore[misc]
    assert steering.density == 0.01
    assert steering.observe(lambda: 1000 * gradient(0), 0.5) == expected.threshold


def test_a_density_is_met() -> None:
    """As a mean over the run, whatever bytes cost; the run's length need not be known."""
    for steps in (None, 600):
        steering = Budgeted(NUMEL, WORKERS, density=0.02, budget=None, steps=steps)
        elements, _ = drive(steering, 600, lambda count: (6 * count + 44, 9 * count))
        assert abs(elements / (WORKERS * NUMEL * 600) / 0.02 - 1) < 0.05


@settings(max_examples=25)
@given(st.integers(1, 12), st.integers(0, 60), st.integers(0, 500))
def test_bytes_are_met_whatever_an_element_costs(push_price: int, pull_price: int, frame: int) -> None:
    """All bytes of all workers, both directions: the price is learned on the way."""
    steps = 500
    affordable = 40 * (push_price + pull_price) + 2 * frame
    budget = WORKERS * steps * affordable  # about forty elements a round: one in a hundred
    steering = Budgeted(NUMEL, WORKERS, density=None, budget=budget, steps=steps)
    _, spent = drive(steering, steps, lambda count: (push_price * count + frame, pull_price * count + frame))
    assert abs(spent / budget - 1) < 0.05


def test_a_budget_nobody_can_spend_sends_everything() -> None:
    """It is no error to allow more than a dense run costs."""
    steering = Budgeted(NUMEL, WORKERS, density=None, budget=10**15, steps=10)
    assert steering.density == 1.0
    drive(steering, 3, lambda count: (8 * count, 8 * count))
    assert steering.density == 1.0
