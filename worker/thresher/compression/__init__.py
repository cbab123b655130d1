"""Compressors: tensors in, tensors and state out. Pure, and usable alone."""

from thresher.compression.base import Compressor, Guarantee
from thresher.compression.error_feedback import ErrorFeedback
from thresher.compression.hard_threshold import HardThreshold
from thresher.compression.identity import Identity
from thresher.compression.thresholds import Calibration, paper_threshold, quantile_threshold
from thresher.compression.top_k import TopK

__all__ = [
    "Calibration",
    "Compressor",
    "ErrorFeedback",
    "Guarantee",
    "HardThreshold",
    "Identity",
    "TopK",
    "paper_threshold",
    "quantile_threshold",
]
