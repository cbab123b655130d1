"""The budget: it is kept, by thresholds that hardly change, in any unit, and it goes on after a restart."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thresher.compression.base import Round
from thresher.compression.budget import Budget
from thresher.compression.error_feedback import ErrorFeedback
from thresher.compression.hard_threshold import HardThreshold
from thresher.compression.thresholds import quantile_threshold
from thresher.protos.errors import ConfigurationError, NonFiniteGradientError

NUMEL = 2500
ROUNDS = 600
Gradients = Callable[[int], torch.Tensor]

Observation = tuple[torch.Tensor, float, float | None]

rounds_seen = st.lists(
    st.tuples(
        st.lists(st.integers(-100, 100), min_size=6, max_size=6).map(lambda values: torch.tensor(values).float()),
        st.floats(0.0, 1.0),
        st.none() | st.floats(0.0, 1.0),
    ),
    min_size=2,
    max_size=15,
)


generator = torch.Generator().manual_seed(1)
SIZES = torch.exp(torch.randn(NUMEL, generator=generator))  # coordinates differ by orders of magnitude
NOISE = SIZES * torch.randn(ROUNDS, NUMEL, generator=generator)
SEEN_ROWS = (torch.rand(ROUNDS, NUMEL // 20, generator=generator) < 0.05).repeat_interleave(20, dim=1)


def noise(step: int) -> torch.Tensor:
    return NOISE[step]


def drift(step: int) -> torch.Tensor:
    return NOISE[step] + 0.3 * SIZES


def rows(step: int) -> torch.Tensor:
    """An embedding's: nineteen of twenty rows are exactly zero."""
    return NOISE[step] * SEEN_ROWS[step]


def shrinking(step: int) -> torch.Tensor:
    return noise(step) * 10 ** (-2 * step / ROUNDS)


def dropping(step: int) -> torch.Tensor:
    """Ten times smaller after a third of the run, as when the learning rate falls and the model settles."""
    return noise(step) * (1.0 if step < ROUNDS // 3 else 0.1)


def shown(vector: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: vector


def thresholds_of(budget: Budget, seen: Sequence[Observation]) -> list[float | None]:
    return [budget.observe(shown(vector), sent, settled) for vector, sent, settled in seen]


def sent_under(
    budget: Budget, workers: Sequence[Gradients], rounds: int = ROUNDS
) -> tuple[list[float], list[float | None]]:
    """Mean density over the workers and threshold, round by round, as a session drives it."""
    feedbacks = [ErrorFeedback(HardThreshold(), NUMEL) for _ in workers]
    densities: list[float] = []
    thresholds: list[float | None] = []
    for step in range(rounds):
        pushes = []
        for feedback, gradients in zip(feedbacks, workers, strict=True):
            gradient = gradients(step)
            threshold = budget.threshold or quantile_threshold(gradient, budget.density)
            pushes.append(feedback.compress(gradient, Round(step=step, threshold=threshold)))
        push, residual = pushes[0], feedbacks[0].residual
        thresholds.append(budget.threshold)
        budget.observe(
            partial(residual.index_add, 0, push.indices, push.values),
            push.density,
            densities[-1] if densities else None,
        )
        densities.append(sum(push.density for push in pushes) / len(pushes))
    return densities, thresholds


def mean(densities: Sequence[float]) -> float:
    return sum(densities) / len(densities)


@pytest.mark.parametrize("unit", [2.0**-40, 1.0, 2.0**40])
@pytest.mark.parametrize("gradients", [noise, drift, rows, shrinking])
def test_a_run_of_unknown_length_is_on_budget_at_any_time(gradients: Gradients, unit: float) -> None:
    """Within 5 % at every round from the 500th on, in any unit."""
    densities, _ = sent_under(Budget(0.01), [lambda step: unit * gradients(step)])
    for rounds in range(500, ROUNDS + 1):
        assert mean(densities[:rounds]) == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize("density", [0.003, 0.1])
@pytest.mark.parametrize("gradients", [noise, drift, shrinking, dropping])
def test_a_run_of_known_length_ends_on_budget(gradients: Gradients, density: float) -> None:
    """Whatever happened on the way, within 2 % at the end."""
    densities, _ = sent_under(Budget(density, ROUNDS), [gradients])
    assert mean(densities) == pytest.approx(density, rel=0.02)


def test_a_drop_of_the_gradients_is_made_up_for() -> None:
    """Of unknown length: ten times smaller gradients at a third of the run, within 5 % again before it ends."""
    densities, _ = sent_under(Budget(0.01), [dropping])
    assert mean(densities) == pytest.approx(0.01, rel=0.05)


def test_the_density_over_all_workers_counts() -> None:
    """Rank 0 sees gradients a fifth as large as the others', and yet the mean over all is on budget."""
    densities, _ = sent_under(Budget(0.01), [lambda step: 0.2 * noise(step), drift, noise])
    assert mean(densities[:500]) == pytest.approx(0.01, rel=0.05)
    assert mean(densities) == pytest.approx(0.01, rel=0.05)


def test_steady_gradients_keep_their_threshold() -> None:
    """After the first 100 rounds λ moves by less than half, at fewer than 4 % of them."""
    _, thresholds = sent_under(Budget(0.1), [noise])
    late = [threshold for threshold in thresholds[100:] if threshold is not None]
    assert max(late) / min(late) < 1.5
    assert sum(one != following for one, following in pairwise(late)) < 0.04 * len(late)


def test_the_vector_is_seldom_looked_at() -> None:
    """Fewer than one round in ten needs gradient + residual, and the later the fewer."""
    budget, looks = Budget(0.1), []
    for step in range(ROUNDS):

        def corrected(step: int = step) -> torch.Tensor:
            looks.append(step)
            return noise(step)

        budget.observe(corrected, sent=0.1)
    assert len(looks) < ROUNDS / 10
    assert len([step for step in looks if step >= ROUNDS // 2]) < len(looks) / 4


def total_error(thresholds: Sequence[float]) -> tuple[float, float]:
    """Mean density and Σ‖e‖² of thresholds given for every round, on noise."""
    feedback, sent, error = ErrorFeedback(HardThreshold(), NUMEL), 0.0, 0.0
    for step, threshold in enumerate(thresholds):
        sent += feedback.compress(noise(step), Round(threshold=threshold)).density
        error += float(feedback.residual.square().sum())
    return sent / len(thresholds), error


def test_its_total_error_is_near_that_of_the_best_constant_threshold() -> None:
    """On steady gradients, within a tenth of the constant λ that sends as much, which a search finds afterwards."""
    budget = Budget(0.05)
    _, thresholds = sent_under(budget, [noise])
    start = quantile_threshold(noise(0), budget.density)
    density, error = total_error([threshold or start for threshold in thresholds])
    low, high = 0.1, 100.0
    for _ in range(7):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if total_error([middle] * ROUNDS)[0] > density else (low, middle)
    _, constant = total_error([low] * ROUNDS)
    assert error < 1.1 * constant


@given(rounds_seen, st.none() | st.integers(1, 40), st.integers(-10, 10))
def test_the_threshold_has_the_unit_of_the_gradient(seen: list[Observation], steps: int | None, exponent: int) -> None:
    """Gradients 4ⁿ times as large give a threshold 4ⁿ times as large, to the bit unless it is the least there is."""
    unit = 4.0**exponent
    one, other = Budget(0.3, steps), Budget(0.3, steps)
    for vector, sent, settled in seen:
        threshold = one.observe(shown(vector), sent, settled)
        scaled = other.observe(shown(unit * vector), sent, settled)
        if threshold is None or threshold < 1e-30:
            return
        assert scaled == threshold * unit


@given(rounds_seen, st.none() | st.integers(1, 40))
def test_the_threshold_falls_by_half_at_most(seen: list[Observation], steps: int | None) -> None:
    """However little was sent; and once there is one it is positive for good."""
    budget = Budget(0.3, steps)
    for vector, sent, settled in seen:
        before = budget.threshold
        after = budget.observe(shown(vector), sent, settled)
        if before is not None:
            assert after is not None
            assert after >= before / 2 > 0.0


@given(rounds_seen, st.none() | st.integers(1, 40), st.data())
def test_it_resumes_where_it_was(seen: list[Observation], steps: int | None, data: st.DataObject) -> None:
    """Interrupted anywhere and restored from its state, it chooses the same thresholds."""
    cut = data.draw(st.integers(0, len(seen)))
    whole, before, after = (Budget(0.3, steps) for _ in range(3))
    expected = thresholds_of(whole, seen)
    found = thresholds_of(before, seen[:cut])
    after.load_state_dict(before.state_dict())
    found += thresholds_of(after, seen[cut:])
    assert found == expected
    assert after.state_dict() == whole.state_dict()


def test_another_density_may_be_allowed_on_the_way() -> None:
    """A budget in bytes buys another number of elements than was assumed: the whole run meets what is allowed last."""
    budget = Budget(0.01, ROUNDS)
    sent_at_first, _ = sent_under(budget, [noise], ROUNDS // 2)
    budget.allow(0.02)
    sent_then, _ = sent_under(budget, [noise], ROUNDS - ROUNDS // 2)
    assert budget.density == 0.02
    assert mean(sent_at_first + sent_then) == pytest.approx(0.02, rel=0.02)


def test_without_any_gradient_there_is_no_threshold() -> None:
    """Zeros say nothing about the size of what will come; the first gradient that is not zero does."""
    budget = Budget(0.5)
    assert budget.threshold is None
    for _ in range(3):
        assert budget.observe(lambda: torch.zeros(4), sent=0.0) is None
    threshold = budget.observe(lambda: torch.tensor([4.0, 3.0, 2.0, 1.0]), sent=0.5)
    assert threshold is not None
    assert 1.0 < threshold <= 4.0


def test_a_burst_is_not_sent_twice() -> None:
    """After a round whose gradients were huge and all went, one like it would cost at most what is allowed."""
    budget = Budget(0.01)
    for step in range(100):
        budget.observe(shown(noise(step)), sent=0.01)
    huge = 1e6 * noise(100)
    threshold = budget.observe(shown(huge), sent=1.0)
    a_fifth_of_the_coming_quarter = 0.2 * 0.01 * 101 / 4
    assert HardThreshold(threshold).compress(huge).density <= a_fifth_of_the_coming_quarter


def test_a_known_length_that_is_exceeded_is_no_end() -> None:
    """Beyond it the mean density is kept as if the length were unknown."""
    densities, _ = sent_under(Budget(0.01, ROUNDS // 2), [noise])
    assert mean(densities) == pytest.approx(0.01, rel=0.05)


def test_an_observation_that_is_refused_changes_nothing() -> None:
    """NaN is no gradient."""
    budget = Budget(0.5)
    budget.observe(lambda: torch.tensor([1.0, 2.0]), sent=0.5)
    before = budget.state_dict()
    with pytest.raises(NonFiniteGradientError):
        budget.observe(lambda: torch.tensor([1.0, float("nan")]), sent=1.0)
    assert budget.state_dict() == before


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (Budget(0.1, 4).state_dict(), "a budget over 4 steps, this one is over 3"),
        (Budget(0.1).state_dict(), "a budget over None steps, this one is over 3"),
        (Budget(0.1, 3).state_dict() | {"density": 2.0}, "density must be"),
        ({}, "not the state of a Budget"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(state: dict[str, Any], message: str) -> None:
    """Another length, an impossible density, or no state at all."""
    budget = Budget(0.1, 3)
    before = budget.state_dict()
    with pytest.raises(ConfigurationError, match=message):
        budget.load_state_dict(state)
    assert budget.state_dict() == before


@pytest.mark.parametrize(("density", "steps"), [(0.0, None), (1.1, None), (float("nan"), None), (0.1, 0), (0.1, -1)])
def test_impossible_settings_are_refused(density: float, steps: int | None) -> None:
    """A density in (0, 1], and at least one step."""
    with pytest.raises(ConfigurationError):
        Budget(density, steps)


def test_an_impossible_density_is_not_allowed() -> None:
    """Refused, and the old one stays."""
    budget = Budget(0.1)
    with pytest.raises(ConfigurationError, match="density"):
        budget.allow(0.0)
    assert budget.density == 0.1
