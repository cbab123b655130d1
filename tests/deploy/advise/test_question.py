"""What is asked: what makes no sense is refused, with the name of the option."""

from pathlib import Path
from typing import Any

import pytest

from thresher.deploy.advise.question import Question, read_densities
from thresher.protos.errors import ConfigurationError


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "how large is the model"),
        ({"model": "a:b", "parameters": 3}, "not both"),
        ({"parameters": 0}, "--parameters must be at least 1"),
        ({"parameters": 1, "workers": 0}, "--workers must be"),
        ({"parameters": 1, "here": -1}, "--workers-here must be"),
        ({"parameters": 1, "shards": 0}, "--shards must be"),
        ({"parameters": 1, "compute": -0.1}, "--compute must be"),
        ({"parameters": 1, "round_trip": float("nan")}, "--rtt must be"),
        ({"parameters": 1, "timeout": float("inf")}, "--timeout must be"),
    ],
)
def test_what_makes_no_sense_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Question(**given)


def test_a_run_says_how_large_the_model_is() -> None:
    assert Question(run=Path("runs/latest")).parameters is None


@pytest.mark.parametrize("text", ["", "few", "0.1;0.2", "0.1,"])
def test_densities_are_numbers(text: str) -> None:
    with pytest.raises(ConfigurationError, match="--densities are numbers"):
        read_densities(text)
