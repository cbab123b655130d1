"""A snapshot in parts: whole, or an error."""

import pytest
from tests.worker.conversing import LAYOUT, SGD

from thresher.protos.errors import FrameError
from thresher.protos.messages import layout_to_message, optimizer_to_message
from thresher.v1 import aggregation_pb2 as pb
from thresher.worker.snapshot import snapshot_from_parts


def test_a_snapshot_without_parts() -> None:
    """The error names the shard."""
    with pytest.raises(FrameError, match="snapshot of shard 3 is empty"):
        snapshot_from_parts([], "shard 3")


def test_a_snapshot_that_broke_off() -> None:
    """Fewer bytes came than were announced."""
    part = pb.SnapshotResponse(
        layout=layout_to_message(LAYOUT), optimizer=optimizer_to_message(SGD), total_bytes=10, chunk=b"five."
    )
    with pytest.raises(FrameError, match="snapshot of shard 3 broke off"):
        snapshot_from_parts([part], "shard 3")
