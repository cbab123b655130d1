"""Methods: what contradicts itself is refused, and what behaves differently is described differently."""

from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.compression import paper_threshold, precision_threshold
from thresher.protos.errors import ConfigurationError
from thresher.protos.layout import Layout, TensorSpec
from thresher.worker import Method

LAYOUT = Layout((TensorSpec("a", (2, 3), "float32"), TensorSpec("b", (4,), "float32")))
GROUPS = ({"lr": 0.5},)

thresholds = st.floats(0.0, 1e6) | st.integers(0, 100)
densities = st.floats(1e-6, 1.0)
sources = st.one_of(
    st.fixed_dictionaries({"compressor": st.sampled_from(["Identity", "TopK(0.1)", "TopK(0.2)", "HardThreshold(2)"])}),
    st.fixed_dictionaries({"threshold": thresholds}),
    st.fixed_dictionaries({"density": densities, "rule": st.sampled_from(["budget", "calibrated", "paper"])}),
    st.fixed_dictionaries({"precision": st.floats(1e-9, 1.0)}),
    st.fixed_dictionaries({"budget": st.integers(1, 10**12), "steps": st.integers(1, 10**6)}),
)
placements = st.one_of(
    st.just({"placement": "gradient"}),
    st.fixed_dictionaries(
        {
            "placement": st.just("update"),
            "period": st.integers(1, 100),
            "outer": st.sampled_from(["", "SGD(lr=0.7)", "SGD(lr=0.7, momentum=0.9)"]),
        }
    ),
)
methods = st.builds(
    lambda source, placement, nonfinite: Method(**source, **placement, nonfinite=nonfinite),
    sources,
    placements,
    st.sampled_from(["refuse", "skip"]),
)


@given(methods, methods)
def test_equal_descriptions_mean_equal_methods(one: Method, other: Method) -> None:
    """``describe()`` is what workers are compared by: equal if and only if the methods are."""
    assert (one.describe() == other.describe()) == (one == other)


def test_every_setting_is_in_the_description() -> None:
    """Methods that differ in one setting only, or in the type of a number only, never hide it."""
    different = [
        Method(threshold=0),
        Method(threshold=1),
        Method(threshold=1, steps=10),
        Method(threshold=1, placement="update"),
        Method(threshold=1, placement="update", period=4),
        Method(threshold=1, placement="update", outer="SGD(lr=0.7)"),
        Method(threshold=1, nonfinite="skip"),
        Method(density=1),
        Method(density=0.5),
        Method(density=0.5, rule="paper"),
        Method(density=0.5, rule="calibrated"),
        Method(precision=0.5),
        Method(budget=1000, steps=10),
        Method("TopK(0.5)"),
        Method("TopK(0.25)"),
        Method("Identity"),
    ]
    assert all(one.describe() != other.describe() for one, other in combinations(different, 2))
    for one, other in ((Method(threshold=1), Method(threshold=1.0)), (Method(threshold=-0.0), Method(threshold=0.0))):
        assert one == other
        assert one.describe() == other.describe()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "exactly one of threshold, density, budget and precision, not none"),
        ({"threshold": 1.0, "density": 0.5}, "exactly one of .*, not threshold and density"),
        ({"threshold": -1.0}, "finite number >= 0, not -1.0"),
        ({"threshold": float("nan")}, "finite number >= 0, not nan"),
        ({"threshold": float("inf")}, "finite number >= 0, not inf"),
        ({"precision": 0.0}, "precision must be a finite number > 0, not 0.0"),
        ({"density": 0.0}, r"density must be in \(0, 1\], not 0.0"),
        ({"density": 1.5}, r"density must be in \(0, 1\], not 1.5"),
        ({"density": float("nan")}, r"density must be in \(0, 1\], not nan"),
        ({"threshold": 1.0, "rule": "paper"}, "the rule 'paper' needs a density"),
        ({"density": 0.5, "rule": "papers"}, "rule must be one of budget, calibrated, paper, not 'papers'"),
        ({"budget": 1000}, "say how many steps"),
        ({"budget": 0, "steps": 1}, "budget must be at least 1, not 0"),
        ({"threshold": 1.0, "steps": 0}, "steps must be at least 1, not 0"),
        ({"compressor": "TopK"}, "TopK: .*density"),
        ({"compressor": "TopK(0.5)", "threshold": 1.0}, "does not take the run's threshold, so threshold would change"),
        ({"compressor": "HardThreshold(1.0)", "density": 0.5}, "does not take the run's threshold, so density would"),
        ({"compressor": "Identity", "density": 0.5}, "does not take the run's threshold"),
        ({"compressor": "topk(0.5)"}, "there is no method 'topk'; there are the compressors "),
        ({"compressor": "TopK(0.5"}, "is not a method; write it as a call"),
        ({"threshold": 1.0, "placement": "both"}, "placement must be one of gradient, update, not 'both'"),
        ({"threshold": 1.0, "nonfinite": "ignore"}, "nonfinite must be one of refuse, skip, not 'ignore'"),
        ({"threshold": 1.0, "period": 0}, "period must be at least 1, not 0"),
        ({"threshold": 1.0, "period": 2}, "local steps and an outer optimizer need placement 'update'"),
        ({"threshold": 1.0, "outer": "SGD(lr=1.0)"}, "local steps and an outer optimizer need placement 'update'"),
        ({"threshold": 1.0, "placement": "update", "outer": "Lion(lr=1.0)"}, "Lion.*the shards apply SGD"),
        (
            {"compressor": "DetachedErrorFeedback(TopK(0.5))"},
            r"DetachedErrorFeedback\(TopK\(0.5\)\) is not gradient-placed; it runs in: simulator, update",
        ),
        ({"compressor": "EF21(TopK(0.5))"}, r"EF21\(TopK\(0.5\)\) is not gradient-placed; it runs in: simulator"),
    ],
)
def test_contradictions_are_refused(settings: dict[str, Any], text: str) -> None:
    """Before anything is started, with a message that says what contradicts what."""
    with pytest.raises(ConfigurationError, match=text):
        Method(**settings)


def test_a_compressor_alone_gets_error_feedback() -> None:
    """What is not sent is kept, unless another feedback is named."""
    assert Method("TopK(0.5)").feedback_for(LAYOUT).describe() == "ErrorFeedback(TopK(0.5))"
    named = Method("DetachedErrorFeedback(TopK(0.5))", placement="update").feedback_for(LAYOUT)
    assert named.describe() == "DetachedErrorFeedback(TopK(0.5))"
    assert named.residual.numel() == LAYOUT.numel


def test_rules_may_name_the_parameters_of_the_model() -> None:
    """Names are unknown before there is a model: such a method is accepted, and its rules are checked at wrapping."""
    method = Method("Layers(HardThreshold, {'a': Identity})", threshold=1.0)
    assert method.feedback_for(LAYOUT).describe() == "ErrorFeedback(Layers(HardThreshold(), {'a': Identity()}))"


def test_where_the_threshold_comes_from() -> None:
    """Fixed when it is given or follows from a rule; found on the way when there is only a density; else none."""
    assert Method(threshold=0.25).fixed_threshold(LAYOUT, GROUPS) == 0.25
    assert Method(density=0.4, rule="paper").fixed_threshold(LAYOUT, GROUPS) == paper_threshold(4)
    assert Method(precision=0.1).fixed_threshold(LAYOUT, GROUPS) == precision_threshold(0.1, 10, 0.5)
    for method in (
        Method(density=0.4),
        Method(density=0.4, rule="calibrated"),
        Method("Identity"),
        Method("TopK(0.5)"),
    ):
        assert method.fixed_threshold(LAYOUT, GROUPS) is None


def test_a_precision_needs_a_learning_rate() -> None:
    """λ = √(ε/numel)/γ; without γ there is none."""
    with pytest.raises(ConfigurationError, match="learning rate must be a finite number above 0"):
        Method(precision=0.1).fixed_threshold(LAYOUT, ({"momentum": 0.5},))
