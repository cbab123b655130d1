"""Random-k: what is drawn, by what, and what that does to the error."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thresher.compression.base import Compressor, Round
from thresher.compression.error_feedback import ErrorFeedback
from thresher.compression.random_k import RandomK, UnbiasedRandomK
from thresher.protos.errors import ConfigurationError, NonFiniteGradientError
from thresher.protos.seeded import seeded_indices

DRAWS = 2000  # enough to see a coordinate that is preferred by a tenth

BOTH: list[type[RandomK | UnbiasedRandomK]] = [RandomK, UnbiasedRandomK]

each_form = pytest.mark.parametrize("form", BOTH)
each_size = pytest.mark.parametrize(("density", "numel"), [(0.25, 12), (0.5, 7), (0.01, 9), (1.0, 5), (0.1, 100)])
gradients = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30).map(torch.tensor)
integers = st.lists(st.integers(-100, 100), min_size=12, max_size=12).map(lambda values: torch.tensor(values).float())
four_workers = st.lists(integers, min_size=4, max_size=4).map(torch.stack)
densities = st.floats(0.01, 1.0)
rounds = st.builds(Round, step=st.integers(0, 2**40), tensor=st.integers(0, 1000))


def errors(compressor: Compressor, gradient: torch.Tensor) -> torch.Tensor:
    """‖x - C(x)‖² in each of many rounds, [DRAWS] float64."""
    sent = (compressor.compress(gradient, Round(step=step)).densify() for step in range(DRAWS))
    return torch.stack([(gradient - values).double().square().sum() for values in sent])


@given(gradients, densities, rounds)
def test_it_splits_to_the_bit(gradient: torch.Tensor, density: float, at: Round) -> None:
    """As many coordinates as wanted travel untouched, all others are the exact rest: D + e == p."""
    sent = RandomK(density).compress(gradient, at)
    sent.validate()
    assert sent.count == max(1, int(density * gradient.numel()))
    assert torch.equal(sent.values, gradient[sent.indices])
    rest = gradient.clone()
    rest[sent.indices] = 0.0
    assert torch.equal(sent.densify() + rest, gradient)


@given(gradients, densities, rounds)
def test_scaled_form_is_the_same_draw_times_numel_over_k(gradient: torch.Tensor, density: float, at: Round) -> None:
    """The two forms differ in the values, and in nothing else."""
    plain, scaled = (form(density).compress(gradient, at) for form in BOTH)
    assert torch.equal(scaled.indices, plain.indices)
    assert torch.equal(scaled.values, plain.values * (plain.numel / plain.count))


@each_form
@given(gradients=four_workers, k=st.sampled_from([1, 2, 3, 4, 6, 12]), at=rounds)
def test_all_workers_draw_the_same(
    form: type[RandomK | UnbiasedRandomK], gradients: torch.Tensor, k: int, at: Round
) -> None:
    """The message of the mean is the mean of the messages: exact on whole numbers, four workers and whole 12 / k."""
    density = k / 12
    sent = [form(density, seed=7).compress(gradient, at).densify() for gradient in gradients]
    mean = form(density, seed=7).compress(gradients.mean(dim=0), at).densify()
    assert torch.equal(mean, torch.stack(sent).mean(dim=0))


def test_other_steps_tensors_and_seeds_draw_others() -> None:
    """Each part of the key counts: of 36 keys no two draw the same 100 of 1000."""
    drawn = {
        tuple(RandomK(0.1, seed=seed).compress(torch.zeros(1000), Round(step=step, tensor=tensor)).indices.tolist())
        for seed in range(3)
        for step in range(4)
        for tensor in range(3)
    }
    assert len(drawn) == 36


@given(gradients, densities, rounds)
def test_the_message_needs_no_indices(gradient: torch.Tensor, density: float, at: Round) -> None:
    """Its seeds draw exactly its indices again."""
    sent = RandomK(density).compress(gradient, at)
    (seeds,) = sent.seeds
    assert seeds.offset == 0
    assert seeded_indices(seeds.numel, seeds.count, seeds.key).tolist() == sent.indices.tolist()


@each_size
def test_every_coordinate_is_drawn_as_often(density: float, numel: int) -> None:
    """Each with probability k / numel: within five standard deviations of it in many rounds."""
    compressor = RandomK(density)
    drawn = torch.zeros(numel)
    for step in range(DRAWS):
        drawn[compressor.compress(torch.zeros(numel), Round(step=step)).indices] += 1
    p = max(1, int(density * numel)) / numel
    assert float((drawn / DRAWS - p).abs().max()) <= 5 * (p * (1 - p) / DRAWS) ** 0.5


@each_size
def test_delta_holds_with_equality(density: float, numel: int) -> None:
    """E‖x - C(x)‖² = (1 - δ)‖x‖², within five standard errors of the mean over many rounds."""
    gradient = torch.arange(1.0, numel + 1)
    delta = RandomK(density).guarantee.delta
    assert delta is not None
    found = errors(RandomK(density), gradient)
    expected = (1 - delta(numel)) * float(gradient.square().sum())
    assert abs(float(found.mean()) - expected) <= 5 * float(found.std()) / DRAWS**0.5 + 1e-9


@each_size
def test_omega_holds_with_equality(density: float, numel: int) -> None:
    """E‖x - C(x)‖² = ω‖x‖², within five standard errors of the mean over many rounds."""
    gradient = torch.arange(1.0, numel + 1)
    omega = UnbiasedRandomK(density).guarantee.omega
    assert omega is not None
    found = errors(UnbiasedRandomK(density), gradient)
    expected = omega(numel) * float(gradient.square().sum())
    assert abs(float(found.mean()) - expected) <= 5 * float(found.std()) / DRAWS**0.5 + 1e-9


@each_size
def test_scaled_form_is_unbiased(density: float, numel: int) -> None:
    """E C(x) = x, coordinate by coordinate, within five standard deviations of the mean of many rounds."""
    gradient = torch.arange(1.0, numel + 1)
    sent = [UnbiasedRandomK(density).compress(gradient, Round(step=step)).densify() for step in range(DRAWS)]
    p = max(1, int(density * numel)) / numel
    tolerance = 5 * gradient * ((1 - p) / p / DRAWS) ** 0.5
    assert bool(((torch.stack(sent).mean(dim=0) - gradient).abs() <= tolerance + 1e-3).all())


@each_form
@given(steps=st.lists(integers, min_size=1, max_size=5))
def test_it_conserves(form: type[RandomK | UnbiasedRandomK], steps: list[torch.Tensor]) -> None:
    """Law 1, exact on integers (numel / k is 4 here): Σ sent + residual = Σ input."""
    feedback = ErrorFeedback(form(0.25), 12)
    sent = [feedback.compress(gradient, Round(step=step)).densify() for step, gradient in enumerate(steps)]
    assert torch.equal(torch.stack(sent).sum(dim=0) + feedback.residual, torch.stack(steps).sum(dim=0))


@each_form
def test_the_users_generators_are_not_touched(form: type[RandomK | UnbiasedRandomK]) -> None:
    """Its draws come from its key."""
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]  # noqa: NPY002
    form(0.5).compress(torch.ones(100))
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


@each_form
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_gradient_is_refused(form: type[RandomK | UnbiasedRandomK], value: float) -> None:
    """Whether or not it is drawn in this round."""
    gradient = torch.ones(12)
    gradient[4] = value
    for step in range(8):
        with pytest.raises(NonFiniteGradientError, match="at index 4"):
            form(0.25).compress(gradient, Round(step=step))


def test_scaling_beyond_float32_is_refused() -> None:
    """Infinity is not sent for a finite number."""
    with pytest.raises(NonFiniteGradientError):
        UnbiasedRandomK(0.25).compress(torch.full((8,), 3e38))


@each_form
def test_empty_vector_has_an_empty_message(form: type[RandomK | UnbiasedRandomK]) -> None:
    """A vector without elements is no special case, and its bounds are those of nothing lost."""
    assert form(0.5).compress(torch.empty(0)).count == 0
    guarantee = form(0.5).guarantee
    assert (guarantee.delta or (lambda _: 1.0))(0) == 1.0
    assert (guarantee.omega or (lambda _: 0.0))(0) == 0.0


@each_form
@pytest.mark.parametrize("density", [0.0, -1.0, 1.5, float("nan")])
def test_density_outside_its_range_is_refused(form: type[RandomK | UnbiasedRandomK], density: float) -> None:
    """A density is in (0, 1]."""
    with pytest.raises(ConfigurationError, match=r"density must be in \(0, 1\]"):
        form(density)


@each_form
@pytest.mark.parametrize("seed", [-1, 2**64, 0.5, True, "0"])
def test_what_is_no_seed_is_refused(form: type[RandomK | UnbiasedRandomK], seed: int) -> None:
    """A seed is a whole number of at most 64 bits."""
    with pytest.raises(ConfigurationError, match="seed must be a whole number"):
        form(0.5, seed=seed)


@each_form
def test_other_shapes_are_refused(form: type[RandomK | UnbiasedRandomK]) -> None:
    """Only flat float32 vectors are compressed."""
    with pytest.raises(ConfigurationError, match="one-dimensional float32"):
        form(0.5).compress(torch.zeros(2, 2))


def test_description_names_the_settings() -> None:
    """The text other processes compare; a density of 1 is 1.0, whoever computed it."""
    assert RandomK(0.001).describe() == "RandomK(0.001)"
    assert RandomK(1).describe() == "RandomK(1.0)"
    assert UnbiasedRandomK(0.5, seed=3).describe() == "UnbiasedRandomK(0.5, seed=3)"
