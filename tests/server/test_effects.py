"""The union that every `match` over effects is checked against has all of them."""

import dataclasses
from typing import get_args

from thresher.server import effects


def test_no_effect_is_left_out() -> None:
    """One that is missing in `Effect` would be performed by nobody, and no type checker would say so."""
    defined = {
        one
        for one in vars(effects).values()
        if isinstance(one, type) and dataclasses.is_dataclass(one) and one.__module__ == effects.__name__
    }
    assert set(get_args(effects.Effect)) == defined
