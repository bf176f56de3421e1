"""nettrim: post-training pruning of PyTorch networks by convex optimization, with proof."""

from nettrim.bench import BenchReport, BenchTiming, bench
from nettrim.compression import CompressedSize, load_compressed, save_compressed
from nettrim.errors import (
    ArgumentError,
    CalibrationError,
    CheckpointError,
    ConvergenceError,
    FormatError,
    InfeasibleError,
    MaskError,
    NetTrimError,
    UnsupportedProgramError,
)
from nettrim.folder import load, save
from nettrim.masks import apply_masks, check_masks, remove_masks
from nettrim.programs import LayerProgram
from nettrim.prune import ProgressEvent, PruneResult, prune
from nettrim.report import Certificate, LayerReport, Report
from nettrim.shrinking import shrink
from nettrim.solvers import HistoryPoint, Solution, solve
from nettrim.sparse_linear import SparseLinear
from nettrim.sparse_report import SparseLayer, SparseReport
from nettrim.sparsify import to_dense, to_sparse
from nettrim.verification import Check, Verification, verify

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "BenchReport",
    "BenchTiming",
    "CalibrationError",
    "Certificate",
    "Check",
    "CheckpointError",
    "CompressedSize",
    "ConvergenceError",
    "FormatError",
    "HistoryPoint",
    "InfeasibleError",
    "LayerProgram",
    "LayerReport",
    "MaskError",
    "NetTrimError",
    "ProgressEvent",
    "PruneResult",
    "Report",
    "Solution",
    "SparseLayer",
    "SparseLinear",
    "SparseReport",
    "UnsupportedProgramError",
    "Verification",
    "apply_masks",
    "bench",
    "check_masks",
    "load",
    "load_compressed",
    "prune",
    "remove_masks",
    "save",
    "save_compressed",
    "shrink",
    "solve",
    "to_dense",
    "to_sparse",
    "verify",
    "__version__",
]
