"""Options that are found by trying: the sparsest network within a budget of its output, and how far a cascade repairs."""

from __future__ import annotations

import dataclasses
import math

from nettrim.errors import InfeasibleError
from nettrim.options import Options
from nettrim.pipeline import PruneResult, Task
from nettrim.pipeline import execute as once

REPAIRS = (1.0, 0.75, 0.5, 0.25)
_FIRST_DENSITY = 0.2
_TRIALS = 7
_CLOSE = 0.02  # relative, of two densities on both sides of the budget: closer is not worth another trial
_LARGEST, _SMALLEST = 0.98, 1e-3


def execute(task: Task, options: Options) -> PruneResult:
    """Prune once, or as often as the options that are to be found need."""
    if options.budget is not None:
        return _within(task, options, options.budget)
    if options.repair == "auto":
        return _best_repair(task, options)
    return once(task, options)


def _best_repair(task: Task, options: Options) -> PruneResult:
    """The result with the least discrepancy on the samples kept out; ties go to the fuller repair."""
    results = [once(task, dataclasses.replace(options, repair=repair)) for repair in REPAIRS]
    return min(results, key=_held_out)


def _held_out(result: PruneResult) -> float:
    found = result.report.certificate.holdout
    return math.inf if found is None else found


def _within(task: Task, options: Options, budget: float) -> PruneResult:
    """The sparsest result whose measured discrepancy is within the budget: densities are tried where its logarithm, linear in theirs, says.

    Raises
    ------
    InfeasibleError
        The densest network that is tried is not within it.
    """

    def at(density: float) -> PruneResult:
        return execute(task, dataclasses.replace(options, budget=None, sparsity=1 - density))

    best: PruneResult | None = None
    low, high = (math.log(_SMALLEST), math.nan), (math.log(_LARGEST), math.nan)  # log density, log of discrepancy over budget
    x = math.log(_FIRST_DENSITY)
    for _ in range(_TRIALS):
        tried = x
        result = at(math.exp(tried))
        excess = math.log(max(result.report.certificate.relative_measured, 1e-300) / budget)
        if excess <= 0:
            best, high = result, (x, excess)
        else:
            low = (x, excess)
        if best is not None and high[0] - low[0] < _CLOSE:
            break
        if math.isnan(low[1]) or math.isnan(high[1]):  # one side is still to be seen: half the way to its end
            x = 0.5 * (x + (high if excess > 0 else low)[0])
        else:
            share = low[1] / (low[1] - high[1])
            x = low[0] + min(max(share, 0.1), 0.9) * (high[0] - low[0])
    if best is None:
        raise InfeasibleError(
            f"budget={budget}: at a sparsity of {1 - math.exp(tried):.3g} the output is still off by {budget * math.exp(excess):.3g}; "
            "expected a budget that leaves something to prune: raise it. The model is unchanged"
        )
    options_used = {**best.report.options, "budget": budget}
    return dataclasses.replace(best, report=dataclasses.replace(best.report, options=options_used))
