"""A part of the fuzzing runs with the suite; `make fuzz` does more of it."""

from typing import Any

import pytest
from tests.protos.fuzz_frames import fuzz

from thresher.protos import codec
from thresher.protos.index_codings import Support, decode_indices


def test_no_input_gets_past_the_decoder() -> None:
    """20,000 inputs: refused or read right, and a good many of each."""
    outcomes = fuzz(20_000, seed=1)
    assert outcomes.total() == 20_000
    assert outcomes["decoded"] > 1000
    assert len(outcomes) > 10  # they fail in many ways, not all at the first check


def test_the_same_seed_gives_the_same_inputs() -> None:
    """What was found once is found again."""
    assert fuzz(300, seed=2) == fuzz(300, seed=2) != fuzz(300, seed=3)


def test_a_decoder_that_fails_is_told_with_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception that is none of ours, and a gradient that is none, carry the bytes that made them."""
    calls = iter(range(200))

    def failing(*block: Any) -> Support:
        return decode_indices(*block) if next(calls, None) is not None else 1 / 0  # type: ignore[return-value]

    monkeypatch.setattr(codec, "decode_indices", failing)
    with pytest.raises(ZeroDivisionError) as caught:
        fuzz(1000, seed=1)
    assert bytes.fromhex(caught.value.__notes__[0].rpartition(" ")[2])[:4] == b"THSH"
