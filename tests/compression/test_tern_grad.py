"""TernGrad: three values, unbiased after clipping."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thresher.compression.base import Round
from thresher.compression.tern_grad import TernGrad
from thresher.protos.errors import ConfigurationError

coordinates = st.floats(-1e3, 1e3, width=32, allow_subnormal=False)
vectors = st.lists(coordinates, min_size=1, max_size=12).map(torch.tensor)
clips = st.none() | st.floats(0.1, 5.0)
rounds = st.builds(Round, step=st.integers(0, 1000), tensor=st.integers(0, 9))


def clipped(vector: torch.Tensor, clip: float | None) -> torch.Tensor:
    limit = math.inf if clip is None else clip * float(vector.double().square().mean().sqrt())
    return vector.clamp(-limit, limit)


@given(vectors, clips, rounds)
def test_values_have_one_magnitude_and_the_signs_of_the_gradient(
    gradient: torch.Tensor, clip: float | None, at: Round
) -> None:
    """±s with s the largest magnitude after clipping; the largest coordinate is always sent, zeros never."""
    sent = TernGrad(clip).compress(gradient, at)
    sent.validate()
    inside = clipped(gradient, clip)
    assert torch.equal(sent.values, inside.abs().max() * gradient[sent.indices].sign())
    assert (gradient[sent.indices] != 0).all()
    if gradient.any():
        assert int(inside.abs().argmax()) in sent.indices.tolist()


@given(vectors)
def test_declared_omega_holds_on_average(gradient: torch.Tensor) -> None:
    """E‖x - C(x)‖² = Σ (s|x_j| - x_j²) ≤ ω‖x‖², the variance of each coordinate's draw summed up."""
    omega = TernGrad(clip=None).guarantee.omega
    assert omega is not None
    magnitude = gradient.double().abs()
    variance = float((magnitude.max() * magnitude - magnitude.square()).sum())
    assert variance <= omega(gradient.numel()) * float(magnitude.square().sum()) * (1 + 1e-12)


@pytest.mark.parametrize("numel", [1, 2, 9, 10_000])
def test_omega_is_reached(numel: int) -> None:
    """By one coordinate 1 and all others 1 / (1 + √d): the bound is the least there is."""
    omega = TernGrad(clip=None).guarantee.omega
    assert omega is not None
    worst = torch.full((numel,), 1 / (1 + math.sqrt(numel)), dtype=torch.float64)
    worst[0] = 1.0
    variance = float((worst - worst.square()).sum())
    assert math.isclose(variance, omega(numel) * float(worst.square().sum()), rel_tol=1e-9, abs_tol=1e-12)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_mean_over_steps_is_the_clipped_gradient(clip: float | None) -> None:
    """With its own draws, over 4000 rounds, within five standard errors of at most s / (2 √4000)."""
    gradient, repeats = torch.tensor([0.3, -0.8, 0.05, 1.0, -2.45, 0.0]), 4000
    inside = clipped(gradient, clip)
    total = sum((TernGrad(clip).compress(gradient, Round(step)).densify() for step in range(repeats)), torch.zeros(6))
    limit = 5 * float(inside.abs().max()) / 2 / math.sqrt(repeats)
    assert ((total / repeats - inside).abs() <= limit).all()


def test_clipping_is_on_by_default_and_declares_no_bound() -> None:
    """What it clips off is a bias that no bound on the variance covers."""
    assert TernGrad().guarantee.omega is None
    assert TernGrad().guarantee.delta is None
    outlier = torch.full((100,), 0.01)
    outlier[7] = 1.0
    largest = float(TernGrad().compress(outlier).values.abs().max())
    assert math.isclose(largest, 2.5 * math.sqrt((99 * 0.01**2 + 1) / 100), rel_tol=1e-6)


@pytest.mark.parametrize("gradient", [[5.0], [1.0, 1.01], [-3.0, -3.0, -3.0]])
def test_coordinates_that_are_alike_are_not_clipped_away(gradient: list[float]) -> None:
    """Deviations are taken about zero, so a bias tensor of one element is sent as it is."""
    assert float(TernGrad().compress(torch.tensor(gradient)).values.abs().max()) == float(
        torch.tensor(gradient).abs().max()
    )


@given(vectors, clips, st.integers(-6, 6).map(lambda exponent: 2.0**exponent), rounds)
def test_a_multiple_has_the_multiple_of_the_message(
    gradient: torch.Tensor, clip: float | None, factor: float, at: Round
) -> None:
    """C(γx) = γC(x): the largest magnitude carries the unit, so a scale changes nothing."""
    multiple = TernGrad(clip).compress(gradient * factor, Round(at.step, at.tensor, scale=factor))
    assert torch.equal(multiple.densify(), TernGrad(clip).compress(gradient, at).densify() * factor)


def test_draws_belong_to_seed_step_and_tensor() -> None:
    """Equal for equal ones, others for any other."""
    gradient = torch.linspace(-1.0, 1.0, 64)
    sent = TernGrad().compress(gradient, Round(3, 4))
    assert sent.equals(TernGrad().compress(gradient, Round(3, 4)))
    for seed, at in [(1, Round(3, 4)), (0, Round(4, 4)), (0, Round(3, 5))]:
        assert not sent.equals(TernGrad(seed=seed).compress(gradient, at))


@pytest.mark.parametrize("clip", [0.0, -2.5, float("nan"), float("inf")])
def test_impossible_clips_are_refused(clip: float) -> None:
    """A finite number above 0; None is the way to say never."""
    with pytest.raises(ConfigurationError, match="clip must be a finite number above 0, or None"):
        TernGrad(clip=clip)


def test_impossible_seed_is_refused() -> None:
    """A seed is not negative."""
    with pytest.raises(ConfigurationError, match="seed must be a whole number, at least 0"):
        TernGrad(seed=-1)


def test_description_names_what_differs_from_the_defaults() -> None:
    """And is the same for 3 and 3.0."""
    assert TernGrad(2.5).describe() == "TernGrad()"
    assert TernGrad(clip=3, seed=1).describe() == "TernGrad(clip=3.0, seed=1)"
    assert TernGrad(clip=None).describe() == "TernGrad(clip=None)"
