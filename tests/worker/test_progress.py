"""Where a loop is: passes, batches and agreements, before and after a kill."""

import pytest
import torch
from tests.worker.training import Scale, sgd

from thresher.protos.errors import ConfigurationError
from thresher.worker.progress import Progress, Schedule


def test_a_resumed_loop_goes_on_in_its_pass() -> None:
    """Passes that are over are not yielded, data passes that are over are empty, the one it was in goes on."""
    first = Progress()
    numbers = first.passes(4)
    assert (next(numbers), first.begin_pass(), first.begin_pass()) == (0, True, True)
    assert (next(numbers), first.begin_pass(), first.begin_pass()) == (1, True, True)
    first.begin_batch()
    second = Progress()
    second.load(first.state())
    again = second.passes(4)
    assert next(again) == 1
    assert (second.begin_pass(), second.begin_pass(), second.begin_pass()) == (False, True, True)
    assert list(again) == [2, 3]


def test_agreements_are_repeated_where_they_were_made() -> None:
    """Those before the first pass and those of this pass; of earlier passes only their number is kept."""
    first = Progress()
    first.agreed({"before": 1.0})
    numbers = first.passes(3)
    for number in (0, 1):
        assert next(numbers) == number
        first.agreed({"in": float(number)})
    second = Progress()
    second.load(first.state())
    assert second.repeated() == {"before": 1.0}
    assert next(second.passes(3)) == 1
    assert second.repeated() == {"in": 1.0}
    assert (second.repeated(), second.agreements) == (None, 3)


def test_what_cannot_be_kept() -> None:
    """Something without a state, and a second thing of one name."""
    progress = Progress()
    with pytest.raises(ConfigurationError, match="count cannot be kept: int has no state_dict"):
        progress.keep({"count": 3})
    progress.keep({"model": Scale()})
    with pytest.raises(ConfigurationError, match="kept as model already"):
        progress.keep({"model": Scale()})


def test_hyper_parameters_come_back() -> None:
    """A scheduler moves them but does not keep them."""
    optimizer = sgd(Scale(), lr=0.5)
    schedule = Schedule(optimizer)
    state = schedule.state_dict()
    optimizer.param_groups[0]["lr"] = 0.25
    schedule.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert isinstance(optimizer.param_groups[0]["params"][0], torch.nn.Parameter)
