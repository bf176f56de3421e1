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

from nettrim import calibration as calibrations
from nettrim import capture, dispatch, layers, selection
from nettrim.accumulation import accumulated
from nettrim.budgets import Budget, Layer
from nettrim.certificate import certify, make_promise, network_bound, stored_discrepancy
from nettrim.checkpoints import Checkpoint, Record
from nettrim.errors import ArgumentError, ConvergenceError, InfeasibleError, NetTrimError, RouteError
from nettrim.goals import Goals, Measured, set_goals
from nettrim.options import Options
from nettrim.progress import Progress, ProgressEvent
from nettrim.report import LayerReport, Report
from nettrim.selection import Pattern
from nettrim.solvers import Solution
from nettrim.storing import Stored, store
from nettrim.tracing import Trace, TracedLayer

_ROUNDING = 100.0  # in units of the last place: below it a layer's inputs are those of the dense network


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
    trace: Trace
    targets: Iterable[Pattern] | Pattern | None
    ignore: Iterable[Pattern] | Pattern
    device: torch.device | str | None
    progress: bool | Callable[[ProgressEvent], None] | None
    executor: Executor | None
    checkpoint: Checkpoint | None = None
    measured: Measured = dataclasses.field(default_factory=Measured)


def execute(task: Task, options: Options) -> PruneResult:
    """Prune a copy of the task's model, once, and certify it; the errors are those of :func:`nettrim.prune`."""
    start = time.perf_counter()
    model, run, traced, solve_on, keep_out, device = task.model, task.run, task.trace, task.solve_on, task.keep_out, task.device
    kept = None if task.checkpoint is None else task.checkpoint.execution(options)
    names, skipped = selection.select(model, traced, task.targets, task.ignore)
    goals = _goals(task, names, skipped, options)
    chosen = [layer for layer in traced.layers if layer.name in goals.names]
    last = traced.layers[-1].name
    if options.kappa != 1 and last not in goals.names:
        raise ArgumentError(
            f"kappa={options.kappa} tightens the budget of the last layer, {last!r}, which is not pruned ({skipped[last]}); leave kappa at 1"
        )
    # before hours of solving, not after: the network's outputs can be compared
    dense_outputs = [capture.outputs(model, part, run) for part in (solve_on, keep_out) if part]
    pruned = layers.copy_of(model)
    dropped_rows = False
    records: dict[str, Record] = {}
    resumed_seconds = 0.0
    last_done = time.perf_counter()

    def prepare(layer: TracedLayer) -> tuple[Layer, Budget]:
        nonlocal dropped_rows
        seen = _observe(model, pruned, layer, solve_on, run, device, two_streams=options.mode == "cascade")
        if options.max_rows is not None and options.max_rows < seen.inputs.shape[0]:
            seen, dropped_rows = _some_rows(seen, options.max_rows, options.seed), True
        return seen, goals.budget(layer, seen, last=layer.name == last)

    def held_out(name: str, module: nn.Module) -> float | None:
        layer = next(layer for layer in chosen if layer.name == name)
        try:
            if not keep_out:
                return None
            rows = _observe(model, pruned, layer, keep_out, run, device, two_streams=options.mode == "cascade")
        except RouteError:  # nothing was promised of the samples kept out
            return None
        return _share(stored_discrepancy(module, rows.inputs, rows.targets, rows.activation), rows.targets)

    def finish(seen: Layer, budget: Budget, solution: Solution) -> None:
        nonlocal last_done
        stored = store(pruned.get_submodule(seen.name), seen, budget, solution, options.solver, options.tol, options.max_iter)
        if stored.failure is not None and options.on_failure == "raise":
            raise _failure(seen.name, stored)
        seconds, last_done = time.perf_counter() - last_done, time.perf_counter()
        module = pruned.get_submodule(seen.name)
        left_out = held_out(seen.name, module) if stored.failure is None else None
        records[seen.name] = _record(module, seen, budget, stored, seconds, dropped_rows, left_out)
        if kept is not None:
            kept.save(seen.name, records[seen.name], None if stored.failure is not None else layers.as_matrix(module))

    def unsolved(report_progress: Callable[[str, str, float], None]) -> Iterator[TracedLayer]:
        nonlocal dropped_rows, resumed_seconds
        for layer in chosen:
            there = None if kept is None else kept.load(layer.name)
            if there is None:
                yield layer
                continue
            record, matrix = there
            if matrix is not None:
                layers.write_back(pruned.get_submodule(layer.name), matrix)
            dropped_rows, resumed_seconds = dropped_rows or record.dropped_rows, resumed_seconds + record.seconds
            records[layer.name] = record
            report_progress(layer.name, record.status, _gap(record))

    with Progress(task.progress, len(chosen)) as report_progress:
        with contextlib.closing(dispatch.solutions(unsolved(report_progress), prepare, options, task.executor)) as solved:
            for seen, budget, solution in solved:
                finish(seen, budget, solution)
                report_progress(seen.name, records[seen.name].status, _gap(records[seen.name]))
    done = [(layer.name, records[layer.name]) for layer in chosen]  # those of an executor came in any order
    skipped |= {name: f"kept dense: {record.kept_dense}" for name, record in done if record.kept_dense is not None}
    reports = [record.report for _, record in done if record.report is not None]
    promises = {name: record.promise for name, record in done if record.promise is not None}
    if dropped_rows or options.mode == "parallel":  # elsewhere a layer's own discrepancy is all there is
        through = accumulated(model, pruned, {r.name: r.activation for r in reports}, solve_on, run)
        reports = [dataclasses.replace(r, accumulated=through[r.name]) for r in reports]
    why_not = "with max_rows the promises cover the rows that were drawn" if dropped_rows else traced.not_chain_reason
    guaranteed = None if why_not is not None else network_bound(model, pruned, traced, promises, options.mode)
    outputs = [(dense, capture.outputs(pruned, part, run)) for dense, part in zip(dense_outputs, (solve_on, keep_out), strict=False)]
    entries = sum(math.prod(r.shape) for r in reports)
    report = Report(
        layers=tuple(reports),
        skipped=skipped,
        certificate=certify(tuple(reports), outputs[0], outputs[1] if keep_out else None, guaranteed, why_not),
        options=options.describe(),
        density=sum(r.nonzeros for r in reports) / entries if entries else 1.0,
        seconds=time.perf_counter() - start + resumed_seconds,
    )
    masks = {
        f"{r.name}.weight".lstrip("."): pruned.get_submodule(r.name).get_parameter("weight").detach() != 0 for r in reports
    }
    return PruneResult(pruned, masks, report)


def _goals(task: Task, names: list[str], skipped: dict[str, str], options: Options) -> Goals:
    """The goals of the layers, with what is measured for them kept for the calls after this one."""
    unknown = not task.measured.metrics
    if task.checkpoint is not None and unknown:
        task.checkpoint.load_measured(task.measured)
        unknown = not task.measured.metrics
    goals = set_goals(task.model, task.trace, names, skipped, options, task.solve_on, task.run, task.device, task.measured)
    if task.checkpoint is not None and unknown and task.measured.metrics:
        task.checkpoint.save_measured(task.measured)
    return goals


def _observe(
    model: nn.Module,
    pruned: nn.Module,
    layer: TracedLayer,
    batches: list[Any],
    run: calibrations.Run,
    device: torch.device | str | None,
    *,
    two_streams: bool,
) -> Layer:
    """The rows of one layer's program: inputs from the network pruned so far where there are two streams, targets from the dense one."""
    A, Z = capture.rows(model, batches, run, layer.module, device=device)
    disturbed = False
    if two_streams:
        seen, _ = capture.rows(pruned, batches, run, pruned.get_submodule(layer.name), device=device)
        if seen.shape != A.shape:
            raise RouteError(
                f"layer {layer.name!r} has {seen.shape[0]} rows in the pruned network and {A.shape[0]} in the dense one; its shape depends on "
                "values, which a cascade cannot follow: use mode='parallel'"
            )
        # what rounding alone makes is no disturbance: a multiple of it is a budget that nothing can be pruned within
        # in float64: squares of 1e-30 are none in float32
        difference, size = (float(torch.linalg.vector_norm(rows, dtype=torch.float64)) for rows in (seen - A, A))
        disturbed = difference > _ROUNDING * torch.finfo(A.dtype).eps * size
        A = seen
    Y = Z.clamp(min=0) if layer.activation == "relu" else Z
    return Layer(layer.name, A, Y, Z, layers.as_matrix(layer.module).to(A), layer.activation, disturbed)


def _some_rows(layer: Layer, count: int, seed: int) -> Layer:
    """``count`` of the layer's rows, in order; the same ones for the same seed and number of rows."""
    drawn = torch.randperm(layer.inputs.shape[0], generator=torch.Generator().manual_seed(seed))[:count]
    index = drawn.sort().values.to(layer.inputs.device)
    return dataclasses.replace(layer, inputs=layer.inputs[index], targets=layer.targets[index], outputs=layer.outputs[index])


def _failure(name: str, stored: Stored) -> NetTrimError:
    kind = InfeasibleError if stored.solution.status == "infeasible" else ConvergenceError
    return kind(f"layer {name!r}: {stored.failure}. The model is unchanged; on_failure='keep_dense' would keep this layer dense and go on")


def _share(discrepancy: float, targets: Tensor) -> float:
    """A discrepancy relative to the norm of the targets (P, M)."""
    norm = float(targets.double().norm())
    return discrepancy / norm if norm > 0 else 0.0 if discrepancy == 0 else math.inf


def _gap(record: Record) -> float:
    return math.inf if record.report is None else record.report.gap


def _record(module: nn.Module, seen: Layer, budget: Budget, stored: Stored, seconds: float, dropped_rows: bool, holdout: float | None) -> Record:
    status = stored.solution.status
    if stored.failure is not None:
        return Record(status, seconds, dropped_rows, None, None, stored.failure)
    promise = make_promise(module, seen.inputs, seen.targets, seen.dense, stored.promise, budget.inflation)
    return Record(status, seconds, dropped_rows, _layer_report(module, seen, stored, holdout), promise, None)


def _layer_report(module: nn.Module, seen: Layer, stored: Stored, holdout: float | None) -> LayerReport:
    weight = module.get_parameter("weight")
    nonzeros = int((weight != 0).sum())
    relative = _share(stored.discrepancy, seen.targets)
    solution = stored.solution
    return LayerReport(
        name=seen.name,
        shape=(weight.shape[0], weight[0].numel()),
        rows=seen.inputs.shape[0],
        nonzeros=nonzeros,
        density=nonzeros / weight.numel(),
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
        weight_bytes=weight.numel() * weight.element_size(),
        history=solution.history,
    )
