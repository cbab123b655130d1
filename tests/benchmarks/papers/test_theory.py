"""The bounds against each other and against what they are derived from, and the problem against its constants."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from benchmarks.papers import theory
from benchmarks.papers.theory import CURVATURE, NUMEL, Constants, Experiment, Problem, Terms
from thresher.compression import paper_threshold, precision_threshold

positive = st.floats(1e-3, 1e3)
known = st.builds(
    Constants,
    smoothness=st.floats(0.1, 10),
    noise=st.floats(0, 10),
    similarity=st.floats(0, 10),
    workers=st.integers(1, 9),
    gap=st.floats(0.01, 10),
    noise_slope=st.floats(0, 2),
    similarity_slope=st.floats(0, 2),
)


def experiment(compressor: str, **fields: float) -> Experiment:
    made = Experiment("threshold", "hard threshold", compressor, 0.5, seed=0, rounds=200)
    return replace(made, **fields)  # type: ignore[arg-type] # of mixed types


@given(a=positive, b=positive, c=positive, q=positive, rounds=st.integers(1, 10**6))
def test_the_corollary_holds_at_the_tuned_step(a: float, b: float, c: float, q: float, rounds: int) -> None:
    """a/(γT) + bγ + cγ² ≤ qa/T + 2√(ab/T) + 2c^⅓ (a/T)^⅔ there; and no larger step is asked for than 1/q."""
    terms = Terms(a, b, c, q * (1 - 1e-12))
    step = Terms(a, b, c, q).tuned_step(rounds)
    assert step <= 1 / q
    assert terms.at(step, rounds) <= terms.tuned(rounds) * (1 + 1e-9)
    assert Terms(a, b, c, q).at(1.1 / q, rounds) == math.inf


@given(known, st.integers(1, 100), st.integers(1, 100))
def test_at_the_largest_threshold_both_last_terms_are_equal(of: Constants, k: int, more: int) -> None:
    """Rule (29) is where Theorem 6 with κ² = dλ² meets Theorem 7 with δ = k/d."""
    of = replace(of, noise=of.noise + 0.01)
    numel = k + more
    threshold = theory.largest_threshold(of, k, numel)
    assert theory.theorem_6(of, math.sqrt(numel) * threshold).c == pytest.approx(theory.theorem_7(of, k / numel).c)


def test_the_rule_of_the_paper_is_that_of_noise_without_difference() -> None:
    """λ = 1/(2√k) is rule (29) for ζ = 0 and σ² = 1/16."""
    of = Constants(1.0, 1 / 16, 0.0, 4, 1.0)
    assert theory.largest_threshold(of, 50, 1000) == pytest.approx(paper_threshold(50))


@given(positive, positive)
def test_the_threshold_of_a_precision_bounds_the_error_by_it(precision: float, step: float) -> None:
    kappa = math.sqrt(1000) * precision_threshold(precision, 1000, step)
    assert theory.remark_5(step, kappa) == pytest.approx(precision)


def test_difference_costs_the_square_of_what_noise_costs() -> None:
    """Theorem 7's last term: 1/δ² with ζ ≠ 0, 1/δ without; Theorem 6's does not know ζ."""
    noisy = Constants(1.0, 1.0, 0.0, 4, 1.0)
    apart = Constants(1.0, 0.0, 1.0, 4, 1.0)
    assert theory.theorem_7(noisy, 0.01).c == pytest.approx(10 * theory.theorem_7(noisy, 0.1).c)
    assert theory.theorem_7(apart, 0.01).c == pytest.approx(100 * theory.theorem_7(apart, 0.1).c)
    assert theory.theorem_6(apart, 3.0).c == theory.theorem_6(noisy, 3.0).c == 18.0


@given(known, st.floats(0.001, 10))
def test_compression_never_improves_a_bound(of: Constants, kappa: float) -> None:
    """At any step that all allow, Theorem 8 is the least; Theorem 1 without error is Theorem 6 of one worker."""
    step = 0.5 / max(theory.theorem_7(of, 0.5).q, theory.theorem_6(of, kappa).q)
    dense = theory.theorem_8(of).at(step, 100)
    assert dense <= theory.theorem_6(of, kappa).at(step, 100)
    assert dense <= theory.theorem_7(of, 0.5).at(step, 100)
    alone = replace(of, workers=1, similarity=0.0, similarity_slope=0.0)
    step = 0.4 / theory.theorem_6(alone, 0.0).q
    assert theory.theorem_1(alone, step, 100, 0.0) == pytest.approx(theory.theorem_6(alone, 0.0).at(step, 100))
    assert theory.theorem_1(alone, 1 / alone.smoothness, 100, 0.0) == math.inf


@given(known, st.floats(0.01, 1.0), st.lists(st.floats(0, 100), min_size=1, max_size=50))
def test_no_contraction_exceeds_lemma_13(of: Constants, delta: float, gradients: list[float]) -> None:
    """The recursion it is derived from, with the worst error and the worst workers at every step."""
    step, error, total = 0.1, 0.0, 0.0
    for gradient in gradients:
        own = (of.similarity_slope + 1) * gradient + of.similarity  # mean ‖∇f_i‖², at most
        drawn = step**2 * (of.noise_slope * own + of.noise)
        error = (1 - delta) * ((1 + delta / 2) * error + (1 + 2 / delta) * step**2 * own + drawn)
        total += error
    assert total <= theory.lemma_13(of, step, delta, gradients) * (1 + 1e-9)


@settings(max_examples=50)
@given(known, st.floats(0, 10), st.floats(0.1, 10), st.integers(10, 10**5))
def test_theorem_4_has_the_shape_of_the_lemma_at_its_best_step(
    of: Constants, kappa: float, distance: float, rounds: int
) -> None:
    """The least of the lemma over steps exceeds it by a constant and logarithms of T at most."""
    convexity = 0.1 * of.smoothness
    known = {"kappa": kappa, "convexity": convexity, "distance": distance}
    largest = 1 / (4 * of.smoothness * (1 + 2 * of.noise_slope / of.workers))
    least = min(theory.lemma_15(of, largest * 0.9**power, rounds, **known) for power in range(200))
    assert least <= 100 * (1 + math.log(rounds)) ** 2 * theory.theorem_4(of, rounds, **known)
    assert theory.lemma_15(of, 1.01 * largest, rounds, **known) == math.inf


@given(st.integers(3, 8), st.floats(0, 0.5), st.floats(0, 4), st.integers(0, 99))
def test_the_problem_has_the_constants_it_says(workers: int, slope: float, zeta: float, seed: int) -> None:
    """The mean is ½ Σ h_j x_j², the similarity holds with equality, and no worker is steeper than L."""
    of = experiment("TopK(0.5)", workers=workers, similarity_slope=slope, similarity=zeta, seed=seed)
    x, y = torch.randn(2, NUMEL, generator=torch.Generator().manual_seed(seed))
    problem = Problem(of)
    own = torch.stack([problem.exact(worker, x) for worker in range(workers)])
    assert torch.allclose(own.mean(0), CURVATURE * x, atol=1e-5)
    apart = float((own - CURVATURE * x).square().sum(1).mean())
    assert apart == pytest.approx(slope * float((CURVATURE * x).square().sum()) + zeta, rel=1e-3, abs=1e-3)
    steepest = max(float((problem.exact(w, x) - problem.exact(w, y)).norm() / (x - y).norm()) for w in range(workers))
    assert steepest <= of.constants.smoothness * (1 + 1e-6)


def test_the_noise_has_the_variance_it_says() -> None:
    """M‖∇f_i‖² + σ², over 400 draws of 256 coordinates."""
    problem = Problem(experiment("TopK(0.5)", noise_slope=2.0, noise=3.0))
    x = torch.ones(NUMEL)
    exact = problem.exact(1, x)
    squares = [float((problem.gradient(1, x, step) - exact).square().sum()) for step in range(400)]
    assert sum(squares) / 400 == pytest.approx(2.0 * float(exact.square().sum()) + 3.0, rel=0.02)


def test_a_run_without_noise_and_compression_is_gradient_descent() -> None:
    """x_t = (1 - γh)^t x_0, for the gradients and for the weighted mean; nothing is left over."""
    of = experiment("Identity()", noise=0.0, similarity=0.0, step=0.05, rounds=80)
    found = theory.measure(of)
    steps = torch.arange(of.rounds).double().unsqueeze(1)
    path = of.start * (1 - 0.05 * CURVATURE.double()) ** steps
    weights = (1 - theory.CONVEXITY * 0.05 / 2) ** -(steps + 1)
    mean = (weights * path).sum(0) / weights.sum()
    assert found.gradients == pytest.approx((CURVATURE * path).square().sum(1).tolist(), rel=1e-3)
    assert found.suboptimality == pytest.approx(0.5 * float((CURVATURE * mean.square()).sum()), rel=1e-3)
    assert found.errors == [0.0] * of.rounds
    assert found.density == pytest.approx(1.0)


@pytest.mark.parametrize("similarity", [0.0, 1.0])
def test_the_error_of_random_k_is_known_exactly(similarity: float) -> None:
    """At an optimum: γ²σ²(1-δ)/δ of noise, and γ²ζ²(1-δ)(2-δ)/δ² where workers differ, as a residual grows in time."""
    of = experiment("RandomK(0.125)", start=0.0, similarity=similarity, noise=1.0 - similarity, step=1e-3, rounds=400)
    late = theory.measure(of).errors[100:]
    expected = 1e-6 * (0.875 * 1.875 / 0.125**2 if similarity else 0.875 / 0.125)
    assert sum(late) / len(late) == pytest.approx(expected, rel=0.1)


def test_rows_oracle_and_figure() -> None:
    """Each bound that speaks of a run has a row; a broken one is counted; a tiny recipe can be drawn."""
    alone = replace(experiment("HardThreshold(0.5)", workers=1, similarity=0.0), rounds=20)
    rows = theory.run(alone)
    assert [row["theorem"] for row in rows] == ["Theorem 6", "Theorem 1", "Remark 5", "Remark 5", "Lemma 15"]
    rows += theory.run(replace(alone, sweep="rounds", compressor="TopK(0.5)", method="Top-k"))
    assert [row["theorem"] for row in rows[5:]] == ["Theorem 7", "corollary", "Theorem 1", "Lemma 13"]
    assert theory.oracles(rows)[0]["ok"]
    assert not theory.oracles([*rows, rows[0] | {"measured": 1e9}])[0]["ok"]
    shown = [rows[0] | {"sweep": sweep, "quantity": quantity} for sweep, quantity, *_ in theory.PANELS]
    assert isinstance(theory.draw(shown), Figure)


def test_all_runs_of_a_recipe_differ_and_have_a_panel() -> None:
    """Equal runs would be one; all sweeps but that of M and C are drawn."""
    short, full = theory.cells("short"), theory.cells("full")
    assert len(set(short)) == len(short)
    assert len(full) == 3 * len(short)
    assert {cell.sweep for cell in short} - {sweep for sweep, *_ in theory.PANELS} == {"slopes"}
