"""Layers: who belongs to which rule, and that nothing else changes."""

import io
import math
from typing import Any

import pytest
import torch
from hypothesis import given, reject
from hypothesis import strategies as st

from thresher.compression.base import Compressor, Round
from thresher.compression.error_feedback import ErrorFeedback
from thresher.compression.hard_threshold import HardThreshold
from thresher.compression.identity import Identity
from thresher.compression.layer_wise import LayerWise
from thresher.compression.layers import Layers
from thresher.compression.random_k import RandomK, UnbiasedRandomK
from thresher.compression.sidco import SIDCo
from thresher.compression.top_k import TopK
from thresher.protos.errors import ConfigurationError, LayoutError

NAMES = ["embed.weight", "conv.weight", "conv.bias", "norm.weight", "norm.bias", "out.weight", "out.bias"]
SHAPES = [(3, 2), (2, 2), (2,), (0,), (2,), (2, 3), ()]
SIZES = [6, 4, 2, 0, 2, 6, 1]
NUMEL = 21
BIASES = [10, 11, 12, 13, 20]
EMBEDDING = list(range(6))
REST = [6, 7, 8, 9, *range(14, 20)]

gradients = st.lists(
    st.floats(-1e3, 1e3, width=32) | st.sampled_from([0.0, 0.7, -0.7]), min_size=NUMEL, max_size=NUMEL
).map(torch.tensor)
patterns = st.lists(st.sampled_from([*NAMES, "*.bias", "*.weight", "conv.*", "*"]), unique=True, max_size=4)


def layers_of(rest: Compressor, rules: dict[str, Compressor]) -> Layers:
    return Layers(rest, rules, SHAPES, NAMES)


@given(gradients, st.floats(0.05, 1), st.floats(0.05, 1))
def test_each_group_is_compressed_as_one_vector(gradient: torch.Tensor, rest: float, embedding: float) -> None:
    """Biases dense, the embedding by its own Top-k, and one Top-k over all the rest; each coordinate in its place."""
    layers = layers_of(TopK(rest), {"*.bias": Identity(), "embed.*": TopK(embedding)})
    before = gradient.clone()
    sent = layers.compress(gradient)
    sent.validate()
    expected = torch.zeros(NUMEL)
    expected[BIASES] = gradient[BIASES]
    expected[EMBEDDING] = TopK(embedding).compress(gradient[EMBEDDING]).densify()
    expected[REST] = TopK(rest).compress(gradient[REST]).densify()
    assert torch.equal(sent.densify(), expected)
    assert sent.count == 5 + max(1, int(rest * 10)) + max(1, int(embedding * 6))
    sent.values.fill_(9.0)
    assert torch.equal(gradient, before)


@given(gradients, patterns, st.floats(0, 10), st.floats(0.1, 4))
def test_one_threshold_everywhere_is_no_layers_at_all(
    gradient: torch.Tensor, wanted: list[str], threshold: float, scale: float
) -> None:
    """Law 4, whatever the groups: bit for bit."""
    rules: dict[str, Compressor] = {pattern: HardThreshold(threshold) for pattern in wanted}
    try:
        layers = layers_of(HardThreshold(threshold), rules)
    except ConfigurationError:  # a pattern that the ones before it leave nothing
        reject()
    at = Round(scale=scale)
    assert layers.compress(gradient, at).equals(HardThreshold(threshold).compress(gradient, at))


@pytest.mark.parametrize("rest", [TopK(0.3), RandomK(0.3), LayerWise(RandomK(0.3), SHAPES), SIDCo(0.1)])
@given(gradient=gradients, step=st.integers(0, 1000))
def test_without_rules_the_rest_is_everything(rest: Compressor, gradient: torch.Tensor, step: int) -> None:
    """The same coordinates, drawn by the same keys, as without Layers."""
    if isinstance(rest, SIDCo):
        rest = SIDCo(0.1)
    sent = layers_of(rest, {}).compress(gradient, Round(step=step))
    assert sent.equals(rest.compress(gradient, Round(step=step)))


@given(gradients)
def test_layer_wise_in_a_group_is_each_of_its_tensors(gradient: torch.Tensor) -> None:
    """Two weights of the rest by themselves, and the biases dense."""
    sent = layers_of(LayerWise(TopK(0.5), SHAPES), {"*.bias": Identity(), "embed.*": TopK(1)}).compress(gradient)
    assert sent.slice(6, 10).equals(TopK(0.5).compress(gradient[6:10]))
    assert sent.slice(14, 20).equals(TopK(0.5).compress(gradient[14:20]))
    assert sent.slice(10, 14).count == 4


def test_the_first_pattern_that_matches_wins() -> None:
    """In the order in which the rules are written."""
    one, all_of = HardThreshold(0.0), HardThreshold(9.0)
    sent = layers_of(all_of, {"out.bias": one, "*.bias": all_of}).compress(torch.ones(NUMEL))
    assert sent.indices.tolist() == [20]


def test_case_counts() -> None:
    """A pattern means the same on every system."""
    with pytest.raises(LayoutError, match=r"no parameter matches '\*.BIAS'"):
        layers_of(TopK(0.5), {"*.BIAS": Identity()})


def test_groups_and_their_tensors_draw_apart() -> None:
    """No two of four equal tensors, in three groups, have the same mask."""
    names, shapes = ["a", "b", "c", "d"], [(1000,)] * 4
    rules: dict[str, Compressor] = {"b": RandomK(0.1), "c": LayerWise(RandomK(0.1), shapes)}
    layers = Layers(LayerWise(RandomK(0.1), shapes), rules, shapes, names)
    sent = layers.compress(torch.zeros(4000))
    masks = {tuple(sent.slice(begin, begin + 1000).indices.tolist()) for begin in range(0, 4000, 1000)}
    assert len(masks) == 4


def test_bounds_combine() -> None:
    """κ² adds up; δ and ω are those of the worst group; a bound that one group lacks, all lack."""
    thresholds = layers_of(HardThreshold(1.0), {"*.bias": HardThreshold(2.0)}).guarantee.kappa
    assert thresholds is not None
    assert thresholds(NUMEL) == pytest.approx(math.sqrt(16 * 1 + 5 * 4))
    deltas = layers_of(TopK(0.5), {"*.bias": TopK(0.25), "embed.*": Identity()}).guarantee.delta
    assert deltas is not None
    assert deltas(NUMEL) == 0.2
    omegas = layers_of(UnbiasedRandomK(0.5), {"*.bias": Identity()}).guarantee.omega
    assert omegas is not None
    assert omegas(NUMEL) == 1.0
    assert layers_of(TopK(0.5), {"*.bias": HardThreshold(0.1)}).guarantee.delta is None
    with pytest.raises(ConfigurationError, match="21 elements in all, found 20"):
        deltas(20)


@given(gradients)
def test_declared_bounds_hold(gradient: torch.Tensor) -> None:
    """‖x - C(x)‖² ≤ (1 - δ)‖x‖², from its own word."""
    layers = layers_of(TopK(0.5), {"*.bias": TopK(0.25), "embed.*": Identity()})
    assert layers.guarantee.delta is not None
    error = float((gradient - layers.compress(gradient).densify()).double().square().sum())
    energy = float(gradient.double().square().sum())
    assert error <= (1 - layers.guarantee.delta(NUMEL)) * energy * (1 + 1e-12)


@given(st.lists(st.lists(st.integers(-4, 4), min_size=NUMEL, max_size=NUMEL), min_size=1, max_size=5))
def test_it_conserves(steps: list[list[int]]) -> None:
    """Law 1, exact on integers: Σ sent + residual = Σ input."""
    layers = layers_of(TopK(0.2), {"*.bias": RandomK(0.5), "embed.*": SIDCo(0.1)})
    assert layers.guarantee.conserves
    feedback = ErrorFeedback(layers, NUMEL)
    inputs = torch.tensor(steps).float()
    sent = torch.stack(
        [feedback.compress(gradient, Round(step=step)).densify() for step, gradient in enumerate(inputs)]
    )
    assert torch.equal(sent.sum(dim=0) + feedback.residual, inputs.sum(dim=0))


def test_state_goes_on_bit_for_bit() -> None:
    """Nested, through torch.save and a loader that runs no code."""
    names, shapes = ["a.weight", "a.bias", "b.weight"], [(40, 20), (50,), (300,)]
    rules: dict[str, Compressor] = {"*.bias": SIDCo(0.1, "pareto")}
    layers, resumed = (Layers(LayerWise(SIDCo(0.01), shapes), rules, shapes, names) for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    steps = [torch.randn(1150, generator=generator) ** 3 for _ in range(30)]
    for gradient in steps[:12]:
        layers.compress(gradient)
    assert resumed != layers
    file = io.BytesIO()
    torch.save(layers.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed == layers
    for gradient in steps[12:]:
        assert resumed.compress(gradient).equals(layers.compress(gradient))
    assert resumed.state_dict() == layers.state_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "TopK(0.5)"}, r"belongs to TopK\(0.5\), this is Layers"),
        ({"groups": {}}, "the state has groups 0, this is made for 2"),
        ({"groups": None}, "the state has groups a NoneType"),
        ({"groups": {"0": {"method": "TopK(0.5)"}, "1": {"method": "TopK(0.1)"}}}, r"belongs to TopK\(0.1\)"),
    ],
)
def test_what_is_no_state_is_refused(change: dict[str, Any], message: str) -> None:
    """The difference is named, and nothing has changed."""
    layers = layers_of(TopK(0.5), {"*.bias": SIDCo(0.1)})
    before = layers.state_dict()
    with pytest.raises(ConfigurationError, match=message):
        layers.load_state_dict(before | change)
    assert layers.state_dict() == before


def test_pattern_that_matches_nothing_is_refused() -> None:
    """It is a slip of the pen; it is named, and so are some names that there are."""
    with pytest.raises(LayoutError, match=r"no parameter matches '\*.biases'; there are embed.weight, .*, …$"):
        layers_of(TopK(0.5), {"*.biases": Identity()})
    with pytest.raises(LayoutError, match="there are none at all"):
        Layers(TopK(0.5), {"*": Identity()}, [], [])


def test_pattern_that_is_left_nothing_is_refused() -> None:
    """What an earlier pattern has taken can't be taken again."""
    with pytest.raises(ConfigurationError, match=r"all that 'out\.bias' matches is taken by the patterns before it"):
        layers_of(TopK(0.5), {"*.bias": Identity(), "out.bias": TopK(0.1)})


def test_shapes_and_names_must_be_of_the_same_tensors() -> None:
    """One name each."""
    with pytest.raises(ConfigurationError, match="7 shapes and 6 names"):
        Layers(TopK(0.5), {}, SHAPES, NAMES[1:])


@pytest.mark.parametrize("wrong", [0.5, ErrorFeedback(TopK(0.5), 3), TopK])
def test_what_is_no_compressor_is_refused(wrong: Any) -> None:
    """As the rest or in a rule; a feedback goes around it."""
    with pytest.raises(ConfigurationError, match="Layers takes compressors, not a "):
        layers_of(wrong, {})
    with pytest.raises(ConfigurationError, match="Layers takes compressors, not a "):
        layers_of(TopK(0.5), {"*.bias": wrong})


def test_layers_in_another_are_refused() -> None:
    """Their names are those of the whole model."""
    inner = layers_of(TopK(0.5), {})
    with pytest.raises(ConfigurationError, match="is bound to the tensors of a model"):
        layers_of(inner, {})
    with pytest.raises(ConfigurationError, match="is bound to the tensors of a model"):
        LayerWise(inner, SHAPES)


def test_vector_of_another_model_is_refused() -> None:
    """Its length must be that of all tensors."""
    with pytest.raises(ConfigurationError, match="21 elements in all, found 20"):
        layers_of(TopK(0.5), {}).compress(torch.zeros(20))
    with pytest.raises(ConfigurationError, match="one-dimensional float32"):
        layers_of(TopK(0.5), {}).compress(torch.zeros(NUMEL, dtype=torch.float64))


def test_model_without_elements_has_an_empty_message() -> None:
    """No tensors at all, and an empty one that a rule is for."""
    assert Layers(TopK(0.5), {}, [], []).compress(torch.empty(0)).count == 0
    assert Layers(TopK(0.5), {"a": TopK(0.5)}, [(0,)], ["a"]).compress(torch.empty(0)).count == 0


@pytest.mark.parametrize("at", [0, 9, 20])
def test_non_finite_coordinate_is_not_lost(at: int) -> None:
    """In whichever group it is."""
    gradient = torch.ones(NUMEL)
    gradient[at] = float("nan")
    layers = layers_of(TopK(0.1), {"*.bias": HardThreshold(9.0), "embed.*": TopK(0.1)})
    assert at in layers.compress(gradient).indices.tolist()


def test_description_is_the_call_without_what_the_model_brings() -> None:
    """Rules as the dictionary that they are."""
    layers = layers_of(TopK(0.001), {"*.bias": Identity(), "embed.*": TopK(0.01)})
    assert layers.describe() == "Layers(TopK(0.001), {'*.bias': Identity(), 'embed.*': TopK(0.01)})"
    assert layers_of(TopK(0.001), {}).describe() == "Layers(TopK(0.001), {})"
