"""Beside the model: three lines in a training script."""

import thresher.protos.transport  # noqa: F401 - before gRPC is imported: see there
from thresher.worker.method import Method
from thresher.worker.rows import WorkerRow
from thresher.worker.session import Session, connect
from thresher.worker.settings import Settings

__all__ = ["Method", "Session", "Settings", "WorkerRow", "connect"]
