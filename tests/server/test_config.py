"""What a shard is told when it starts: what makes no sense is refused before anything is served."""

import math
from typing import Any

import pytest

from thresher.protos.errors import ConfigurationError
from thresher.server.config import ShardConfig


@pytest.mark.parametrize("place", [(-1, 1, 1), (1, 1, 1), (0, 0, 1), (0, 1, 0)])
def test_a_place_that_does_not_exist_is_refused(place: tuple[int, int, int]) -> None:
    """The message says all three numbers."""
    with pytest.raises(ConfigurationError, match=f"shard {place[0]} of {place[1]} for {place[2]} workers"):
        ShardConfig(*place)


@pytest.mark.parametrize("name", ["start_timeout", "round_timeout", "lease", "checkpoint_every", "log_cap_bytes"])
@pytest.mark.parametrize("value", [-1, math.nan, math.inf])
def test_times_and_sizes_are_finite_and_not_negative(name: str, value: Any) -> None:
    """The message says which one; 0 is allowed."""
    with pytest.raises(ConfigurationError, match=f"{name} must be finite and not negative, not {value}"):
        ShardConfig(0, 1, 1, **{name: value})
    assert getattr(ShardConfig(0, 1, 1, **{name: 0}), name) == 0
