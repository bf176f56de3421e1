"""The order of the stages: goals, then layer by layer capture, program, solver, write-back; certificate and report."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nettrim import batchnorm, capture, dispatch, layers, passes, selection
from nettrim import calibration as calibrations
from nettrim.accumulation import accumulated
from nettrim.budgets import Budget
from nettrim.certificate import Apart, certify, make_promise, network_bound, output_norm, share, stored_discrepancy
from nettrim.checkpoints import Checkpoint, Record
from nettrim.errors import ArgumentError, ConvergenceError, InfeasibleError, NetTrimError, RouteError
from nettrim.goals import Goals, Measured, set_goals
from nettrim.layers import Matrix
from nettrim.observing import Layer
from nettrim.options import Options
from nettrim.progress import Progress, ProgressEvent
from nettrim.report import LayerReport, Report
from nettrim.routes import Blocks, Whole, run_both
from nettrim.selection import Pattern
from nettrim.solvers import Solution, cg_admm
from nettrim.stages import Ask, Stage
from nettrim.storing import Stored, store
from nettrim.surveying import Survey
from nettrim.tracing import TracedLayer, trace


@dataclass(frozen=True, eq=False)
class PruneResult:
    """A pruned network and what is known about it.

    Attributes
    ----------
    model : nn.Module
        The pruned network: a copy, or the model itself with ``inplace=True``.
    masks : dict of str to Tensor
        Parameter name to a bool tensor of its shape, True where a weight is kept.
    report : Report
    """

    model: nn.Module
    masks: dict[str, Tensor]
    report: Report


@dataclass(frozen=True, eq=False)
class Task:
    """What is pruned, and on which data: what stays the same where several options are tried."""

    model: nn.Module
    solve_on: list[Any]
    keep_out: list[Any]
    run: calibrations.Run
    surveyed: Survey
    targets: Iterable[Pattern] | Pattern | None
    ignore: Iterable[Pattern] | Pattern
    device: torch.device | str | None
    progress: bool | Callable[[ProgressEvent], None] | None
    executor: Executor | None
    into: nn.Module | None = None  # what is pruned, where it is no copy made here
    checkpoint: Checkpoint | None = None
    measured: Measured = dataclasses.field(default_factory=Measured)


def execute(task: Task, options: Options) -> PruneResult:
    """Prune a copy of the task's model, once, and certify it; the errors are those of :func:`nettrim.prune`."""
    start = time.perf_counter()
    model, run, solve_on, keep_out, device = task.model, task.run, task.solve_on, task.keep_out, task.device
    traced, chain, blocks, dense_output, layers_seen = task.surveyed
    kept = None if task.checkpoint is None else task.checkpoint.execution(options)
    names, skipped = selection.select(model, traced, task.targets, task.ignore)
    goals = _goals(task, names, skipped, options)
    chosen = [layer for layer in traced.layers if layer.name in goals.names]
    traced_by_name = {layer.name: layer for layer in traced.layers}
    last = traced.layers[-1].name
    if options.kappa != 1 and last not in goals.names:
        raise ArgumentError(
            f"kappa={options.kappa} tightens the budget of the last layer, {last!r}, which is not pruned ({skipped[last]}); leave kappa at 1"
        )
    if options.recalibrate_batchnorm:
        batchnorm.require(model)
    dense_outputs: list[Tensor] = []
    if chain is None:
        traced_too = traced.chain and not options.recalibrate_batchnorm  # as the pruned network's will be: a compiled one is run otherwise
        dense_outputs = [capture.outputs(model, solve_on, run) if dense_output is None or not traced_too else dense_output]
        dense_outputs += [capture.outputs(model, part, run) for part in (keep_out,) if part]
    elif keep_out:  # can be compared, too: before hours of solving, not after
        capture.outputs(model, keep_out[:1], run)
    pruned = layers.copy_of(model) if task.into is None else task.into
    route: Whole | Blocks
    if chain is None:
        route = Whole(model, pruned, run, solve_on, keep_out, device, layers_seen)
    else:
        route = Blocks(chain, model, pruned, run, solve_on, keep_out, device, compared=traced.of_first)
    cascade = options.mode == "cascade"
    held, unfold = task.executor is not None, options.solver != cg_admm.NAME
    ask = Ask(cascade, options.epsilon is None and options.repair != 0, options.max_rows, options.seed, held, unfold)
    through: dict[str, float | None] = {}
    stage: Stage
    records: dict[str, Record] = {}
    resumed_seconds = 0.0
    last_done = time.perf_counter()

    def prepare(layer: TracedLayer) -> tuple[Layer, Budget]:
        seen = stage.observe(layer, ask)
        return seen, goals.budget(layer, seen, last=layer.name == last)

    def held_out(layer: TracedLayer) -> float | None:
        if not keep_out:
            return None
        try:
            rows = stage.kept_out(layer, cascade=cascade)
        except RouteError:  # nothing was promised of the samples kept out
            return None
        return share(stored_discrepancy(layer.of(stage.pruned), rows), output_norm(rows))

    def finish(seen: Layer, budget: Budget, solution: Solution) -> None:
        nonlocal last_done
        layer = next(layer for layer in stage.layers if layer.name == seen.name)
        matrix = layer.of(stage.pruned)
        stored = store(matrix, seen, budget, solution, options.solver, options.tol, options.max_iter)
        if stored.failure is not None and options.on_failure == "raise":
            raise _failure(seen.name, stored)
        seconds, last_done = time.perf_counter() - last_done, time.perf_counter()
        left_out = held_out(layer) if stored.failure is None else None
        records[seen.name] = _record(matrix, seen, budget, stored, seconds, left_out)
        if kept is not None:
            kept.save(seen.name, records[seen.name], None if stored.failure is not None else layers.as_matrix(matrix))

    def unsolved(report_progress: Callable[[str, str, float], None]) -> Iterator[TracedLayer]:
        nonlocal resumed_seconds, stage
        for stage in route.stages(chosen):
            for layer in stage.layers:
                there = None if kept is None else kept.load(layer.name)
                if there is None:
                    yield layer
                    continue
                record, weights = there
                if weights is not None:
                    layers.write_back(layer.of(stage.pruned), weights)
                resumed_seconds += record.seconds
                records[layer.name] = record
                report_progress(layer.name, record.status, _gap(record))
            if chain is not None:
                through.update(stage.accumulated([layer for layer in stage.layers if _goes_through(layer, records.get(layer.name), options)]))

    with Progress(task.progress, len(chosen)) as report_progress:
        with contextlib.closing(dispatch.solutions(unsolved(report_progress), prepare, options, task.executor)) as solved:
            for seen, budget, solution in solved:
                finish(seen, budget, solution)
                report_progress(seen.name, records[seen.name].status, _gap(records[seen.name]))
                del seen, budget, solution  # the rows are not held while those of the next layer are looked at
    done = [(layer.name, records[layer.name]) for layer in chosen]  # those of an executor came in any order
    skipped |= {name: f"kept dense: {record.kept_dense}" for name, record in done if record.kept_dense is not None}
    reports = [record.report for _, record in done if record.report is not None]
    promises = {name: record.promise for name, record in done if record.promise is not None}
    stays = [traced_by_name[r.name] for r in reports]
    if chain is None and any(_goes_through(layer, records[layer.name], options) for layer in stays):
        through = accumulated(model, pruned, stays, solve_on, run)
    reports = [dataclasses.replace(r, accumulated=through.get(r.name, r.accumulated)) for r in reports]
    why_not, last_pass = traced.not_chain_reason, capture.Outputs()
    if options.recalibrate_batchnorm:
        batchnorm.recalibrate(pruned, solve_on, run)
        why_not = "the BatchNorms' statistics were estimated again, and the layers' promises are about those before"
    elif why_not is None:  # values may decide what runs
        whole = (last_pass.add, None, route.played) if isinstance(route, Whole) else ()
        why_not = traced.unlike(trace(pruned, solve_on, run, *whole))
    guaranteed = None if why_not is not None else network_bound(model, pruned, traced, promises, options.mode)
    parts = [part for part in (solve_on, keep_out) if part]
    outputs: list[tuple[Tensor, Tensor]] | list[Apart]
    if isinstance(route, Blocks):
        outputs = [_apart(pairs) for pairs in (route.outputs() if not options.recalibrate_batchnorm else run_both(model, pruned, parts, run))]
    else:
        found = [last_pass.joined() if part is solve_on and last_pass else capture.outputs(pruned, part, run) for part in parts]
        outputs = list(zip(dense_outputs, found, strict=True))
    entries = sum(math.prod(r.shape) for r in reports)
    report = Report(
        layers=tuple(reports),
        skipped=skipped,
        certificate=certify(tuple(reports), outputs[0], outputs[1] if keep_out else None, guaranteed, why_not),
        options={**options.describe(), "blocks": blocks},
        density=sum(r.nonzeros for r in reports) / entries if entries else 1.0,
        seconds=time.perf_counter() - start + resumed_seconds,
    )
    masks = {}
    for report_of in reports if task.into is None else ():
        layer = traced_by_name[report_of.name]
        masks[f"{layer.module_name}.{layer.matrix.part.weight}".lstrip(".")] = layer.of(pruned).weight.detach() != 0
    return PruneResult(pruned, masks, report)


def _goes_through(layer: TracedLayer, record: Record | None, options: Options) -> bool:
    """Whether what a layer's output is off by in the whole network is another figure than its own discrepancy."""
    pruned = record is not None and record.report is not None
    return pruned and (options.mode == "parallel" or layer.matrix.kind.feeds_itself)


def _apart(pairs: Iterable[tuple[Any, Any]]) -> Apart:
    found = Apart()
    for dense, pruned in pairs:
        found.add(*([tensor for tensor in passes.tensors_in(output) if tensor.is_floating_point()] for output in (dense, pruned)))
    return found


def _goals(task: Task, names: list[str], skipped: dict[str, str], options: Options) -> Goals:
    """The goals of the layers, with what is measured for them kept for the calls after this one."""
    unknown = not task.measured.metrics
    if task.checkpoint is not None and unknown:
        task.checkpoint.load_measured(task.measured)
        unknown = not task.measured.metrics
    traced, chain, *_ = task.surveyed
    goals = set_goals(task.model, traced, names, skipped, options, task.solve_on, task.run, task.device, task.measured, chain)
    if task.checkpoint is not None and unknown and task.measured.metrics:
        task.checkpoint.save_measured(task.measured)
    return goals


def _failure(name: str, stored: Stored) -> NetTrimError:
    kind = InfeasibleError if stored.solution.status == "infeasible" else ConvergenceError
    return kind(f"layer {name!r}: {stored.failure}. The model is unchanged; on_failure='keep_dense' would keep this layer dense and go on")


def _gap(record: Record) -> float:
    return math.inf if record.report is None else record.report.gap


def _record(matrix: Matrix, seen: Layer, budget: Budget, stored: Stored, seconds: float, holdout: float | None) -> Record:
    status = stored.solution.status
    if stored.failure is not None:
        return Record(status, seconds, None, None, stored.failure)
    if stored.sizes is not None:
        promise = dataclasses.replace(stored.sizes, epsilon=stored.promise, inflation=budget.inflation)
    else:
        promise = make_promise(matrix, seen, stored.promise, budget.inflation)
    return Record(status, seconds, _layer_report(matrix, seen, stored, promise.output_norm, holdout), promise, None)


def _layer_report(matrix: Matrix, seen: Layer, stored: Stored, norm: float, holdout: float | None) -> LayerReport:
    weights = matrix.weights()
    nonzeros = int(weights.count_nonzero())
    relative = share(stored.discrepancy, norm)
    solution = stored.solution
    return LayerReport(
        name=seen.name,
        shape=matrix.shape,
        rows=seen.rows,
        nonzeros=nonzeros,
        density=nonzeros / weights.numel(),
        epsilon=stored.promise,
        discrepancy=stored.discrepancy,
        relative_discrepancy=relative,
        accumulated=relative,
        holdout=holdout,
        objective=solution.objective,
        lower_bound=solution.lower_bound,
        gap=solution.gap,
        status=solution.status,
        iterations=solution.iterations,
        seconds=solution.seconds,
        solver=solution.solver,
        activation=seen.activation,
        weight_bytes=weights.numel() * weights.element_size(),
        history=solution.history,
    )
