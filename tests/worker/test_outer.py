"""The outer optimizer: a call with plain arguments, and nothing else."""

import pytest

from thresher.protos.errors import ConfigurationError
from thresher.worker.outer import check_outer, outer_spec


def test_nothing_subtracts() -> None:
    """The mean of what was moved is taken as it is."""
    spec = outer_spec("", 2)
    assert (spec.name, spec.groups) == ("Subtract", ({}, {}))


def test_a_call_names_the_optimizer() -> None:
    """Torch's own defaults complete it; every group of the user's gets the same."""
    spec = outer_spec("SGD(lr=0.7, momentum=0.9, nesterov=True)", 2)
    assert spec.name == "SGD"
    assert len(spec.groups) == 2
    assert spec.groups[0] == spec.groups[1]
    chosen = {name: spec.groups[0][name] for name in ("lr", "momentum", "nesterov", "weight_decay")}
    assert chosen == {"lr": 0.7, "momentum": 0.9, "nesterov": True, "weight_decay": 0.0}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("Lion(lr=0.1)", "the shards apply SGD, Adam"),
        ("SGD(rate=0.1)", "unexpected keyword argument 'rate'"),
        ("SGD(lr=-1.0)", "Invalid learning rate"),
        ("SGD(0.1)", "write it as a call"),
        ("SGD(lr=open('x'))", "write it as a call"),
        ("SGD(lr=0.1", "write it as a call"),
        ("lr=0.1", "write it as a call"),
        ("SGD", "write it as a call"),
    ],
)
def test_anything_else_is_refused(text: str, why: str) -> None:
    """Nothing is evaluated: names, unknown arguments and values that torch refuses are said to be wrong."""
    with pytest.raises(ConfigurationError, match=why):
        check_outer(text)
