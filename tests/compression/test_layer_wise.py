"""Layer-wise: each tensor alone, with state, draws and bounds of its own."""

import copy
import io
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thresher.compression.base import Compressor, Round
from thresher.compression.dryden_adaptive import DrydenAdaptive
from thresher.compression.error_feedback import ErrorFeedback
from thresher.compression.hard_threshold import HardThreshold
from thresher.compression.identity import Identity
from thresher.compression.layer_wise import LayerWise
from thresher.compression.random_block import RandomBlock
from thresher.compression.random_k import RandomK, UnbiasedRandomK
from thresher.compression.sidco import SIDCo
from thresher.compression.strom import Strom
from thresher.compression.top_k import TopK
from thresher.protos.errors import ConfigurationError, NonFiniteGradientError

SHAPES = [(2, 3), (0, 5), (4,), ()]  # 6, 0, 4 and 1 elements
NUMEL = 11
COMPRESSORS: list[Compressor] = [
    Identity(),
    HardThreshold(0.7),
    TopK(0.4),
    RandomK(0.4),
    UnbiasedRandomK(0.4),
    RandomBlock(0.4),
    Strom(0.7),
    DrydenAdaptive(0.4),
    SIDCo(0.2, "pareto"),
]

each_compressor = pytest.mark.parametrize("compressor", COMPRESSORS, ids=lambda compressor: compressor.describe())
gradients = st.lists(
    st.floats(-1e3, 1e3, width=32) | st.sampled_from([0.0, 0.7, -0.7]), min_size=NUMEL, max_size=NUMEL
).map(torch.tensor)
rounds = st.builds(Round, step=st.integers(0, 1000), tensor=st.sampled_from([0, 100]))


@each_compressor
@given(gradient=gradients, at=rounds)
def test_it_is_each_tensor_alone(compressor: Compressor, gradient: torch.Tensor, at: Round) -> None:
    """The message is that of each tensor by itself, under its own number, put together; the input is not modified."""
    before = gradient.clone()
    sent = LayerWise(compressor, SHAPES).compress(gradient, at)
    sent.validate()
    assert sent.numel == NUMEL
    for number, (begin, end) in {0: (0, 6), 2: (6, 10), 3: (10, 11)}.items():
        own_round = Round(step=at.step, tensor=at.tensor + number)
        alone = copy.deepcopy(compressor).compress(gradient[begin:end].clone(), own_round)
        assert sent.slice(begin, end).equals(alone)
    sent.values.fill_(9.0)
    assert torch.equal(gradient, before)


@given(gradients, st.floats(0, 10), st.floats(0.1, 4))
def test_hard_threshold_is_shape_free(gradient: torch.Tensor, threshold: float, scale: float) -> None:
    """Law 4: layer-wise or entire-model, bit for bit; step size and scale reach every tensor."""
    whole, layers = HardThreshold(threshold), LayerWise(HardThreshold(threshold), SHAPES)
    at = Round(scale=scale)
    assert layers.compress(gradient, at).equals(whole.compress(gradient, at))


def test_one_dominant_tensor_tells_layer_wise_from_entire_model() -> None:
    """The counter-example to law 4: unlike a hard threshold, Top-k depends on the cut (arXiv:2108.00951)."""
    gradient = torch.cat([torch.full((4,), 10.0), torch.full((4,), 0.1)])
    assert TopK(0.5).compress(gradient).indices.tolist() == [0, 1, 2, 3]
    assert LayerWise(TopK(0.5), [(4,), (4,)]).compress(gradient).indices.tolist() == [0, 1, 4, 5]


@pytest.mark.parametrize("compressor", [Identity(), HardThreshold(0.7), TopK(0.4), DrydenAdaptive(0.4), SIDCo(0.2)])
@given(gradient=gradients)
def test_declared_bounds_hold(compressor: Compressor, gradient: torch.Tensor) -> None:
    """‖x - C(x)‖² ≤ κ² and ≤ (1 - δ)‖x‖², as far as it says so itself, up to the rounding of a mean to float32."""
    layers = LayerWise(compressor, SHAPES)
    assert layers.guarantee.kappa or layers.guarantee.delta
    error = float((gradient - layers.compress(gradient).densify()).double().square().sum())
    if layers.guarantee.kappa:
        assert error <= layers.guarantee.kappa(NUMEL) ** 2
    if layers.guarantee.delta:
        energy = float(gradient.double().square().sum())
        assert error <= (1 - layers.guarantee.delta(NUMEL) + 1e-6) * energy


@pytest.mark.parametrize("compressor", [RandomK(0.4), RandomBlock(0.4)])
def test_delta_of_random_masks_holds_on_average(compressor: Compressor) -> None:
    """E‖x - C(x)‖² ≤ (1 - δ)‖x‖², plus five standard errors of the mean over many rounds."""
    layers = LayerWise(compressor, SHAPES)
    gradient = torch.arange(1.0, NUMEL + 1)
    sent = torch.stack([layers.compress(gradient, Round(step=step)).densify() for step in range(1000)])
    errors = (gradient - sent).double().square().sum(dim=1)
    assert layers.guarantee.delta is not None
    bound = (1 - layers.guarantee.delta(NUMEL)) * float(gradient.double().square().sum())
    assert float(errors.mean()) <= bound + 5 * float(errors.std()) / 1000**0.5


def test_bounds_combine() -> None:
    """κ² adds up; δ is that of the worst tensor, ω too; what has no bound in one tensor has none in all."""
    threshold, top_k, random_k = (
        LayerWise(each, SHAPES).guarantee for each in (HardThreshold(0.5), TopK(0.5), UnbiasedRandomK(0.5))
    )
    assert threshold.kappa is not None
    assert threshold.kappa(NUMEL) == pytest.approx(math.sqrt(NUMEL) * 0.5)
    assert top_k.delta is not None
    assert top_k.delta(NUMEL) == 0.5
    assert random_k.omega is not None
    assert random_k.omega(NUMEL) == 1.0
    assert (threshold.delta, top_k.kappa, random_k.delta) == (None, None, None)
    thirds = LayerWise(TopK(0.5), [(3,), (4,)]).guarantee.delta
    assert thirds is not None
    assert thirds(7) == 1 / 3


def test_bounds_of_other_vectors_are_refused() -> None:
    """They are bounds for these tensors."""
    delta = LayerWise(TopK(0.5), SHAPES).guarantee.delta
    assert delta is not None
    with pytest.raises(ConfigurationError, match="11 elements in all, found 12"):
        delta(12)


@each_compressor
def test_it_conserves_as_its_compressor_does(compressor: Compressor) -> None:
    """The word passes through, and holds: Σ sent + residual = Σ input, within float32."""
    layers = LayerWise(compressor, SHAPES)
    assert layers.guarantee.conserves == compressor.guarantee.conserves
    feedback = ErrorFeedback(layers, NUMEL)
    inputs = torch.randint(-4, 5, (5, NUMEL), generator=torch.Generator().manual_seed(0)).float()
    sent = torch.stack(
        [feedback.compress(gradient, Round(step=step)).densify() for step, gradient in enumerate(inputs)]
    )
    assert torch.allclose(sent.sum(dim=0) + feedback.residual, inputs.sum(dim=0), atol=1e-3)


def test_tensors_draw_apart_and_send_no_indices() -> None:
    """Equal tensors have different masks, and each mask's seeds are in the message."""
    sent = LayerWise(RandomK(0.1), [(1000,), (0,), (1000,)]).compress(torch.zeros(2000))
    assert sent.slice(0, 1000).indices.tolist() != sent.slice(1000, 2000).indices.tolist()
    assert [(seed.offset, seed.numel, seed.count) for seed in sent.seeds] == [(0, 1000, 100), (1000, 1000, 100)]


def test_state_is_each_tensors_own() -> None:
    """One tensor's tails are light, the other's heavy; and the compressor it was made from has learnt nothing."""
    prototype = SIDCo(0.01)
    layers = LayerWise(prototype, [(2000,), (2000,)])
    generator = torch.Generator().manual_seed(0)
    for _ in range(15):
        light = torch.empty(2000).exponential_(generator=generator)
        layers.compress(torch.cat([light, torch.randn(2000, generator=generator) ** 5]))
    states = layers.state_dict()["tensors"]
    assert states["0"]["stages"] == 1
    assert states["1"]["stages"] > 1
    assert prototype == SIDCo(0.01)


def test_state_goes_on_bit_for_bit() -> None:
    """Through torch.save and a loader that runs no code."""
    shapes = [(30, 40), (0,), (500,)]
    generator = torch.Generator().manual_seed(1)
    steps = [torch.randn(1700, generator=generator) ** 3 for _ in range(30)]
    layers, resumed = LayerWise(SIDCo(0.01), shapes), LayerWise(SIDCo(0.01), shapes)
    for gradient in steps[:12]:
        layers.compress(gradient)
    file = io.BytesIO()
    torch.save(layers.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed == layers
    for gradient in steps[12:]:
        assert resumed.compress(gradient).equals(layers.compress(gradient))
    assert resumed.state_dict() == layers.state_dict()


def broken(state: dict[str, Any]) -> dict[str, Any]:
    """A state whose last tensor's part is wrong."""
    return state | {"tensors": state["tensors"] | {"2": state["tensors"]["2"] | {"stages": -1}}}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (LayerWise(SIDCo(0.01), [(5,)]).state_dict(), "the state has tensors 1, this is made for 3"),
        (LayerWise(SIDCo(0.1), [(5,)]).state_dict(), r"belongs to LayerWise\(SIDCo\(0.1\)\), this is"),
        (broken(LayerWise(SIDCo(0.01), [(5,)] * 3).state_dict()), "stages is -1"),
        ({"method": "LayerWise(SIDCo(0.01))", "tensors": []}, "the state has tensors a list"),
        ({"method": "LayerWise(SIDCo(0.01))"}, "expected the keys"),
    ],
)
def test_what_is_no_state_is_refused(wrong: dict[str, Any], message: str) -> None:
    """The difference is named, and no tensor's state has changed."""
    layers = LayerWise(SIDCo(0.01), [(5,)] * 3)
    before = layers.state_dict()
    with pytest.raises(ConfigurationError, match=message):
        layers.load_state_dict(wrong)
    assert layers.state_dict() == before


def test_model_without_elements_has_an_empty_message() -> None:
    """Neither no tensors nor empty ones are special cases; nothing is lost."""
    for shapes in ([], [(0,), (3, 0)]):
        layers = LayerWise(TopK(0.5), shapes)
        assert (layers.compress(torch.empty(0)).numel, layers.compress(torch.empty(0)).count) == (0, 0)
        delta = layers.guarantee.delta
        assert delta is not None
        assert delta(0) == 1.0


def test_vector_of_another_model_is_refused() -> None:
    """Its length must be that of all tensors."""
    with pytest.raises(ConfigurationError, match="11 elements in all, found 12"):
        LayerWise(TopK(0.5), SHAPES).compress(torch.zeros(12))
    with pytest.raises(ConfigurationError, match="one-dimensional float32"):
        LayerWise(TopK(0.5), SHAPES).compress(torch.zeros(1, NUMEL))


def test_non_finite_coordinate_is_not_lost() -> None:
    """It is kept or refused, as the compressor does it."""
    gradient = torch.ones(NUMEL)
    gradient[7] = float("nan")
    assert 7 in LayerWise(TopK(0.4), SHAPES).compress(gradient).indices.tolist()
    with pytest.raises(NonFiniteGradientError):
        LayerWise(RandomK(0.4), SHAPES).compress(gradient)


def test_layer_wise_in_layer_wise_is_refused() -> None:
    """Each tensor is one already."""
    with pytest.raises(ConfigurationError, match=r"LayerWise\(TopK\(0.5\)\) is bound to the tensors of a model"):
        LayerWise(LayerWise(TopK(0.5), SHAPES), SHAPES)


@pytest.mark.parametrize("wrong", [0.5, "TopK", ErrorFeedback(TopK(0.5), 3), TopK])
def test_what_is_no_compressor_is_refused(wrong: Any) -> None:
    """A feedback goes around it."""
    with pytest.raises(ConfigurationError, match=r"LayerWise takes compressors, not a .*; a feedback goes around them"):
        LayerWise(wrong, SHAPES)


def test_description_leaves_the_shapes_out() -> None:
    """They come from the model."""
    assert LayerWise(TopK(0.001), SHAPES).describe() == "LayerWise(TopK(0.001))"
