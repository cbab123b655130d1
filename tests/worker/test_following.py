"""Copying a shadow: assignments that follow are copied, others are refused."""

import pytest
import torch

from thresher.protos.errors import ProtocolError
from thresher.protos.layout import Layout, TensorSpec
from thresher.protos.sparse import SparseGradient
from thresher.protos.update import Update
from thresher.worker.following import Copying

PIECE = Layout((TensorSpec("a", (3,), "float32"),)).shard_slice(0, 1)


def update(version: int, versions: int) -> Update:
    values = SparseGradient(torch.tensor([1]), torch.tensor([float(version)]), 3)
    return Update(version, 1, (0,), None, (True,), assignments=values, assigned_versions=versions)


def test_assignments_are_copied() -> None:
    """Several versions at once, also some that were copied before; the values it began with stay untouched."""
    begin = torch.zeros(3)
    copying = Copying(PIECE, begin, 2)
    copying.apply(update(5, 3))
    copying.apply(update(6, 4))
    assert (copying.version, copying.parameters.tolist(), begin.tolist()) == (6, [0, 6, 0], [0, 0, 0])
    assert torch.equal(copying.state()["parameters"], copying.parameters)


@pytest.mark.parametrize("told", [update(5, 2), Update(3, 1, (0,), None, (True,))], ids=["a gap", "no assignments"])
def test_what_does_not_follow(told: Update) -> None:
    """It is refused, and nothing changes."""
    copying = Copying(PIECE, torch.zeros(3), 2)
    with pytest.raises(ProtocolError, match="cannot follow version 2"):
        copying.apply(told)
    assert (copying.version, copying.parameters.tolist()) == (2, [0, 0, 0])
