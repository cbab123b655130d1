"""Stochastic rounding: on the grid, off by less than a step, and right on average."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thresher.compression.base import Round, check_whole
from thresher.compression.stochastic_rounding import (
    StochasticRounding,
    draws_for,
    nonzeros,
    rounded_at_random,
)
from thresher.protos.errors import ConfigurationError
from thresher.protos.seeded import key_of, seeded_indices, uniforms

vectors = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=12).map(torch.tensor)
powers_of_two = st.integers(-12, 12).map(lambda exponent: 2.0**exponent)
steps = st.floats(1e-3, 1e3)
rounds = st.builds(Round, step=st.integers(0, 1000), tensor=st.integers(0, 9))


@given(vectors, powers_of_two, rounds)
def test_on_the_grid_and_off_by_less_than_a_step(gradient: torch.Tensor, step_size: float, at: Round) -> None:
    """For a power of two, every sent value is a multiple of it, and every error is below it."""
    sent = StochasticRounding(step_size).compress(gradient, at).densify().double()
    assert torch.equal((sent / step_size).round() * step_size, sent)
    assert ((sent - gradient.double()).abs() < step_size).all()


@given(st.lists(st.integers(-100, 100), min_size=1, max_size=10), powers_of_two)
def test_unbiased_by_enumeration(sixteenths: list[int], step_size: float) -> None:
    """Exactly: over all draws of four bits, the mean of a multiple of a sixteenth of a step is that multiple."""
    vector = torch.tensor(sixteenths) / 16 * step_size
    rounded = [rounded_at_random(vector, step_size, torch.full_like(vector, draw / 16)) for draw in range(16)]
    assert torch.equal(torch.stack(rounded).double().mean(dim=0), vector.double())


@given(st.floats(0.0, 2.0**30, width=32), steps)
def test_mean_is_the_coordinate_whatever_the_grid(coordinate: float, step_size: float) -> None:
    """Where float32 moves the grid's points too: the draw's share of the gap is the coordinate's place in it.

    The neighbours are those for the least and the largest draw, and the error's mean square is at most ε².
    """
    vector = torch.tensor([coordinate])
    below = rounded_at_random(vector, step_size, torch.tensor([1 - 2.0**-24]))
    above = rounded_at_random(vector, step_size, torch.zeros(1))
    low, high = float(below), float(above)
    assert low <= coordinate <= high
    share = 0.0 if low == high else (coordinate - low) / (high - low)
    for draw in (share * 0.999, min(share * 1.001 + 1e-9, 1 - 2.0**-24)):
        chosen = rounded_at_random(vector, step_size, torch.tensor([draw]))
        assert float(chosen) == (high if float(torch.tensor(draw)) < share else low)
    assert (coordinate - low) * (high - coordinate) <= step_size**2


def test_mean_over_steps_is_the_gradient() -> None:
    """With its own draws: the mean of 4000 rounds is within five standard errors, each below ε / (2 √4000)."""
    gradient, step_size = torch.tensor([0.3, -0.8, 0.05, 1.0, -2.45]), 0.5
    total = sum(
        (StochasticRounding(step_size).compress(gradient, Round(step)).densify() for step in range(4000)),
        torch.zeros(5),
    )
    assert ((total / 4000 - gradient).abs() <= 5 * step_size / 2 / math.sqrt(4000)).all()
    assert float(total[3]) == 4000.0


@given(vectors, steps)
def test_declared_kappa_holds_on_average(gradient: torch.Tensor, step_size: float) -> None:
    """E‖x - C(x)‖² ≤ κ², from both neighbours of each coordinate and their probabilities."""
    kappa = StochasticRounding(step_size).guarantee.kappa
    assert kappa is not None
    lowest, highest = (
        rounded_at_random(gradient, step_size, torch.full_like(gradient, draw)).double() for draw in (1 - 2.0**-24, 0.0)
    )
    variance = (gradient.double() - lowest) * (highest - gradient.double())
    assert float(variance.sum()) <= kappa(gradient.numel()) ** 2


@given(vectors, powers_of_two, st.integers(-6, 6).map(lambda exponent: 2.0**exponent), rounds)
def test_scale_law(gradient: torch.Tensor, step_size: float, scale: float, at: Round) -> None:
    """C_γ(x) = γ · C(x / γ), exact for powers of two (Algorithm 1 of arXiv:2108.00951)."""
    method = StochasticRounding(step_size)
    scaled = method.compress(gradient * scale, Round(at.step, at.tensor, scale=scale)).densify()
    assert torch.equal(scaled, method.compress(gradient, at).densify() * scale)


@given(vectors, steps)
def test_what_float32_cannot_round_stays(gradient: torch.Tensor, step_size: float) -> None:
    """A coordinate of 2²⁵ steps and more has no neighbour on the grid that is not itself."""
    large = gradient + torch.copysign(torch.tensor(step_size * 2.0**26), gradient)
    assert torch.equal(StochasticRounding(step_size).compress(large).densify(), large)


def test_extremes_of_float32_stay_finite() -> None:
    """The largest number on the finest and the coarsest grid, and the smallest one."""
    extremes = torch.tensor([torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max, 1e-45])
    for step_size in (2.0**-126, 1.0, 2.0**102):
        sent = StochasticRounding(step_size).compress(extremes).densify()
        assert torch.equal(sent[:2], extremes[:2])


def test_draws_belong_to_seed_step_and_tensor() -> None:
    """Equal for equal ones, others for any other, and never those by which a sparsifier chooses."""
    gradient = torch.full((64,), 0.5)
    sent = StochasticRounding(1.0).compress(gradient, Round(3, 4))
    assert sent.equals(StochasticRounding(1.0).compress(gradient, Round(3, 4)))
    others = [(1, Round(3, 4)), (0, Round(4, 4)), (0, Round(3, 5)), (0, Round(4, 3))]
    for seed, at in others:
        assert not sent.equals(StochasticRounding(1.0, seed=seed).compress(gradient, at))
    draws = draws_for(gradient, 0, Round(3, 4))
    assert not torch.equal(draws, torch.from_numpy(uniforms(key_of(0, 3, 4), 64)))


def test_rounding_does_not_follow_the_choice_of_a_seeded_sparsifier() -> None:
    """Same seed, step and tensor: a chosen first coordinate rounds up as often as not, within five deviations."""
    chosen = [step for step in range(4000) if 0 in seeded_indices(16, 8, key_of(0, step, 0))]
    method = StochasticRounding(1.0)
    ups = sum(method.compress(torch.tensor([0.5]), Round(step)).count for step in chosen)
    assert abs(ups - len(chosen) / 2) <= 5 * math.sqrt(len(chosen)) / 2


def test_long_vectors_are_rounded_piece_by_piece() -> None:
    """Each coordinate as it would be alone, with its own step and its own draw, across the ends of the pieces."""
    vector, draws = torch.linspace(-9.0, 9.0, 100_001), torch.linspace(0.0, 0.999, 100_001)
    steps = torch.linspace(0.1, 1.0, 100_001)
    rounded = rounded_at_random(vector, steps, draws)
    for j in (0, 1, 32_767, 32_768, 65_535, 65_536, 70_000, 100_000):
        alone = rounded_at_random(vector[j : j + 1], steps[j : j + 1], draws[j : j + 1])
        assert float(rounded[j]) == float(alone)
    assert ((rounded - vector).abs() <= steps * (1 + 1e-6)).all()


@given(vectors)
def test_nonzeros_keeps_all_but_zeros(values: torch.Tensor) -> None:
    """The message is the vector, and none of its values is zero."""
    sent = nonzeros(values)
    sent.validate()
    assert torch.equal(sent.densify().abs(), values.abs())
    assert (sent.values != 0).all()


@pytest.mark.parametrize("step_size", [0.0, -1.0, float("nan"), float("inf"), 1e-40, 1e31])
def test_impossible_steps_are_refused(step_size: float) -> None:
    """Positive, and where float32 has room for multiples."""
    with pytest.raises(ConfigurationError, match=r"step_size must be a number from 2\*\*-126 to 2\*\*102"):
        StochasticRounding(step_size)


def test_scale_that_takes_the_step_out_of_range_is_refused() -> None:
    """The product is checked in each round."""
    with pytest.raises(ConfigurationError, match="step_size times scale"):
        StochasticRounding(2.0**-100).compress(torch.ones(1), Round(scale=2.0**-100))


@pytest.mark.parametrize("seed", [-1, 0.5, float("nan")])
def test_impossible_seeds_are_refused(seed: float) -> None:
    """A seed is a whole number that is not negative."""
    with pytest.raises(ConfigurationError, match="seed must be a whole number, at least 0"):
        StochasticRounding(1.0, seed=seed)  # type: ignore[arg-type]


@given(st.integers(-10, 10), st.integers(-10, 0), st.integers(0, 10))
def test_check_whole_lets_exactly_the_range_pass(value: int, least: int, most: int) -> None:
    """Both ends included, also for a number written as 2.0."""
    if least <= value <= most:
        assert check_whole("count", float(value), least=least, most=most) == value
        return
    with pytest.raises(ConfigurationError, match=rf"count must be a whole number, from {least} to {most}, not"):
        check_whole("count", value, least=least, most=most)


def test_description_names_what_differs_from_the_defaults() -> None:
    """And is the same whether numbers were written as integers or not."""
    assert StochasticRounding(1).describe() == StochasticRounding(1.0).describe() == "StochasticRounding(1.0)"
    texts = [StochasticRounding(0.5, seed=seed).describe() for seed in range(3)]
    assert texts == ["StochasticRounding(0.5)", "StochasticRounding(0.5, seed=1)", "StochasticRounding(0.5, seed=2)"]
    assert all(first != second for first, second in pairwise(texts))


def test_workers_draw_independently() -> None:
    """In one round two workers round the same vector differently, each as it would again."""
    vector, compressor = torch.full((64,), 0.5), StochasticRounding(1.0)
    one, other = (compressor.compress(vector, Round(3, worker=worker)) for worker in (0, 1))
    assert not one.equals(other)
    assert one.equals(compressor.compress(vector, Round(3, worker=0)))
