"""nettrim: post-training pruning of PyTorch networks by convex optimization, with proof."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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
from nettrim.programs import LayerProgram
from nettrim.prune import ProgressEvent, PruneResult, prune
from nettrim.report import Certificate, LayerReport, Report
from nettrim.solvers import HistoryPoint, Solution, solve

if TYPE_CHECKING:
    from nettrim import criteria as criteria
    from nettrim import layers as layers
    from nettrim import penalties as penalties
    from nettrim.compression import CompressedSize, load_compressed, save_compressed
    from nettrim.folder import load, save
    from nettrim.from_disk import prune_folder
    from nettrim.latency import BenchReport, BenchTiming, bench
    from nettrim.masks import apply_masks, check_masks, remove_masks
    from nettrim.shrinking import shrink
    from nettrim.sparse_linear import SparseLinear
    from nettrim.sparse_report import SparseLayer, SparseReport
    from nettrim.sparsify import to_dense, to_sparse
    from nettrim.verification import Check, Verification, verify

# What a call of `prune` does not need is imported when it is first asked for (PEP 562): the module of each public name, and public modules.
_LATER = {
    **dict.fromkeys(("CompressedSize", "load_compressed", "save_compressed"), "compression"),
    **dict.fromkeys(("load", "save"), "folder"),
    **dict.fromkeys(("BenchReport", "BenchTiming", "bench"), "latency"),
    **dict.fromkeys(("apply_masks", "check_masks", "remove_masks"), "masks"),
    "prune_folder": "from_disk",
    "shrink": "shrinking",
    "SparseLinear": "sparse_linear",
    **dict.fromkeys(("SparseLayer", "SparseReport"), "sparse_report"),
    **dict.fromkeys(("to_dense", "to_sparse"), "sparsify"),
    **dict.fromkeys(("Check", "Verification", "verify"), "verification"),
}
_MODULES = ("criteria", "layers", "penalties")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"nettrim.{name}")
    if name not in _LATER:
        raise AttributeError(f"module 'nettrim' has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f"nettrim.{_LATER[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER, *_MODULES})


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
    "prune_folder",
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
