"""nettrim: post-training pruning of PyTorch networks by convex optimization, with proof."""

from nettrim.errors import (
    ArgumentError,
    CalibrationError,
    ConvergenceError,
    InfeasibleError,
    NetTrimError,
    UnsupportedProgramError,
)
from nettrim.programs import LayerProgram
from nettrim.prune import ProgressEvent, PruneResult, prune
from nettrim.report import Certificate, LayerReport, Report
from nettrim.shrinking import shrink
from nettrim.solvers import Solution, solve

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "CalibrationError",
    "Certificate",
    "ConvergenceError",
    "InfeasibleError",
    "LayerProgram",
    "LayerReport",
    "NetTrimError",
    "ProgressEvent",
    "PruneResult",
    "Report",
    "Solution",
    "UnsupportedProgramError",
    "prune",
    "shrink",
    "solve",
    "__version__",
]
