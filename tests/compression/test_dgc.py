"""DGC: momentum correction on matrices, momentum alone on vectors, clipping, and the warm-up of the density."""

import io
from math import prod, sqrt
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thresher.compression.base import Round
from thresher.compression.dgc import DGC, LargestPerMatrix
from thresher.compression.identity import Identity
from thresher.compression.momentum_correction import MomentumCorrection
from thresher.compression.top_k import TopK
from thresher.protos.errors import ConfigurationError, NonFiniteGradientError

SHAPES = [(2, 3), (4,), (0, 2), (3, 1, 2), ()]
SIZES = [prod(shape) for shape in SHAPES]
NUMEL = sum(SIZES)
gradients = st.lists(st.floats(-1e4, 1e4, width=32), min_size=NUMEL, max_size=NUMEL).map(torch.tensor)
runs = st.lists(gradients, min_size=1, max_size=6)
densities = st.floats(0.01, 1.0)


@given(runs, densities, st.floats(0.0, 0.99), st.booleans(), st.booleans())
def test_each_tensor_is_treated_alone(
    steps: list[torch.Tensor], density: float, momentum: float, nesterov: bool, masking: bool
) -> None:
    """Matrices as by momentum correction around Top-k, the others whole and with their momentum; to the bit."""
    feedback = DGC(SHAPES, density, momentum, nesterov=nesterov, masking=masking)
    alone = [
        MomentumCorrection(TopK(density), size, momentum, nesterov=nesterov, masking=masking)
        if len(shape) > 1
        else MomentumCorrection(Identity(), size, momentum, nesterov=nesterov, masking=False)
        for shape, size in zip(SHAPES, SIZES, strict=True)
    ]
    for gradient in steps:
        before = gradient.clone()
        sent = feedback.compress(gradient)
        assert torch.equal(gradient, before)
        begin = 0
        for tensor, size in zip(alone, SIZES, strict=True):
            expected = tensor.compress(gradient[begin : begin + size])
            assert sent.slice(begin, begin + size).equals(expected)
            assert torch.equal(feedback.residual[begin : begin + size], tensor.residual)
            assert torch.equal(feedback.velocity[begin : begin + size], tensor.velocity)
            begin += size


@given(st.floats(1e-3, 1.0), st.integers(0, 6), st.integers(1, 5))
def test_the_density_falls_to_its_value_and_stays(density: float, epochs: int, steps_per_epoch: int) -> None:
    """In equal ratios from epoch to epoch; from the end of the warm-up on it is the density itself."""
    selection = LargestPerMatrix(tuple(SHAPES), density, epochs, steps_per_epoch)
    found = [selection.density_at(epoch * steps_per_epoch) for epoch in range(epochs + 3)]
    assert found == [selection.density_at((epoch + 1) * steps_per_epoch - 1) for epoch in range(epochs + 3)]
    assert found[epochs:] == pytest.approx([density] * 3)
    assert found[: epochs + 1] == pytest.approx([density ** ((e + 1) / (epochs + 1)) for e in range(epochs + 1)])


def test_the_official_warm_up() -> None:
    """Five epochs on the way to 0.1 %: the values of the official code."""
    selection = LargestPerMatrix(((10, 10),), 0.001, 5, 1)
    found = [selection.density_at(epoch) for epoch in range(7)]
    assert found == pytest.approx([0.3162, 0.1, 0.03162, 0.01, 0.003162, 0.001, 0.001], rel=1e-3)


def test_the_warm_up_is_what_is_sent() -> None:
    """The number of the round decides, so a worker that joins late sends as much as the others."""
    feedback = DGC([(100, 100)], 0.001, warm_up_epochs=5, steps_per_epoch=2)
    counts = [feedback.compress(torch.randn(10_000), Round(step)).count for step in (0, 1, 2, 10)]
    assert counts == [3162, 3162, 1000, 10]


@given(gradients, st.floats(0.1, 1e5), st.integers(1, 16))
def test_clipping_bounds_the_norm_of_the_gradient(gradient: torch.Tensor, clip: float, workers: int) -> None:
    """To clip / √workers, in its direction; a shorter one is left alone, to the bit."""
    sent = DGC([(NUMEL, 1)], 1.0, 0.0, clip=clip, workers=workers).compress(gradient).densify()
    bound, norm = clip / sqrt(workers), float(gradient.double().norm())
    if norm <= bound:
        assert torch.equal(sent, gradient)
    else:
        assert float(sent.double().norm()) == pytest.approx(bound, rel=1e-6)
        torch.testing.assert_close(sent, gradient * (bound / norm))


def test_clipping_is_of_the_whole_gradient() -> None:
    """One factor for all tensors, before the momentum."""
    sent = DGC([(1, 1), (1,)], 1.0, 0.5, clip=5.0, workers=1).compress(torch.tensor([6.0, 8.0]))
    torch.testing.assert_close(sent.densify(), torch.tensor([3.0, 4.0]))


def test_it_does_not_conserve_its_input_and_says_so() -> None:
    """A bias goes on moving after its gradient has gone."""
    feedback = DGC([(1,)], momentum=0.5)
    assert not feedback.guarantee.conserves
    sent = sum(feedback.compress(torch.tensor([gradient])).densify().item() for gradient in [1.0, 0.0])
    assert sent + feedback.residual.item() == 1.5


def test_it_stands_before_plain_sgd_on_gradients() -> None:
    """It has the momentum, and works on gradients."""
    assert DGC(SHAPES).momentum == 0.9
    assert DGC.runs_in == {"gradient", "hook", "simulator"}


def test_a_model_without_parameters() -> None:
    """No special case."""
    assert DGC([]).compress(torch.empty(0)).count == 0


def test_description_is_the_call_without_defaults() -> None:
    """Neither shapes nor device."""
    assert DGC(SHAPES).describe() == "DGC()"
    assert DGC(SHAPES, 1, 0, clip=1, workers=4, warm_up_epochs=5, steps_per_epoch=98).describe() == (
        "DGC(density=1.0, momentum=0.0, clip=1.0, workers=4, warm_up_epochs=5, steps_per_epoch=98)"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 0.0}, r"density must be in \(0, 1\]"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
        ({"clip": 0.0, "workers": 1}, "clip must be a finite number above 0"),
        ({"clip": float("inf"), "workers": 1}, "clip must be a finite number above 0"),
        ({"clip": 1.0}, "set workers to how many there are"),
        ({"clip": 1.0, "workers": 0}, "workers must be a whole number, at least 1, not 0"),
        ({"warm_up_epochs": -1}, "warm_up_epochs must be a whole number, at least 0"),
        ({"warm_up_epochs": 1}, "set steps_per_epoch"),
        ({"warm_up_epochs": 1, "steps_per_epoch": 0}, "steps_per_epoch must be a whole number, at least 1, not 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    """Each says what is wrong with it."""
    with pytest.raises(ConfigurationError, match=message):
        DGC(SHAPES, **settings)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_gradient_that_is_refused_changes_nothing(clip: float | None) -> None:
    """Another length, NaN, and infinity, which is named as it is also where gradients are scaled."""
    feedback = DGC([(2, 1)], 0.5, clip=clip, workers=1)
    feedback.compress(torch.tensor([0.25, 0.5]))
    with pytest.raises(ConfigurationError, match="expected a vector of numel 2, found 3"):
        feedback.compress(torch.ones(3))
    with pytest.raises(NonFiniteGradientError, match="the first is inf at index 1"):
        feedback.compress(torch.tensor([1.0, float("inf")]))
    assert feedback.residual.tolist() == [0.25, 0.0]
    assert feedback.velocity.tolist() == [0.25, 0.0]


def test_state_survives_a_safe_file() -> None:
    """Saved, read with weights_only and loaded, the next step is the same to the bit."""
    original, restored = (DGC(SHAPES, 0.3) for _ in range(2))
    original.compress(torch.linspace(-1, 2, NUMEL))
    file = io.BytesIO()
    torch.save(original.state_dict(), file)
    restored.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    gradient = torch.linspace(2, -1, NUMEL)
    assert restored.compress(gradient).equals(original.compress(gradient))
    assert torch.equal(restored.residual, original.residual)
    assert torch.equal(restored.velocity, original.velocity)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (DGC([(2, 1)], 0.3).state_dict(), r"belongs to DGC\(density=0.3\), this is DGC\(density=0.5\)"),
        (DGC([(3, 1)], 0.5).state_dict(), r"shape \(3,\), expected torch.float32 of shape \(2,\)"),
        ({}, "not a state of DGC"),
    ],
)
def test_state_of_another_is_refused_and_changes_nothing(state: dict[str, Any], message: str) -> None:
    """The difference is named."""
    feedback = DGC([(2, 1)], 0.5)
    feedback.compress(torch.tensor([1.0, 2.0]))
    with pytest.raises(ConfigurationError, match=message):
        feedback.load_state_dict(state)
    assert feedback.residual.tolist() == [1.0, 0.0]
    assert feedback.velocity.tolist() == [1.0, 0.0]


def test_selection_refuses_a_vector_of_another_model() -> None:
    """The shapes are those of this very vector."""
    with pytest.raises(ConfigurationError, match="made for tensors of 2 elements in all, found 3"):
        LargestPerMatrix(((2, 1),), 0.5, 0, 1).compress(torch.zeros(3))
