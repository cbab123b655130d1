"""Rows in TensorBoard's own files, written and read back by its own code."""

from dataclasses import replace
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from tests.worker.test_rows import ROW
from torch.utils.tensorboard import SummaryWriter

from thresher.worker.loggers.tensorboard import TensorBoard


def test_every_number_of_a_row_is_a_point_of_its_curve(tmp_path: Path) -> None:
    """At the step and the time of the row."""
    rows = [replace(ROW, step=step, time=100.0 + step, layers=ROW.layers if step == 1 else None) for step in (1, 2)]
    with SummaryWriter(str(tmp_path)) as writer:
        log = TensorBoard(writer)
        for row in rows:
            log(row)
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    assert set(read.Tags()["scalars"]) == rows[0].scalars().keys()
    points = {(point.step, point.wall_time, point.value) for point in read.Scalars("thresher/push_bytes")}
    assert points == {(1, 101.0, 100.0), (2, 102.0, 100.0)}
    assert [point.step for point in read.Scalars("thresher/layers/weight")] == [1]
