"""Random blocks: where they lie, how often, and what that does to the error."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thresher.compression.base import Round
from thresher.compression.error_feedback import ErrorFeedback
from thresher.compression.random_block import RandomBlock, RandomBlocks
from thresher.protos.errors import ConfigurationError, NonFiniteGradientError

Block = RandomBlock | RandomBlocks

each_form = pytest.mark.parametrize("form", [RandomBlock, RandomBlocks])
gradients = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30).map(torch.tensor)
integers = st.lists(st.integers(-100, 100), min_size=12, max_size=12).map(lambda values: torch.tensor(values).float())
four_workers = st.lists(integers, min_size=4, max_size=4).map(torch.stack)
densities = st.floats(0.01, 1.0)
rounds = st.builds(Round, step=st.integers(0, 2**40), tensor=st.integers(0, 1000))


def supports(compressor: Block, numel: int, draws: int = 500) -> list[tuple[int, ...]]:
    """What is kept in each of many rounds."""
    zeros = torch.zeros(numel)
    return [tuple(compressor.compress(zeros, Round(step=step)).indices.tolist()) for step in range(draws)]


def mean_error(gradient: torch.Tensor, choices: set[tuple[int, ...]]) -> float:
    """The mean over all choices of what is not kept of ‖x‖²; exact for small whole numbers."""
    squares = gradient.double().square()
    return sum(float(squares.sum() - squares[list(choice)].sum()) for choice in choices) / len(choices)


@given(gradients, densities, rounds)
def test_block_is_one_run_around_the_end(gradient: torch.Tensor, density: float, at: Round) -> None:
    """Of max(1, ⌊density · numel⌋) neighbours, the first coordinate being that after the last."""
    numel, length = gradient.numel(), max(1, int(density * gradient.numel()))
    kept = set(RandomBlock(density).compress(gradient, at).indices.tolist())
    runs = [{(begin + i) % numel for i in range(length)} for begin in range(numel)]
    assert kept in runs


@given(gradients, densities, st.integers(1, 40), rounds)
def test_blocks_are_nearly_equal_parts(gradient: torch.Tensor, density: float, blocks: int, at: Round) -> None:
    """Whole parts of the cut at ⌊i · numel / blocks⌋ are kept, max(1, ⌊density · blocks⌋) of them."""
    numel, blocks = gradient.numel(), min(blocks, gradient.numel())
    cut = [set(range(i * numel // blocks, (i + 1) * numel // blocks)) for i in range(blocks)]
    sent = RandomBlocks(density, blocks=blocks).compress(gradient, at)
    sent.validate()
    kept = set(sent.indices.tolist())
    whole = [part for part in cut if part & kept]
    assert kept == set().union(*whole)
    assert len(whole) == max(1, int(density * blocks))


@each_form
@given(gradient=gradients, density=densities, at=rounds)
def test_it_splits_to_the_bit(form: type[Block], gradient: torch.Tensor, density: float, at: Round) -> None:
    """What is kept travels untouched in a copy, all else is the exact rest: D + e == p."""
    sent = form(density).compress(gradient, at)
    sent.validate()
    assert torch.equal(sent.values, gradient[sent.indices])
    rest = gradient.clone()
    rest[sent.indices] = 0.0
    assert torch.equal(sent.densify() + rest, gradient)
    before = gradient.clone()
    sent.values.fill_(5.0)
    assert torch.equal(gradient, before)


@each_form
@given(gradients=four_workers, density=densities, at=rounds)
def test_all_workers_draw_the_same(form: type[Block], gradients: torch.Tensor, density: float, at: Round) -> None:
    """The message of the mean is the mean of the messages: exact on whole numbers and four workers."""
    sent = [form(density, seed=7).compress(gradient, at).densify() for gradient in gradients]
    mean = form(density, seed=7).compress(gradients.mean(dim=0), at).densify()
    assert torch.equal(mean, torch.stack(sent).mean(dim=0))


@each_form
def test_other_steps_tensors_and_seeds_draw_others(form: type[Block]) -> None:
    """Each part of the key counts: 27 keys draw more than 20 different sets from hundreds."""
    drawn = {
        tuple(form(0.01, seed=seed).compress(torch.zeros(1000), Round(step=step, tensor=tensor)).indices.tolist())
        for seed in range(3)
        for step in range(3)
        for tensor in range(3)
    }
    assert len(drawn) > 20


@pytest.mark.parametrize(("density", "numel"), [(0.25, 8), (0.4, 5), (0.01, 3), (1.0, 4), (0.9, 10)])
def test_delta_of_one_block_holds_with_equality(density: float, numel: int) -> None:
    """Over all starts the mean error is (1 - δ)‖x‖², exactly: so the run around the end favours no coordinate."""
    drawn = set(supports(RandomBlock(density), numel))
    assert len(drawn) == (1 if density == 1.0 else numel)
    gradient = torch.arange(1.0, numel + 1) ** 2
    delta = RandomBlock(density).guarantee.delta
    assert delta is not None
    energy = float(gradient.double().square().sum())
    assert mean_error(gradient, drawn) == pytest.approx((1 - delta(numel)) * energy, rel=1e-12)


def test_starts_are_equally_likely() -> None:
    """Each of 8 starts in 4000 rounds: within five standard deviations of 500."""
    drawn = supports(RandomBlock(0.25), 8, draws=4000)
    counts = [drawn.count(support) for support in set(drawn)]
    assert len(counts) == 8
    assert all(abs(count - 500) <= 5 * (4000 * 1 / 8 * 7 / 8) ** 0.5 for count in counts)


@pytest.mark.parametrize(
    ("density", "blocks", "numel", "choices"), [(0.5, 4, 10, 6), (0.25, 5, 23, 5), (0.5, 1024, 5, 10), (1.0, 4, 9, 1)]
)
def test_delta_of_many_blocks_holds_with_equality(density: float, blocks: int, numel: int, choices: int) -> None:
    """Over all sets of blocks the mean error is (1 - δ)‖x‖², exactly, though blocks differ in length."""
    drawn = set(supports(RandomBlocks(density, blocks=blocks), numel))
    assert len(drawn) == choices
    gradient = torch.arange(1.0, numel + 1)
    delta = RandomBlocks(density, blocks=blocks).guarantee.delta
    assert delta is not None
    energy = float(gradient.double().square().sum())
    assert mean_error(gradient, drawn) == pytest.approx((1 - delta(numel)) * energy, rel=1e-12)


@each_form
@given(steps=st.lists(integers, min_size=1, max_size=6))
def test_it_conserves(form: type[Block], steps: list[torch.Tensor]) -> None:
    """Law 1, exact on integers: Σ sent + residual = Σ input."""
    feedback = ErrorFeedback(form(0.25), 12)
    sent = [feedback.compress(gradient, Round(step=step)).densify() for step, gradient in enumerate(steps)]
    assert torch.equal(torch.stack(sent).sum(dim=0) + feedback.residual, torch.stack(steps).sum(dim=0))


@each_form
def test_the_users_generators_are_not_touched(form: type[Block]) -> None:
    """Its draws come from its key."""
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]  # noqa: NPY002
    form(0.5).compress(torch.ones(100))
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


@each_form
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_gradient_is_refused(form: type[Block], value: float) -> None:
    """Whether or not it is in the block of this round."""
    gradient = torch.ones(12)
    gradient[4] = value
    for step in range(8):
        with pytest.raises(NonFiniteGradientError, match="at index 4"):
            form(0.25).compress(gradient, Round(step=step))


@each_form
def test_empty_vector_has_an_empty_message(form: type[Block]) -> None:
    """A vector without elements is no special case, and loses nothing."""
    assert form(0.5).compress(torch.empty(0)).count == 0
    delta = form(0.5).guarantee.delta
    assert delta is not None
    assert delta(0) == 1.0


@each_form
@pytest.mark.parametrize("density", [0.0, -1.0, 1.5, float("nan")])
def test_density_outside_its_range_is_refused(form: type[Block], density: float) -> None:
    """A density is in (0, 1]."""
    with pytest.raises(ConfigurationError, match=r"density must be in \(0, 1\]"):
        form(density)


@each_form
@pytest.mark.parametrize("seed", [-1, 2**64, 0.5, True, "0"])
def test_what_is_no_seed_is_refused(form: type[Block], seed: int) -> None:
    """A seed is a whole number of at most 64 bits."""
    with pytest.raises(ConfigurationError, match="seed must be a whole number"):
        form(0.5, seed=seed)


@pytest.mark.parametrize("blocks", [0, -4, 2.0, True, "8"])
def test_what_is_no_number_of_blocks_is_refused(blocks: int) -> None:
    """At least one, and whole."""
    with pytest.raises(ConfigurationError, match="blocks must be a whole number >= 1"):
        RandomBlocks(0.5, blocks=blocks)


@each_form
def test_other_shapes_are_refused(form: type[Block]) -> None:
    """Only flat float32 vectors are compressed."""
    with pytest.raises(ConfigurationError, match="one-dimensional float32"):
        form(0.5).compress(torch.zeros(2, 2))


def test_description_names_the_settings() -> None:
    """The text other processes compare."""
    assert RandomBlock(1 / 64).describe() == "RandomBlock(0.015625)"
    assert RandomBlock(1, seed=2).describe() == "RandomBlock(1.0, seed=2)"
    assert RandomBlocks(0.5, blocks=64).describe() == "RandomBlocks(0.5, blocks=64)"
