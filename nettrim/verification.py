"""``nettrim.verify``: a report against the two networks and the data, every promise computed again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nettrim import calibration as calibrations
from nettrim.checking import figures, identities
from nettrim.checking.promises import Asked
from nettrim.checking.results import BROKEN, Check, Verification
from nettrim.checking.work import Work
from nettrim.errors import ArgumentError
from nettrim.report import Report
from nettrim.surroundings import left_out
from nettrim.tracing import trace

__all__ = ["Check", "Verification", "verify"]


@torch.inference_mode(False)
@left_out()
def verify(
    dense_model: nn.Module,
    pruned_model: nn.Module,
    calibration: Any,
    report: Report,
    *,
    masks: Mapping[str, Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    bounds: bool = True,
) -> Verification:
    """Compute again everything that a report promises, by code that shares nothing with the solvers, and compare.

    Parameters
    ----------
    dense_model : nn.Module
        The network before pruning (with ``inplace=True`` a copy that was made before).
    pruned_model : nn.Module
        The network after.
    calibration : as of :func:`nettrim.prune`
        The same samples in the same order; how they are cut into batches does not matter.
    report : Report
    masks : mapping of str to Tensor, optional
        Parameter name to a bool tensor; checked against the zeros if given.
    forward_fn : callable(model, batch), optional
        As of :func:`nettrim.prune`.
    bounds : bool
        Whether to prove the lower bounds, which takes most of the time; without it they stay "not proven".

    Returns
    -------
    Verification
        ``holds`` is False where anything is broken; ``complete`` says that nothing was left unproven either.

    Raises
    ------
    ArgumentError
        An argument is not as described, or the options in the report are none; CalibrationError where a network cannot run the data.

    Notes
    -----
    What is checked, how, to which tolerance, and what cannot be: docs/verify.md.
    """
    for name, value, kind in (("dense_model", dense_model, nn.Module), ("pruned_model", pruned_model, nn.Module), ("report", report, Report)):
        if not isinstance(value, kind):
            raise ArgumentError(f"{name} is a {type(value).__name__}; expected a {kind.__module__.split('.')[0]} {kind.__name__}")
    asked = Asked.read(report.options)
    found = calibrations.batches(calibration)
    checks = [*identities.identities(dense_model, pruned_model, found, report), *identities.masks_of(pruned_model, masks, report)]
    strange = list(identities.strangers(dense_model, pruned_model, report))
    checks += strange
    if any(check.outcome == BROKEN and check.what != "other tensors" for check in strange):
        return Verification(tuple(checks))  # these networks cannot be run side by side
    run = calibrations.runner(forward_fn)
    solve_on, keep_out = calibrations.split(found, asked.holdout, asked.seed)
    traced = trace(dense_model, solve_on, run)
    work = Work(dense_model, pruned_model, solve_on, run, report, asked, traced)
    checks += work.order()
    if any(check.outcome == BROKEN for check in checks if check.what == "layers that ran"):
        return Verification(tuple(checks))
    outputs = work.measure()
    pairs_kept_out, held_out = work.measure_kept_out(keep_out)
    for layer in report.layers:
        checks += work.layer(layer, bounds)
        if layer.name in work.pairs:
            checks.append(figures.held_out(layer, pairs_kept_out.get(layer.name)))
    if asked.recalibrate_batchnorm:
        checks.append(work.statistics())
        outputs, held_out = work.final_outputs(solve_on), work.final_outputs(keep_out)
    checks += work.network(outputs, held_out if keep_out else None)
    return Verification(tuple(checks))
