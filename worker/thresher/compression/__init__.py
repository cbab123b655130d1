"""Compressors: tensors in, tensors and state out. Pure, and usable alone."""

from thresher.compression.accordion import Accordion
from thresher.compression.base import Compressor, Guarantee, Quantizer, Round, Sparsifier
from thresher.compression.blockwise import Blockwise8Bit
from thresher.compression.budget import Budget
from thresher.compression.catalogue import parse, parse_feedback, takes_run_threshold
from thresher.compression.decayed_error_feedback import DecayedErrorFeedback
from thresher.compression.detached_error_feedback import DetachedErrorFeedback
from thresher.compression.dgc import DGC
from thresher.compression.dryden_adaptive import DrydenAdaptive
from thresher.compression.ef21 import EF21
from thresher.compression.error_feedback import ErrorFeedback
from thresher.compression.error_reset import ErrorReset
from thresher.compression.feedback import Feedback
from thresher.compression.float_rounding import BFloat16, Float16
from thresher.compression.hard_threshold import HardThreshold
from thresher.compression.identity import Identity
from thresher.compression.integer_rounding import IntegerRounding
from thresher.compression.layer_wise import LayerWise
from thresher.compression.layers import Layers
from thresher.compression.momentum_correction import MomentumCorrection
from thresher.compression.no_feedback import NoFeedback
from thresher.compression.one_bit import OneBit
from thresher.compression.qsgd import QSGD
from thresher.compression.quantized import Quantized
from thresher.compression.random_block import RandomBlock, RandomBlocks
from thresher.compression.random_k import RandomK, UnbiasedRandomK
from thresher.compression.scaled_sign import ScaledSign
from thresher.compression.sidco import SIDCo
from thresher.compression.stochastic_rounding import StochasticRounding
from thresher.compression.strom import Strom
from thresher.compression.tern_grad import TernGrad
from thresher.compression.thresholds import Calibration, paper_threshold, precision_threshold, quantile_threshold
from thresher.compression.top_k import TopK

__all__ = [
    "DGC",
    "EF21",
    "QSGD",
    "Accordion",
    "BFloat16",
    "Blockwise8Bit",
    "Budget",
    "Calibration",
    "Compressor",
    "DecayedErrorFeedback",
    "DetachedErrorFeedback",
    "DrydenAdaptive",
    "ErrorFeedback",
    "ErrorReset",
    "Feedback",
    "Float16",
    "Guarantee",
    "HardThreshold",
    "Identity",
    "IntegerRounding",
    "LayerWise",
    "Layers",
    "MomentumCorrection",
    "NoFeedback",
    "OneBit",
    "Quantized",
    "Quantizer",
    "RandomBlock",
    "RandomBlocks",
    "RandomK",
    "Round",
    "SIDCo",
    "ScaledSign",
    "Sparsifier",
    "StochasticRounding",
    "Strom",
    "TernGrad",
    "TopK",
    "UnbiasedRandomK",
    "paper_threshold",
    "parse",
    "parse_feedback",
    "precision_threshold",
    "quantile_threshold",
    "takes_run_threshold",
]
