"""Kinds of dicts in a state: what torch relies on comes back as it was, and what would change is refused."""

from collections import Counter, OrderedDict, defaultdict
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.worker.training import Scale, sgd

from thresher.protos.errors import ConfigurationError
from thresher.worker.memory import Memory


def kept(folder: Path, value: Any) -> Any:
    with closing(Memory(folder / "memory", "a test")) as memory:
        memory.flip({"value": value})
        return (memory.load() or {})["value"]


def test_a_schedule_with_milestones_goes_on_beyond_them(tmp_path: Path) -> None:
    """`MultiStepLR` counts its milestones in a Counter, and asks it for more than a dict can."""

    def schedule() -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.SequentialLR]:
        optimizer = sgd(Scale(), lr=1.0)
        warm = torch.optim.lr_scheduler.ConstantLR(optimizer, 0.5, 2)
        steps = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 3], 0.1)
        return optimizer, torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, steps], [2])

    def rates(parts: tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.SequentialLR], steps: int) -> list[float]:
        optimizer, scheduler = parts
        found = []
        for _ in range(steps):
            optimizer.step()
            scheduler.step()
            found.append(optimizer.param_groups[0]["lr"])
        return found

    expected = rates(schedule(), 8)
    first = schedule()
    assert rates(first, 1) == expected[:1]
    second = schedule()
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(kept(tmp_path, first[1].state_dict()))
    assert rates(second, 7) == expected[1:]


def test_a_counter_stays_one(tmp_path: Path) -> None:
    """With its counts, in their order; an ordered dict is a dict since dicts have an order."""
    found = kept(tmp_path, Counter({3: 2, "x": 1}))
    assert type(found) is Counter
    assert list(found.items()) == [(3, 2), ("x", 1)]
    assert type(kept(tmp_path, OrderedDict(x=1))) is dict


def test_other_kinds_of_dicts(tmp_path: Path) -> None:
    """One that fails for a missing key where it made a value before would fail long after it was loaded."""
    with pytest.raises(ConfigurationError, match=r"^value\.x: a defaultdict cannot be kept.*dict\(\)"):
        kept(tmp_path, {"x": defaultdict(list)})
