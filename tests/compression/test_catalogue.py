"""The catalogue: every method by its description, and the laws that hold for all of them."""

import io
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import thresher.compression
from thresher.compression import Compressor, Feedback, Round, parse, parse_feedback, takes_run_threshold
from thresher.compression.catalogue import COMPRESSORS, FEEDBACKS
from thresher.protos.errors import ConfigurationError, LayoutError, NonFiniteGradientError

SHAPES = ((4, 5), (7,), (), (3, 4))
NAMES = ("conv.weight", "conv.bias", "scale", "head.weight")
NUMEL = sum(prod(shape) for shape in SHAPES)

# At least one description of every class; those with state or random numbers above all.
DESCRIPTIONS = (
    "HardThreshold()",
    "HardThreshold(0.5)",
    "Identity()",
    "TopK(0.1)",
    "RandomK(0.25)",
    "RandomK(0.25, seed=3)",
    "UnbiasedRandomK(0.25)",
    "RandomBlock(0.25)",
    "RandomBlocks(0.25, blocks=16)",
    "Strom(0.5)",
    "DrydenAdaptive(0.125)",
    "SIDCo(0.1)",
    "StochasticRounding(0.25)",
    "IntegerRounding(16.0)",
    "QSGD()",
    "QSGD(levels=15, bucket=8)",
    "TernGrad()",
    "TernGrad(clip=None)",
    "ScaledSign()",
    "OneBit()",
    "BFloat16()",
    "Float16()",
    "Blockwise8Bit(block=8)",
    "Quantized(HardThreshold(0.5), BFloat16())",
    "Quantized(TopK(0.25), QSGD())",
    "LayerWise(TopK(0.25))",
    "LayerWise(SIDCo(0.25))",
    "LayerWise(RandomBlock(0.25))",
    "Layers(TopK(0.25), {'*.bias': Identity(), 'head.*': Quantized(HardThreshold(0.5), Float16())})",
    "ErrorFeedback(TopK(0.1))",
    "DetachedErrorFeedback(RandomBlock(0.25))",
    "DetachedErrorFeedback(TopK(0.1), coefficient=0.5)",
    "DecayedErrorFeedback(TopK(0.1), 0.9)",
    "ErrorReset(TopK(0.5), 3)",
    "ErrorReset(TopK(0.5), 2, update=RandomBlock(0.25))",
    "MomentumCorrection(TopK(0.1))",
    "DGC()",
    "Accordion(TopK(0.1), TopK(0.5), steps_per_epoch=2, every_epochs=1)",
    "EF21(TopK(0.1))",
    "NoFeedback(QSGD())",
)

each_method = pytest.mark.parametrize("text", DESCRIPTIONS)


def made(text: str) -> Feedback:
    one = parse(text, SHAPES, NAMES)
    if isinstance(one, Feedback):
        return one
    return parse_feedback(text if one.guarantee.conserves else f"NoFeedback({text})", SHAPES, NAMES)


def gradients(steps: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(NUMEL, generator=generator) for _ in range(steps)]


def run(feedback: Feedback, inputs: list[Tensor], first: int = 0) -> list[Tensor]:
    return [
        feedback.compress(vector, Round(first + step, threshold=0.75)).densify() for step, vector in enumerate(inputs)
    ]


def test_every_method_is_described_here() -> None:
    """Whatever is in the catalogue is held to the laws below, and is public."""
    names = COMPRESSORS.keys() | FEEDBACKS.keys()
    assert all(any(f"{name}(" in text for text in DESCRIPTIONS) for name in names)
    assert names <= set(thresher.compression.__all__)
    assert all(name == method.__name__ for name, method in {**COMPRESSORS, **FEEDBACKS}.items())


@each_method
def test_a_description_makes_the_method_it_describes(text: str) -> None:
    """``parse(made.describe())`` is an equal method: what workers compare is what a user may write."""
    one = parse(text, SHAPES, NAMES)
    assert isinstance(one, Compressor | Feedback)
    other = parse(one.describe(), SHAPES, NAMES)
    assert type(one) is type(other)
    assert one.describe() == other.describe()
    assert [vector.tolist() for vector in run(made(text), gradients(4))] == [
        vector.tolist() for vector in run(made(one.describe()), gradients(4))
    ]


@each_method
def test_state_goes_on_bit_for_bit(text: str) -> None:
    """Saved by torch, loaded with ``weights_only``: the rest of the run is the one without a break."""
    inputs = gradients(9)
    whole = made(text)
    expected = run(whole, inputs)
    first = made(text)
    found = run(first, inputs[:5])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    run(first, gradients(2, seed=1))  # what was saved is a copy
    second = made(text)
    second.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    found += run(second, inputs[5:], first=5)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert torch.equal(second.residual, whole.residual)


@each_method
def test_a_state_of_another_method_is_refused(text: str) -> None:
    """Both methods are named, and nothing is changed."""
    one, other = made(text), made("ErrorFeedback(TopK(0.9))")
    before = run(made(text), gradients(3))
    with pytest.raises(ConfigurationError, match=r"ErrorFeedback\(TopK\(0\.9\)\)"):
        one.load_state_dict(other.state_dict())
    assert all(torch.equal(*pair) for pair in zip(run(one, gradients(3)), before, strict=True))


@each_method
def test_a_state_of_another_layout_is_refused(text: str) -> None:
    """A residual of another length, or another number of tensors, belongs to another model."""
    wider = ((6, 5), *SHAPES[1:])
    state = made(text).state_dict()
    wrapped = text if made(text).describe() == parse(text, SHAPES, NAMES).describe() else made(text).describe()
    other = parse(wrapped, wider, NAMES)
    assert isinstance(other, Feedback)
    with pytest.raises(ConfigurationError, match=r"another model|shape|numel 40, these have 50"):
        other.load_state_dict(state)


@each_method
def test_what_is_sent_and_kept_is_what_was_put_in(text: str) -> None:
    """Law 1, for every method that declares it."""
    feedback = made(text)
    inputs = gradients(12)
    sent = run(feedback, inputs)
    total = torch.stack(inputs).double().sum(dim=0)
    came = torch.stack(sent).double().sum(dim=0) + feedback.residual.double()
    if feedback.guarantee.conserves:
        torch.testing.assert_close(came, total, rtol=1e-5, atol=1e-4)


@each_method
def test_inputs_and_generators_are_left_alone(text: str) -> None:
    """The gradient is the user's, and so is every random generator."""
    vector = gradients(1)[0]
    before, state = vector.clone(), torch.random.get_rng_state()
    run(made(text), [vector] * 3)
    assert torch.equal(vector, before)
    assert torch.equal(torch.random.get_rng_state(), state)


@each_method
def test_a_gradient_that_is_not_finite_is_refused_and_changes_nothing(text: str) -> None:
    """By every feedback, whatever it wraps."""
    feedback, expected = made(text), made(text)
    inputs = gradients(4)
    bad = inputs[0].clone()
    bad[3] = torch.nan
    first = run(feedback, inputs[:2])
    with pytest.raises(NonFiniteGradientError):
        feedback.compress(bad, Round(2, threshold=0.75))
    found = [*first, *run(feedback, inputs[2:], first=2)]
    assert all(torch.equal(*pair) for pair in zip(found, run(expected, inputs), strict=True))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("Foo(1)", "there is no method 'Foo'; there are the compressors .*TopK.* and the feedbacks .*ErrorFeedback"),
        ("TopK", "TopK: .*density.*it takes density"),
        ("TopK(0.1, 0.2)", "TopK: 2 arguments given; it takes density"),
        ("TopK(0.1, density=0.2)", "TopK: density given twice"),
        ("TopK(**{})", "arguments must be written out"),
        ("TopK(0.1).density", "is not a plain value"),
        ("TopK(x)", "there is no method 'x'"),
        ("TopK(-'a')", "is not a number"),
        ("TopK(1/0)", "is not a number"),
        ("HardThreshold(9**9**9)", "too large a power"),
        ("ErrorFeedback(TopK(0.1), numel=3)", "ErrorFeedback takes numel from the model"),
        ("ErrorFeedback(ErrorFeedback(TopK(0.1)))", "ErrorFeedback"),
        ("ErrorFeedback(0.1)", "ErrorFeedback"),
        ("__import__('os').system('true')", "is not a plain value|there is no method"),
        ("0.1", "is not a method"),
        ("TopK(0.1", "is not a method"),
        ("(" * 300 + ")" * 300, "is not a method"),
    ],
)
def test_what_is_no_method_is_refused(text: str, why: str) -> None:
    """Nothing is evaluated as a program; the message says which part is wrong, and what there is."""
    with pytest.raises(ConfigurationError, match=why):
        parse(text, SHAPES, NAMES)


@given(st.text(alphabet="TopK(0.1),={}'*: []abc-/", max_size=30))
def test_any_text_is_a_method_or_refused(text: str) -> None:
    """Never anything else than our own errors."""
    try:
        found: Any = parse(text, SHAPES, NAMES)
    except (ConfigurationError, LayoutError):
        return
    assert isinstance(found, Compressor | Feedback)


def test_what_takes_the_runs_threshold() -> None:
    """Only a hard threshold without one of its own, wherever it stands."""
    assert takes_run_threshold("HardThreshold")
    assert takes_run_threshold("ErrorFeedback(Quantized(HardThreshold(), QSGD))")
    assert takes_run_threshold("Layers(TopK(0.1), {'*.bias': HardThreshold})")
    assert not takes_run_threshold("ErrorFeedback(HardThreshold(0.1))")
    assert not takes_run_threshold("TopK(0.1)")
