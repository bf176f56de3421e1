"""``nettrim.prune``: the order of the stages, and only that."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nettrim import calibration as calibrations
from nettrim import capture, dispatch, layers, selection
from nettrim.budgets import Budget, Layer
from nettrim.certificate import Promise, certify, make_promise, network_bound
from nettrim.errors import ArgumentError, ConvergenceError, InfeasibleError, NetTrimError
from nettrim.goals import set_goals
from nettrim.options import Options, check_device
from nettrim.progress import Progress, ProgressEvent
from nettrim.report import LayerReport, Report
from nettrim.selection import Pattern
from nettrim.solvers import Solution
from nettrim.storing import Stored, store
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


@torch.inference_mode(False)
def prune(
    model: nn.Module,
    calibration: Any,
    *,
    epsilon: float | Mapping[str, float] | None = None,
    sparsity: float | Mapping[str, float] | None = None,
    pattern: str = "unstructured",
    mode: str = "cascade",
    gamma: float = 1.1,
    repair: float = 1.0,
    preserve_zeros: bool = False,
    kappa: float = 1.0,
    consistency: str = "relaxed",
    penalty: str = "l1",
    solver: str = "auto",
    tol: float = 1e-3,
    max_iter: int | None = None,
    bias_weight: float = 1.0,
    targets: Iterable[Pattern] | Pattern | None = None,
    ignore: Iterable[Pattern] | Pattern = (),
    holdout: float = 0.1,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    max_rows: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    inplace: bool = False,
    progress: bool | Callable[[ProgressEvent], None] | None = None,
    executor: Executor | None = None,
    on_failure: str = "raise",
) -> PruneResult:
    """Prune a trained network by one convex program a layer, and certify the result.

    Parameters
    ----------
    model : nn.Module
        Any module; its ``nn.Linear`` layers are pruned. It may be in train mode: it is run in evaluation mode and left as it was.
    calibration : Tensor, tuple, mapping, or iterable of batches
        Unlabelled samples; labels are ignored by the rule of :func:`nettrim.calibration.runner`.
    epsilon : float or mapping
        Budget on each layer's output discrepancy, relative to the Frobenius norm of that output; or ``{name or pattern: budget}``. In a cascade
        one number is the first layer's budget, and ``gamma`` sets the others'; a mapping sets every layer's own.
    sparsity : float or mapping
        Instead: the share of each layer's weights, biases apart, that is to be zero, exactly to one weight (one block); or ``{name or pattern:
        share}``. The rest, and the biases, are the best that there are for the zeros chosen: nothing is shrunk.
    pattern : str
        Which weights may be zero together (:func:`nettrim.patterns.parse`): ``"unstructured"``; ``"n:m"``, n *kept* of every m inputs, which says
        the sparsity; ``"block:RxC"``, blocks of R outputs and C inputs; ``"neuron"``, that share of a layer's outputs, with what the next
        layer reads from them (:func:`nettrim.shrink` then takes them out).
    mode : {"cascade", "parallel"}
        Whether a layer sees the inputs of the network pruned so far, or the dense network's.
    gamma : float
        Cascade: how far a layer may exceed, squared, what the dense weights would leave on the disturbed inputs.
    repair : float
        Cascade, with ``sparsity``: from 1, every layer makes up for what the layers before it broke (its targets are the dense network's outputs),
        to 0, it keeps to its own weights on its disturbed inputs.
    preserve_zeros : bool
        With ``sparsity``: weights that are zero stay so, and count.
    kappa : float
        Cascade: a factor in (0, 1] on the last layer's squared budget, where ``gamma`` sets it (the risk coefficient of the 2017 supplement);
        may be infeasible.
    consistency : {"relaxed", "paper"}
        The set that keeps a layer before a ReLU to its targets; see :mod:`nettrim.programs`.
    penalty : {"l1", "l0"}
        With ``epsilon``: the papers' objective, whose solution is proven; or the fewest weights found that keep the same budget, fitted to it, so
        that it is spent on zeros and not on shrinkage.
    solver : str
        See :func:`nettrim.solve`; ``"auto"`` takes every program.
    tol : float
        Relative duality gap at which a layer's solution is called optimal.
    max_iter : int, optional
        Of the solver, for each layer.
    bias_weight : float
        ``ω`` of the bias column: 1 as in the papers' code, 0 leaves biases free.
    targets, ignore : names, globs, ``"re:..."`` or module types
        Which layers; a pattern that matches nothing is an error.
    holdout : float
        Share of the samples kept out, to audit the certificate on.
    forward_fn : callable(model, batch), optional
        Where ``model(batch)`` is not how a batch is run.
    max_rows : int, optional
        Solve on at most that many rows a layer, drawn with ``seed``. Where rows are left out the promise is on those drawn, and there is no
        network bound.
    seed : int
        Of the samples kept out and the rows drawn.
    device : optional
        Where the programs are solved; the layer's own device by default.
    inplace : bool
        Write into ``model`` itself, at the end, when everything has succeeded.
    progress : True or callable(ProgressEvent), optional
        True shows a bar.
    executor : concurrent.futures.Executor, optional
        Parallel mode: the layers' programs are solved through it. The weights are those of a serial run, bit for bit, where its workers run
        torch with as many threads.
    on_failure : {"raise", "keep_dense"}
        What happens to a layer whose program is infeasible or not solved; nothing infeasible is ever written.

    Returns
    -------
    PruneResult

    Raises
    ------
    ArgumentError
        An argument is not as described; CalibrationError if it is the calibration data.
    InfeasibleError, ConvergenceError
        A layer's program has no solution, or none was found, with ``on_failure="raise"``.

    Notes
    -----
    After any error the model is as it was. Aghasi, Abdi, Nguyen, Romberg, NIPS 2017; Aghasi, Abdi, Romberg, SIAM J. Math. Data Sci. 2020.
    """
    start = time.perf_counter()
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    options = Options(
        epsilon, sparsity, pattern, repair, preserve_zeros, mode, gamma, kappa, consistency, penalty, solver, tol, max_iter, bias_weight, holdout,
        max_rows, seed, on_failure,
    )  # fmt: skip
    options.check()
    check_device(device)
    if any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
        raise ArgumentError("the model was made under torch.inference_mode(), where torch neither copies nor changes tensors; make it outside")
    if forward_fn is not None and not callable(forward_fn):
        raise ArgumentError(f"forward_fn={forward_fn!r}; expected a callable(model, batch)")
    if executor is not None and not hasattr(executor, "submit"):
        raise ArgumentError(f"executor is a {type(executor).__name__}; expected a concurrent.futures.Executor")
    if executor is not None and mode != "parallel":
        raise ArgumentError("executor was given with mode='cascade', where each layer waits for the one before; use mode='parallel'")
    run = calibrations.runner(forward_fn)
    solve_on, keep_out = calibrations.split(calibrations.batches(calibration), holdout, seed)
    traced = trace(model, solve_on, run)
    names, skipped = selection.select(model, traced, targets, ignore)
    goals = set_goals(model, traced, names, skipped, options, solve_on, run, device)
    chosen = [layer for layer in traced.layers if layer.name in goals.names]
    last = traced.layers[-1].name
    if kappa != 1 and last not in goals.names:
        raise ArgumentError(f"kappa={kappa} tightens the budget of the last layer, {last!r}, which is not pruned ({skipped[last]}); leave kappa at 1")
    # before hours of solving, not after: the network's outputs can be compared
    dense_outputs = [capture.outputs(model, part, run) for part in (solve_on, keep_out) if part]
    pruned = _copy(model)
    dropped_rows = False
    reports: list[LayerReport] = []
    promises: dict[str, Promise] = {}

    def prepare(layer: TracedLayer) -> tuple[Layer, Budget]:
        nonlocal dropped_rows
        seen = _observe(model, pruned, layer, solve_on, run, device, two_streams=mode == "cascade")
        if max_rows is not None and max_rows < seen.inputs.shape[0]:
            seen, dropped_rows = _some_rows(seen, max_rows, seed), True
        return seen, goals.budget(layer, seen, last=layer.name == last)

    def finish(seen: Layer, budget: Budget, solution: Solution) -> str:
        stored = store(pruned.get_submodule(seen.name), seen, budget, solution, options.solver, options.tol, options.max_iter)
        if stored.failure is not None:
            if on_failure == "raise":
                raise _failure(seen.name, stored)
            skipped[seen.name] = f"kept dense: {stored.failure}"
            return stored.solution.status
        module = pruned.get_submodule(seen.name)
        reports.append(_layer_report(module, seen, stored))
        promises[seen.name] = make_promise(module, seen.inputs, seen.targets, seen.dense, stored.promise, budget.inflation)
        return stored.solution.status

    with Progress(progress, len(chosen)) as report_progress, contextlib.closing(dispatch.solutions(chosen, prepare, options, executor)) as solved:
        for seen, budget, solution in solved:
            report_progress(seen.name, finish(seen, budget, solution))
    why_not = "with max_rows the promises cover the rows that were drawn" if dropped_rows else traced.not_chain_reason
    guaranteed = None if why_not is not None else network_bound(model, pruned, traced, promises, mode)
    outputs = [(dense, capture.outputs(pruned, part, run)) for dense, part in zip(dense_outputs, (solve_on, keep_out), strict=False)]
    entries = sum(math.prod(r.shape) for r in reports)
    report = Report(
        layers=tuple(reports),
        skipped=skipped,
        certificate=certify(tuple(reports), outputs[0], outputs[1] if keep_out else None, guaranteed, why_not),
        options=options.describe(),
        density=sum(r.nonzeros for r in reports) / entries if entries else 1.0,
        seconds=time.perf_counter() - start,
    )
    masks = {
        f"{r.name}.weight".lstrip("."): pruned.get_submodule(r.name).get_parameter("weight").detach() != 0 for r in reports
    }
    if inplace:
        _transfer(pruned, model, [r.name for r in reports])
        pruned = model
    return PruneResult(pruned, masks, report)


def _transfer(source: nn.Module, target: nn.Module, names: list[str]) -> None:
    """Write the layers ``names`` of one network into another: all of them, or (after any exception) none."""
    before = [(target.get_submodule(name), layers.as_matrix(target.get_submodule(name))) for name in names]
    try:
        for name in names:
            layers.write_back(target.get_submodule(name), layers.as_matrix(source.get_submodule(name)))
    except BaseException:
        for module, matrix in before:
            layers.write_back(module, matrix)
        raise


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise ArgumentError(
            f"the model cannot be copied ({type(error).__name__}: {error}); expected a module that copy.deepcopy takes: "
            "drop what it caches, e.g. tensors that carry gradients"
        ) from error


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
            raise NetTrimError(
                f"layer {layer.name!r} has {seen.shape[0]} rows in the pruned network and {A.shape[0]} in the dense one; its shape depends on "
                "values, which a cascade cannot follow: use mode='parallel'"
            )
        disturbed = not torch.equal(seen, A)
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


def _layer_report(module: nn.Module, seen: Layer, stored: Stored) -> LayerReport:
    weight = module.get_parameter("weight")
    nonzeros = int((weight != 0).sum())
    norm = float(seen.targets.double().norm())
    solution = stored.solution
    return LayerReport(
        name=seen.name,
        shape=(weight.shape[0], weight[0].numel()),
        rows=seen.inputs.shape[0],
        nonzeros=nonzeros,
        density=nonzeros / weight.numel(),
        epsilon=stored.promise,
        discrepancy=stored.discrepancy,
        relative_discrepancy=stored.discrepancy / norm if norm > 0 else 0.0 if stored.discrepancy == 0 else math.inf,
        objective=solution.objective,
        lower_bound=solution.lower_bound,
        gap=solution.gap,
        status=solution.status,
        iterations=solution.iterations,
        seconds=solution.seconds,
        solver=solution.solver,
        activation=seen.activation,
    )
