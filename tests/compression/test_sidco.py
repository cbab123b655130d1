"""SIDCo: what the fitted threshold keeps, how near that is to what is wanted, and the state behind it."""

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thresher.compression.error_feedback import ErrorFeedback
from thresher.compression.sidco import SIDCo
from thresher.protos.errors import ConfigurationError, NonFiniteGradientError

FITS = ["exponential", "gamma", "pareto"]
NUMEL = 20_000

each_fit = pytest.mark.parametrize("fit", FITS)
floats = st.floats(-1e3, 1e3, width=32) | st.integers(-3, 3).map(float)
gradients = st.lists(floats, min_size=1, max_size=24).map(torch.tensor)
densities = st.floats(0.001, 1.0)


def exponential(generator: torch.Generator) -> torch.Tensor:
    return torch.empty(NUMEL).exponential_(generator=generator)


def gamma(generator: torch.Generator) -> torch.Tensor:
    """Shape 1/2: half the square of a normal number."""
    return torch.randn(NUMEL, generator=generator).square() / 2


def pareto(generator: torch.Generator) -> torch.Tensor:
    """Generalised, with tail index 1/5: ((1 - u)^(-1/5) - 1)/(1/5)."""
    return (torch.rand(NUMEL, generator=generator).neg().add(1).pow(-0.2) - 1) * 5


def normal(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(NUMEL, generator=generator)


def heavy(generator: torch.Generator) -> torch.Tensor:
    """Student's t with 3 degrees of freedom."""
    return torch.randn(NUMEL, generator=generator) / torch.randn(3, NUMEL, generator=generator).square().mean(0).sqrt()


Draw = Callable[[torch.Generator], torch.Tensor]


def densities_of(compressor: SIDCo, draw: Draw, rounds: int) -> list[float]:
    """The density in each of ``rounds`` rounds on fresh draws, in units of the wanted one."""
    generator = torch.Generator().manual_seed(0)
    return [compressor.compress(draw(generator)).density / compressor.density for _ in range(rounds)]


@each_fit
@given(steps=st.lists(gradients, min_size=1, max_size=12), density=densities)
def test_what_is_sent_is_all_above_some_threshold(fit: str, steps: list[torch.Tensor], density: float) -> None:
    """Untouched, and larger than everything that is not sent; so D + e == p, and the largest is always among them."""
    compressor = SIDCo(density, fit)
    for gradient in steps:
        sent = compressor.compress(gradient)
        sent.validate()
        assert torch.equal(sent.values, gradient[sent.indices])
        rest = gradient.clone()
        rest[sent.indices] = 0.0
        assert torch.equal(sent.densify() + rest, gradient)
        if gradient.any():
            assert sent.count >= 1
            assert float(sent.values.abs().min()) > float(rest.abs().max()) or sent.count == gradient.numel()


@each_fit
@given(gradient=gradients, density=densities)
def test_delta_holds(fit: str, gradient: torch.Tensor, density: float) -> None:
    """‖x - C(x)‖² ≤ (1 - 1/numel)‖x‖²: the largest coordinate is sent, however bad the fit."""
    delta = SIDCo(density, fit).guarantee.delta
    assert delta is not None
    error = float((gradient - SIDCo(density, fit).compress(gradient).densify()).double().square().sum())
    energy = float(gradient.double().square().sum())
    assert error <= (1 - delta(gradient.numel())) * energy * (1 + 1e-12)


@each_fit
@given(gradient=gradients, density=densities, power=st.integers(-60, 60))
def test_it_knows_no_unit(fit: str, gradient: torch.Tensor, density: float, power: int) -> None:
    """C(γx) = γC(x), exact for powers of two where float32 is: what it sends doesn't depend on the learning rate."""
    scaled = gradient * 2.0**power
    gradient = scaled / 2.0**power  # without what fell below float32
    assert torch.equal(SIDCo(density, fit).compress(scaled).indices, SIDCo(density, fit).compress(gradient).indices)


@each_fit
@given(st.lists(st.lists(st.integers(-4, 4), min_size=8, max_size=8), min_size=1, max_size=8))
def test_it_conserves(fit: str, steps: list[list[int]]) -> None:
    """Law 1, exact on integers: Σ sent + residual = Σ input."""
    feedback = ErrorFeedback(SIDCo(0.2, fit), 8)
    inputs = torch.tensor(steps).float()
    sent = torch.stack([feedback.compress(gradient).densify() for gradient in inputs])
    assert torch.equal(sent.sum(dim=0) + feedback.residual, inputs.sum(dim=0))


@pytest.mark.parametrize(("fit", "draw"), [("exponential", exponential), ("gamma", gamma), ("pareto", pareto)])
@pytest.mark.parametrize("density", [0.1, 0.01])
def test_one_fit_of_its_own_distribution_is_enough(fit: str, draw: Draw, density: float) -> None:
    """The first five rounds, of one stage, already have the wanted density, within 15 %."""
    rounds = densities_of(SIDCo(density, fit), draw, 5)
    assert sum(rounds) / 5 == pytest.approx(1.0, rel=0.15)


@each_fit
@pytest.mark.parametrize("draw", [exponential, gamma, pareto, normal, heavy])
def test_stages_bring_the_density_to_what_is_wanted(fit: str, draw: Draw) -> None:
    """Light tails or heavy, whatever is fitted: after some rounds within a third of the wanted density."""
    rounds = densities_of(SIDCo(0.005, fit), draw, 45)
    assert 0.67 <= sum(rounds[-20:]) / 20 <= 1.33


@pytest.mark.parametrize(("draw", "sends_too_much"), [(heavy, True), (normal, False)])
def test_a_bad_fit_gets_a_stage_more_every_five_rounds(draw: Draw, sends_too_much: bool) -> None:
    """Whichever way it is off: too much is sent of heavy tails, too little of light ones, by one exponential."""
    compressor = SIDCo(0.001)
    generator = torch.Generator().manual_seed(0)
    seen = []
    for _ in range(10):
        seen.append(compressor.stages)
        sent = compressor.compress(draw(generator))
        if compressor.stages == 1:
            assert (sent.density > 0.001) == sends_too_much
    assert seen == [1] * 5 + [2] * 5
    assert compressor.stages == 3


def test_a_step_that_leads_away_is_taken_back() -> None:
    """With 2 stages too much is sent and with 4 too little, and both are farther off than with 3."""
    compressor = SIDCo(0.005)
    generator = torch.Generator().manual_seed(0)
    seen = []
    for _ in range(8):
        seen.append(compressor.stages)
        for _ in range(5):
            compressor.compress(heavy(generator))
    assert seen == [1, 2, 3, 4, 3, 2, 3, 4]


@given(st.lists(gradients, min_size=5, max_size=25), st.floats(0.05, 1.0))
def test_there_are_never_more_stages_than_halvings(steps: list[torch.Tensor], density: float) -> None:
    """1 ≤ stages ≤ ⌈log₂(1/density)⌉, and a single one where the first alone aims below the density."""
    compressor = SIDCo(density, "pareto")
    for gradient in steps:
        compressor.compress(gradient)
        assert 1 <= compressor.stages <= (math.ceil(math.log2(1 / density)) if density < 0.25 else 1)


@each_fit
@pytest.mark.parametrize("value", [-2.0, 1e-45, 3e38])
@pytest.mark.parametrize("numel", [1, 7])
def test_equal_magnitudes_are_all_sent(fit: str, value: float, numel: int) -> None:
    """Nothing is above the others, and a tensor of one element, such as a bias, is not held back for ever."""
    compressor = SIDCo(0.01, fit)
    for _ in range(12):
        assert compressor.compress(torch.full((numel,), value)).count == numel


@each_fit
@pytest.mark.parametrize("numel", [0, 5])
def test_of_nothing_nothing_is_sent_and_nothing_learned(fit: str, numel: int) -> None:
    """Neither a vector without elements nor zeros say anything about the fit."""
    compressor = SIDCo(0.01, fit)
    before = compressor.state_dict()
    for _ in range(6):
        sent = compressor.compress(torch.zeros(numel))
        assert (sent.count, sent.numel) == (0, numel)
    assert compressor.state_dict() == before


@each_fit
def test_state_goes_on_bit_for_bit(fit: str) -> None:
    """Through torch.save and a loader that runs no code, in the middle of a window."""
    generator = torch.Generator().manual_seed(1)
    steps = [heavy(generator) for _ in range(40)]
    compressor, resumed = SIDCo(0.002, fit), SIDCo(0.002, fit)
    for gradient in steps[:13]:
        compressor.compress(gradient)
    file = io.BytesIO()
    torch.save(compressor.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed == compressor
    for gradient in steps[13:]:
        assert resumed.compress(gradient).equals(compressor.compress(gradient))
    assert resumed.state_dict() == compressor.state_dict()


@pytest.mark.parametrize(
    "wrong",
    [
        {"stages": 0},
        {"stages": 8},
        {"stages": 1.0},
        {"rounds": 5},
        {"rounds": -1},
        {"measured": -1.0},
        {"measured": float("nan")},
        {"direction": 2},
        {"off": -1.0},
        {"off": None},
    ],
)
def test_what_is_no_state_is_refused(wrong: dict[str, Any]) -> None:
    """The part that is wrong is named, and nothing has changed."""
    compressor = SIDCo(0.01)
    compressor.compress(torch.randn(100, generator=torch.Generator().manual_seed(0)))
    before = compressor.state_dict()
    with pytest.raises(ConfigurationError, match=rf"not a state of SIDCo\(0.01\): {next(iter(wrong))} is"):
        compressor.load_state_dict(before | wrong)
    assert compressor.state_dict() == before


def test_state_of_another_method_is_refused() -> None:
    """Both are named."""
    with pytest.raises(ConfigurationError, match=r"belongs to SIDCo\(0.1\), this is SIDCo\(0.01\)"):
        SIDCo(0.01).load_state_dict(SIDCo(0.1).state_dict())


@each_fit
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_gradient_is_refused(fit: str, value: float) -> None:
    """There is no fit to it, and the state has not seen it."""
    compressor = SIDCo(0.01, fit)
    before = compressor.state_dict()
    with pytest.raises(NonFiniteGradientError, match="at index 1"):
        compressor.compress(torch.tensor([0.0, value]))
    assert compressor.state_dict() == before


def test_it_leaves_its_input_and_the_users_generator_alone() -> None:
    """The input is not modified, the message shares no memory with it, and nothing is drawn."""
    gradient = torch.linspace(-1.0, 1.0, 50)
    before, state = gradient.clone(), torch.get_rng_state()
    SIDCo(0.5).compress(gradient).values.fill_(9.0)
    assert torch.equal(gradient, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("density", [0.0, -1.0, 1.5, float("nan")])
def test_density_outside_its_range_is_refused(density: float) -> None:
    """A density is in (0, 1]."""
    with pytest.raises(ConfigurationError, match=r"density must be in \(0, 1\]"):
        SIDCo(density)


def test_unknown_fit_is_refused() -> None:
    """The message says which there are."""
    with pytest.raises(ConfigurationError, match="no fit 'normal'; there are 'exponential', 'gamma', 'pareto'"):
        SIDCo(0.01, "normal")


def test_other_shapes_are_refused() -> None:
    """Only flat float32 vectors are compressed."""
    with pytest.raises(ConfigurationError, match="one-dimensional float32"):
        SIDCo(0.5).compress(torch.zeros(2, 2))


def test_description_names_the_settings() -> None:
    """The text other processes compare, without the state."""
    compressor = SIDCo(1, fit="gamma")
    compressor.compress(torch.ones(3))
    assert compressor.describe() == "SIDCo(1.0, fit='gamma')"
    assert SIDCo(0.001).describe() == "SIDCo(0.001)"
