"""QSGD: levels of the norm, unbiased, with the variance of its lemma."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thresher.compression.base import Round
from thresher.compression.qsgd import QSGD
from thresher.protos.errors import ConfigurationError, NonFiniteGradientError

coordinates = st.floats(-1e3, 1e3, width=32, allow_subnormal=False)
vectors = st.lists(coordinates, min_size=1, max_size=12).map(torch.tensor)
methods = st.builds(QSGD, levels=st.integers(1, 127), seed=st.integers(0, 9), bucket=st.none() | st.integers(1, 15))
rounds = st.builds(Round, step=st.integers(0, 1000), tensor=st.integers(0, 9))


def buckets_of(method: QSGD, vector: torch.Tensor) -> list[torch.Tensor]:
    length = method.bucket or vector.numel()
    return [vector[begin : begin + length] for begin in range(0, vector.numel(), length)]


@given(vectors, methods, rounds)
def test_each_coordinate_goes_to_a_neighbouring_level(gradient: torch.Tensor, method: QSGD, at: Round) -> None:
    """Off by less than a step of its own bucket's norm, never more than s levels, and zero levels are not sent."""
    sent = method.compress(gradient, at)
    sent.validate()
    for bucket, values in zip(buckets_of(method, gradient), buckets_of(method, sent.densify().double()), strict=True):
        step = float(bucket.double().norm()) / method.levels * (1 + 1e-6)
        assert ((values - bucket.double()).abs() <= step).all()
        assert ((values * bucket.double()) >= 0).all()
    assert (sent.values != 0).all()
    assert sent.levels is not None
    assert (sent.levels.codes.abs().int() <= method.levels).all()


@given(vectors, methods, rounds)
def test_values_are_scale_times_code_to_the_bit(gradient: torch.Tensor, method: QSGD, at: Round) -> None:
    """What the wire sends instead of the values makes the same values, block by block."""
    sent = method.compress(gradient, at)
    assert sent.levels is not None
    begins = torch.cat([torch.zeros(1, dtype=torch.int64), sent.levels.ends])
    sizes = begins.diff()
    assert (sizes > 0).all()
    assert int(begins[-1]) == sent.count
    scales = sent.levels.scales.repeat_interleave(sizes)
    assert torch.equal(scales * sent.levels.codes.float(), sent.values)


@given(vectors, methods)
def test_declared_bounds_hold_on_average(gradient: torch.Tensor, method: QSGD) -> None:
    """E‖x - C(x)‖² ≤ ω‖x‖² and ≤ (1 - δ)‖x‖², by summing the variance of each coordinate's draw."""
    omega, delta = method.guarantee.omega, method.guarantee.delta
    assert omega is not None
    variance = 0.0
    for bucket in buckets_of(method, gradient.double()):
        step = float(bucket.norm()) / method.levels
        shares = (bucket.abs() / step).frac() if step else torch.zeros_like(bucket)
        variance += float((step**2 * shares * (1 - shares)).sum())
    energy = float(gradient.double().square().sum()) * (1 + 1e-6)
    assert variance <= omega(gradient.numel()) * energy
    if delta is not None:
        assert variance <= (1 - delta(gradient.numel())) * energy


@pytest.mark.parametrize("method", [QSGD(levels=1), QSGD(levels=4, seed=3), QSGD(levels=2, bucket=3)])
def test_mean_and_variance_over_steps(method: QSGD) -> None:
    """With its own draws, over 4000 rounds: the mean within five standard errors, the error within ω."""
    gradient, repeats = torch.tensor([0.3, -0.8, 0.05, 1.0, -2.45, 0.0, 0.7]), 4000
    omega = method.guarantee.omega
    assert omega is not None
    sent = torch.stack([method.compress(gradient, Round(step)).densify() for step in range(repeats)]).double()
    step_size = float(gradient.norm()) / method.levels
    assert ((sent.mean(dim=0) - gradient).abs() <= 5 * step_size / 2 / math.sqrt(repeats)).all()
    error = float((sent - gradient).square().sum(dim=1).mean())
    assert error <= omega(7) * float(gradient.square().sum())


def test_omega_is_that_of_the_lemma() -> None:
    """min(d / s², √d / s), with the bucket in place of d; δ only where that stays below 1."""
    whole, bucketed, coarse = QSGD(levels=4).guarantee, QSGD(levels=4, bucket=4).guarantee, QSGD(1, bucket=4).guarantee
    assert whole.omega is not None
    assert [whole.omega(numel) for numel in (0, 4, 16, 64)] == [0.0, 0.25, 1.0, 2.0]
    assert whole.delta is None
    assert bucketed.omega is not None
    assert [bucketed.omega(numel) for numel in (2, 4, 10**9)] == [0.125, 0.25, 0.25]
    assert bucketed.delta is not None
    assert [bucketed.delta(numel) for numel in (2, 4, 10**9)] == [0.875, 0.75, 0.75]
    assert coarse.delta is None


@given(vectors, methods, st.integers(-6, 6).map(lambda exponent: 2.0**exponent), rounds)
def test_a_multiple_has_the_multiple_of_the_message(
    gradient: torch.Tensor, method: QSGD, factor: float, at: Round
) -> None:
    """C(γx) = γC(x): the norm carries the unit, so a scale changes nothing."""
    multiple = method.compress(gradient * factor, Round(at.step, at.tensor, scale=factor))
    assert torch.equal(multiple.densify(), method.compress(gradient, at).densify() * factor)


def test_buckets_are_independent_of_each_other() -> None:
    """A large coordinate coarsens the levels of its bucket alone; a bucket of zeros sends nothing."""
    sent = QSGD(levels=1, bucket=2).compress(torch.tensor([1e6, 0.0, 0.0, 0.0, 0.0, -3.0]))
    assert sent.indices.tolist() == [0, 5]
    assert sent.values.tolist() == [1e6, -3.0]
    assert sent.levels is not None
    assert sent.levels.ends.tolist() == [1, 2]


def test_draws_belong_to_seed_step_and_tensor() -> None:
    """Equal for equal ones, others for any other."""
    gradient = torch.full((64,), 0.5)
    sent = QSGD(4).compress(gradient, Round(3, 4))
    assert sent.equals(QSGD(4).compress(gradient, Round(3, 4)))
    for seed, at in [(1, Round(3, 4)), (0, Round(4, 4)), (0, Round(3, 5))]:
        assert not sent.equals(QSGD(4, seed=seed).compress(gradient, at))


def test_norm_beyond_float32_is_refused() -> None:
    """Each coordinate is finite, their norm is not."""
    with pytest.raises(NonFiniteGradientError, match=r"norm of block 1 \(2 coordinates each\) is beyond float32"):
        QSGD(bucket=2).compress(torch.tensor([1.0, 1.0, 3e38, 3e38]))


@pytest.mark.parametrize("levels", [0, 128, -1, 1.5, float("nan")])
def test_levels_outside_an_int8_are_refused(levels: int) -> None:
    """1 … 127."""
    with pytest.raises(ConfigurationError, match="levels must be a whole number, from 1 to 127"):
        QSGD(levels=levels)


@pytest.mark.parametrize("bucket", [0, -1, 1.5, float("inf")])
def test_impossible_buckets_are_refused(bucket: int) -> None:
    """At least one coordinate, or None for all."""
    with pytest.raises(ConfigurationError, match="bucket must be a whole number, at least 1"):
        QSGD(bucket=bucket)


def test_impossible_seed_is_refused() -> None:
    """A seed is not negative."""
    with pytest.raises(ConfigurationError, match="seed must be a whole number, at least 0"):
        QSGD(seed=-1)


def test_description_names_what_differs_from_the_defaults() -> None:
    """Also for numbers that a description wrote as 2**4."""
    assert QSGD().describe() == "QSGD()"
    assert QSGD(levels=2.0**4, bucket=512.0).describe() == "QSGD(levels=16, bucket=512)"  # type: ignore[arg-type]
    assert QSGD(seed=7).describe() == "QSGD(seed=7)"
