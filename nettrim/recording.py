"""One batch's forward pass, recorded: as it is, or without what linear layers compute."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn

from nettrim import layers
from nettrim.calibration import Run, run_batch
from nettrim.errors import CalibrationError
from nettrim.layers.linear import is_linear, silent
from nettrim.passes import replaced
from nettrim.recorder import Recorder


def recorded(
    model: nn.Module, supported: dict[str, nn.Module], batch: Any, index: int, run: Run, note: Callable[[Any, int], None] | None = None
) -> Recorder:
    """One batch, run and recorded inside `nettrim.passes.evaluation`; ``note`` is given the network's output and ``index``."""
    recorder = Recorder(supported)
    _record(recorder, model, batch, index, run, note)
    return recorder


def skimmed(model: nn.Module, supported: dict[str, nn.Module], batch: Any, index: int, run: Run) -> Recorder | None:
    """As `recorded`, without what linear layers compute, which costs the most; None where their values may have decided what ran."""
    recorder = Recorder(supported)
    with ExitStack() as stack:
        for matrix in (matrix for module in supported.values() for matrix in layers.matrices_of(module) if is_linear(matrix.kind)):
            stack.enter_context(replaced(matrix.module, silent(matrix.module, matrix.shape[0])))
        try:
            _record(recorder, model, batch, index, run)
        except CalibrationError:
            if not recorder.seen.calls:
                raise
            return None  # it may be for the zeros
    return None if recorder.layers_decide else recorder


def _record(recorder: Recorder, model: nn.Module, batch: Any, index: int, run: Run, note: Callable[[Any, int], None] | None = None) -> None:
    with recorder.hooks(), recorder:
        output = run_batch(model, batch, index, run)
    recorder.finish(output)
    if note is not None:
        note(output, index)
    del output
    recorder.note_kept()
