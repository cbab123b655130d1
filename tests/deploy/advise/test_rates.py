"""Bandwidths in words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.deploy.advise.rates import rate_text, read_rate
from thresher.protos.errors import ConfigurationError


@given(st.floats(1, 1e13))
def test_what_is_written_is_read_again(rate: float) -> None:
    """Up to the three digits that are shown."""
    assert read_rate(rate_text(rate)) == pytest.approx(rate, rel=0.006)


@pytest.mark.parametrize("text", ["", "fast", "100", "100 MB", "-1mbit", "0gbit", "1e3mbit", "mbit"])
def test_what_is_no_bandwidth_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="write it as 100mbit"):
        read_rate(text)
