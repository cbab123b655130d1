"""What a shard is told when it starts: what makes no sense is refused before anything is served."""

import math
from typing import Any

import pytest

from thresher.protos.errors import ConfigurationError
from thresher.server.config import ShardConfig


@pytest.mark.parametrize("place", [(-1, 1, 1), (1, 1, 1), (0, 0, 1), (0, 1, -1)])
def test_a_place_that_does_not_exist_is_refused(place: tuple[int, int, int]) -> None:
    """The message says all three numbers."""
    with pytest.raises(ConfigurationError, match=f"shard {place[0]} of {place[1]} for {place[2]} workers"):
        ShardConfig(*place)


@pytest.mark.parametrize("name", ["start_timeout", "round_timeout", "lease"])
@pytest.mark.parametrize("value", [-1, math.nan, math.inf])
def test_times_are_finite_and_not_negative(name: str, value: Any) -> None:
    """The message says which one; 0 is allowed."""
    with pytest.raises(ConfigurationError, match=f"{name.replace('_', ' ')} must be finite and not negative"):
        ShardConfig(0, 1, 1, **{name: value})
    assert getattr(ShardConfig(0, 1, 1, **{"lease": 0, name: 0}), name) == 0


@pytest.mark.parametrize("name", ["checkpoint_every", "log_cap_bytes"])
def test_sizes_are_not_negative(name: str) -> None:
    """The message says which one; 0 is allowed."""
    with pytest.raises(ConfigurationError, match=f"{name} must not be negative, not -1"):
        ShardConfig(0, 1, 1, **{name: -1})
    assert getattr(ShardConfig(0, 1, 1, **{name: 0}), name) == 0


def test_a_lease_that_a_round_does_not_outlive_is_refused() -> None:
    """Before anything is served, with both names; the worker is told of the longest way to an answer."""
    with pytest.raises(
        ConfigurationError, match="lease of 60 s is longer than round timeout of 50 s: the run would fail"
    ):
        ShardConfig(0, 1, 1, round_timeout=50.0)
    assert ShardConfig(0, 1, 1, start_timeout=100.0, round_timeout=50.0, lease=20.0).answer_timeout == 170.0
