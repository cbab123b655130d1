"""Beside the model: three lines in a training script."""

from thresher.worker.method import Method
from thresher.worker.session import Session, connect
from thresher.worker.settings import Settings

__all__ = ["Method", "Session", "Settings", "connect"]
