"""Methods: what contradicts itself is refused, and what behaves differently is described differently."""

from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.compression import HardThreshold, Identity, TopK, paper_threshold
from thresher.protos.errors import ConfigurationError, OptimizerError
from thresher.protos.layout import Layout, TensorSpec
from thresher.protos.optimizers import OptimizerSpec
from thresher.worker import Method
from thresher.worker.placement import GradientPlaced, UpdatePlaced

LAYOUT = Layout((TensorSpec("a", (2, 3), "float32"), TensorSpec("b", (4,), "float32")))

thresholds = st.floats(0.0, 1e6) | st.integers(0, 100)
densities = st.floats(1e-6, 1.0)
methods = st.builds(
    lambda settings, placement, nonfinite: Method(**settings, placement=placement, nonfinite=nonfinite),
    st.one_of(
        st.just({"compressor": "identity"}),
        st.fixed_dictionaries({"threshold": thresholds}),
        st.fixed_dictionaries({"density": densities, "paper_rule": st.booleans()}),
        st.fixed_dictionaries({"compressor": st.just("top-k"), "density": densities, "layer_wise": st.booleans()}),
    ),
    st.sampled_from(["gradient", "update"]),
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
        Method(threshold=1, placement="update"),
        Method(threshold=1, nonfinite="skip"),
        Method(density=1),
        Method(density=0.5),
        Method(density=0.5, paper_rule=True),
        Method(compressor="top-k", density=0.5),
        Method(compressor="top-k", density=0.5, layer_wise=True),
        Method(compressor="identity"),
    ]
    assert all(one.describe() != other.describe() for one, other in combinations(different, 2))
    for one, other in ((Method(threshold=1), Method(threshold=1.0)), (Method(threshold=-0.0), Method(threshold=0.0))):
        assert one == other
        assert one.describe() == other.describe()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "either a threshold or a density"),
        ({"threshold": 1.0, "density": 0.5}, "either a threshold or a density"),
        ({"threshold": -1.0}, "finite number >= 0, not -1.0"),
        ({"threshold": float("nan")}, "finite number >= 0, not nan"),
        ({"threshold": float("inf")}, "finite number >= 0, not inf"),
        ({"density": 0.0}, r"density must be in \(0, 1\], not 0.0"),
        ({"density": 1.5}, r"density must be in \(0, 1\], not 1.5"),
        ({"density": float("nan")}, r"density must be in \(0, 1\], not nan"),
        ({"paper_rule": True}, "needs a density"),
        ({"paper_rule": True, "threshold": 1.0}, "needs a density"),
        ({"paper_rule": True, "threshold": 1.0, "density": 0.5}, "no threshold"),
        ({"threshold": 1.0, "layer_wise": True}, "top-k only"),
        ({"compressor": "top-k"}, "top-k needs a density"),
        ({"compressor": "top-k", "threshold": 1.0, "density": 0.5}, "takes no threshold"),
        ({"compressor": "top-k", "density": 0.5, "paper_rule": True}, "takes no threshold"),
        ({"compressor": "identity", "density": 0.5}, "takes no density"),
        ({"compressor": "identity", "threshold": 0.5}, "takes no density and no threshold"),
        ({"compressor": "identity", "layer_wise": True}, "top-k only"),
        (
            {"compressor": "topk", "density": 0.5},
            "compressor must be one of hard-threshold, top-k, identity, not 'topk'",
        ),
        ({"threshold": 1.0, "placement": "both"}, "placement must be one of gradient, update, not 'both'"),
        ({"threshold": 1.0, "nonfinite": "ignore"}, "nonfinite must be one of refuse, skip, not 'ignore'"),
    ],
)
def test_contradictions_are_refused(settings: dict[str, Any], text: str) -> None:
    """Before anything is started, with a message that says what contradicts what."""
    with pytest.raises(ConfigurationError, match=text):
        Method(**settings)


def test_compressors() -> None:
    """Each name is the compressor of that name, with the settings given."""
    assert Method(compressor="identity").compressor_for(LAYOUT).describe() == Identity().describe()
    assert Method(threshold=0.25).compressor_for(LAYOUT).describe() == HardThreshold(0.25).describe()
    top = Method(compressor="top-k", density=0.5)
    assert top.compressor_for(LAYOUT).describe() == TopK(0.5).describe()
    layered = Method(compressor="top-k", density=0.5, layer_wise=True)
    assert layered.compressor_for(LAYOUT).describe() == TopK(0.5, [6, 4]).describe()


def test_where_the_threshold_comes_from() -> None:
    """Fixed when it is given or follows from the rule; calibrated when there is only a density; else there is none."""
    fixed, rule, density = Method(threshold=0.25), Method(density=0.4, paper_rule=True), Method(density=0.4)
    assert (fixed.fixed_threshold(LAYOUT), fixed.calibration()) == (0.25, None)
    assert (rule.fixed_threshold(LAYOUT), rule.calibration()) == (paper_threshold(4), None)
    calibration = density.calibration()
    assert density.fixed_threshold(LAYOUT) is None
    assert calibration is not None
    assert calibration.density == 0.4
    for method in (Method(compressor="identity"), Method(compressor="top-k", density=0.5)):
        assert (method.fixed_threshold(LAYOUT), method.calibration()) == (None, None)


def test_placements() -> None:
    """The placement follows the setting; an optimizer with state cannot be update-placed."""
    plain = OptimizerSpec("SGD", ({"lr": 1.0},))
    assert isinstance(Method(threshold=0.0).placement_of(plain, LAYOUT), GradientPlaced)
    updates = Method(threshold=0.0, placement="update")
    assert isinstance(updates.placement_of(plain, LAYOUT), UpdatePlaced)
    with pytest.raises(OptimizerError, match="plain"):
        updates.placement_of(OptimizerSpec("Adam", ({"lr": 1.0},)), LAYOUT)
