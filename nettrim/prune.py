"""``nettrim.prune``: what a caller may ask for, and who does it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from nettrim import batchnorm, checkpoints, digests, fingerprints, layers, selection, trials
from nettrim import calibration as calibrations
from nettrim.errors import ArgumentError
from nettrim.options import Options, check_device
from nettrim.pipeline import PruneResult, Task
from nettrim.progress import ProgressEvent
from nettrim.safeguard import Before
from nettrim.selection import Pattern
from nettrim.sharing import turn
from nettrim.surroundings import left_out
from nettrim.surveying import survey

__all__ = ["ProgressEvent", "PruneResult", "prune"]

_INTO: ContextVar[nn.Module | None] = ContextVar("into", default=None)


@torch.inference_mode(False)
def prune(
    model: nn.Module,
    calibration: Any,
    *,
    epsilon: float | Mapping[str, float] | None = None,
    sparsity: float | Mapping[str, float] | None = None,
    budget: float | None = None,
    pattern: str = "unstructured",
    allocation: str = "auto",
    fidelity: str = "network",
    mode: str = "cascade",
    gamma: float = 1.1,
    repair: float | str = 1.0,
    damping: float = 0.0,
    preserve_zeros: bool = False,
    kappa: float = 1.0,
    consistency: str = "relaxed",
    penalty: str = "auto",
    reweight: int = 0,
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
    checkpoint_dir: str | os.PathLike[str] | None = None,
    on_failure: str = "raise",
    neurons: int | None = None,
    recalibrate_batchnorm: bool = False,
    blocks: str | Iterable[str] | None = "auto",
) -> PruneResult:
    """Prune a trained network by one convex program a layer, and certify the result.

    Parameters
    ----------
    model : nn.Module
        Any module; its layers of the types in :mod:`nettrim.layers` are pruned (docs/layers.md). It may be in train mode: it is run in evaluation
        mode and left as it was.
    calibration : Tensor, tuple, mapping, or iterable of batches
        Unlabelled samples; labels are ignored by the rule of :func:`nettrim.calibration.runner`.
    epsilon : float or mapping
        Budget on each layer's output discrepancy, relative to the Frobenius norm of that output; or ``{name or pattern: budget}``. In a cascade
        one number is the first layer's budget, and ``gamma`` sets the others'; a mapping sets every layer's own.
    sparsity : float or mapping
        Instead: the share of the weights, biases apart, that is to be zero, exactly to one weight (one block); or ``{name or pattern: share}``
        of each layer's. The rest, and the biases, are the best that there are for the zeros chosen: nothing is shrunk.
    budget : float
        Or: how far the network's output may be off, relative to its Frobenius norm, measured on the samples solved on. The sparsest network found
        within it is returned, its ``sparsity`` in ``report.options``; the network is pruned several times for it.
    pattern : str
        Which weights may be zero together (:func:`nettrim.patterns.parse`): ``"unstructured"``; ``"n:m"``, n *kept* of every m inputs, which says
        the sparsity; ``"block:RxC"``, blocks of R outputs and C inputs; ``"neuron"``, that share of a layer's outputs, with what the next
        layer reads from them (:func:`nettrim.shrink` then takes them out).
    allocation : {"auto", "uniform"}
        How one ``sparsity`` is spread: where a weight does most for the network's output (unstructured zeros; :mod:`nettrim.allocation`), or the same
        share in every layer.
    fidelity : {"network", "diagonal", "layer"}
        With ``sparsity`` or ``budget``: what the weights are chosen and fitted for, the network's output, so that a layer's errors count by what they
        do there (:mod:`nettrim.sensitivity`; it takes gradients), or each layer's own output. ``"diagonal"`` weighs every output of a layer by what
        its errors do there, each by itself: a part of the gain for a part of the time, and no matrix as large as the outputs squared.
    mode : {"cascade", "parallel"}
        Whether a layer sees the inputs of the network pruned so far, or the dense network's.
    gamma : float
        Cascade: how far a layer may exceed, squared, what the dense weights would leave on the disturbed inputs.
    repair : float
        Cascade, with ``sparsity``: from 1, every layer makes up for what the layers before it broke (its targets are the dense network's outputs),
        to 0, it keeps to its own weights on its disturbed inputs. ``"auto"`` tries a few and takes the one that does best on the samples kept out.
    damping : float
        With ``sparsity``: weights are also kept near the dense ones, by so much as if every input had independent noise of this share of its energy,
        from 0 to 1e9 (:mod:`nettrim.counted`). What is pruned then fits the calibration samples less closely, and other inputs better.
    preserve_zeros : bool
        With ``sparsity``: weights that are zero stay so, and count.
    kappa : float
        Cascade: a factor in (0, 1] on the last layer's squared budget, where ``gamma`` sets it (the risk coefficient of the 2017 supplement);
        may be infeasible.
    consistency : {"relaxed", "paper"}
        The set that keeps a layer before a ReLU to its targets; see :mod:`nettrim.programs`.
    penalty : {"auto", "l0", "l1"}
        With ``epsilon``: the fewest weights found that keep the budget, fitted to it, so that it is spent on zeros and not on shrinkage
        (``"l0"``); or the papers' objective, whose solution is proven to be close to its optimum (``"l1"``). ``"auto"`` is ``"l0"``, but ``"l1"``
        with what only that has: ``consistency="paper"``, ``reweight``, ``bias_weight``, ``neurons``, or a convex solver by name.
    reweight : int
        With ``epsilon`` and ``"l1"``: so many more rounds, each with weights ``1/(|w| + δ)`` from the one before in the ℓ1 norm (Candès, Wakin, Boyd,
        J. Fourier Anal. Appl. 2008): fewer weights within the same budget, every round convex, and proven for its own objective.
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
        Solve on at most that many rows a layer (samples, tokens, patches), drawn uniformly with ``seed``. Promises are about all rows, and
        measured on all.
    seed : int
        Of the samples kept out and the rows drawn.
    device : optional
        Where the programs are solved; the layer's own device by default.
    inplace : bool
        Write into ``model`` itself, at the end, when everything has succeeded.
    progress : True or callable(ProgressEvent), optional
        True shows a bar.
    executor : concurrent.futures.Executor, optional
        Where the layers' programs are solved in parallel mode, and the blocks of a layer with ``neurons`` in both. The weights are those of a
        serial run, bit for bit, where its workers run torch with as many threads. With Dask: ``Client(...).get_executor()``.
    checkpoint_dir : path, optional
        A folder that remembers every layer as soon as it is solved: the same call, made again after it was cut off, goes on there, and ends with the
        same weights, bit for bit. ``report.options["checkpoint"]`` says how many layers were taken from it. A folder of another model, calibration
        set, options or version is refused, and so is a second call at the same time. Remove it when it is no longer wanted.
    on_failure : {"raise", "keep_dense"}
        What happens to a layer whose program is infeasible or not solved; nothing infeasible is ever written.
    neurons : int, optional
        Layers with more outputs are solved in blocks of at most so many, side by side where there is an ``executor``: budgets with the ℓ1 penalty and
        the relaxed set, ``"neuron"``, and ``"n:m"`` without ``fidelity="network"`` (docs/scaling.md says why not the others).
    recalibrate_batchnorm : bool
        Estimate the running statistics of the pruned network's BatchNorms again, on the samples solved on. What is measured of the network is
        measured with them; the layers' promises are about the dense network's, and there is no network bound.
    blocks : str, several, or None
        How a deep network is run (docs/big-models.md): block by block, each brought to ``device`` and put back, the hidden states carried along,
        so that the work grows with the depth and not with its square. The weights are the same. ``"auto"`` finds the blocks where the network has
        some, and ``report.options["blocks"]`` says which, or why there are none; the name of the module whose children they are, or their own
        names or globs, are refused where the network is not made like that; None runs the whole network up to each layer.

    Returns
    -------
    PruneResult

    Raises
    ------
    ArgumentError
        An argument is not as described; CalibrationError if it is the calibration data.
    InfeasibleError, ConvergenceError
        A layer's program has no solution, or none was found, with ``on_failure="raise"``.
    RouteError
        A layer does not run in some batch, or not as the first batch or the dense network had shown; the layer is named.
    CheckpointError
        ``checkpoint_dir`` is in use, of another run, or cannot be read or written.

    Notes
    -----
    After any error the model is as it was. An autocast that the call is made under is left out, and the default device is the model's alone;
    of an autocast inside the network's own forward, layers are measured in their weights' dtype, and the output as the network runs.
    Aghasi, Abdi, Nguyen, Romberg, NIPS 2017; Aghasi, Abdi, Romberg, SIAM J. Math. Data Sci. 2020.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    options = Options(
        epsilon, sparsity, budget, pattern, allocation, fidelity, repair, damping, preserve_zeros, mode, gamma, kappa, consistency, penalty, reweight,
        solver, tol, max_iter, bias_weight, holdout, max_rows, seed, on_failure, neurons, recalibrate_batchnorm,
    )  # fmt: skip
    options.check()
    options = options.resolved()
    check_device(device)
    layers.check_initialised(model)
    if any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
        raise ArgumentError("the model was made under torch.inference_mode(), where torch neither copies nor changes tensors; make it outside")
    if forward_fn is not None and not callable(forward_fn):
        raise ArgumentError(f"forward_fn={forward_fn!r}; expected a callable(model, batch)")
    if executor is not None and not hasattr(executor, "submit"):
        raise ArgumentError(f"executor is a {type(executor).__name__}; expected a concurrent.futures.Executor")
    if executor is not None and mode != "parallel" and neurons is None:
        raise ArgumentError(
            "executor was given with mode='cascade', where each layer waits for the one before; use mode='parallel', or neurons= for blocks"
        )
    if targets is not None:
        targets = selection.listed(targets, "targets")
    ignore = selection.listed(ignore, "ignore")
    before: Before | None = None
    try:
        with left_out():
            run = calibrations.runner(forward_fn)
            found = calibrations.batches(calibration)
            solve_on, keep_out = calibrations.split(found, options.holdout, options.seed)
            before = Before(model)
            spread = executor is not None and mode == "parallel"
            surveyed = survey(model, solve_on, keep_out, run, blocks=blocks, spread=spread, targets=targets, ignore=ignore, device=device)
            with contextlib.ExitStack() as stack:
                checkpoint = None
                if checkpoint_dir is not None:
                    fingerprint = fingerprints.of_run(model, found, options, targets=targets, ignore=ignore, forward_fn=forward_fn, device=device)
                    checkpoint = stack.enter_context(checkpoints.opened(checkpoint_dir, fingerprint))
                task = Task(model, solve_on, keep_out, run, surveyed, targets, ignore, device, progress, executor, _INTO.get(), checkpoint)
                result = trials.execute(task, options)
            before.check_weights()
            if checkpoint is not None:
                noted = {**result.report.options, "checkpoint": checkpoint.summary()}
                result = dataclasses.replace(result, report=dataclasses.replace(result.report, options=noted))
            result = dataclasses.replace(result, report=digests.sign(result.report, model, result.model, found))
            if inplace:
                here = layers.matrices(model)
                before.keep_weights([here[layer.name].module for layer in result.report.layers])
                result = _transfer(result, model)
        return result
    except BaseException:
        if before is not None:
            before.put_back()
        raise


def prune_into(pruned: nn.Module, model: nn.Module, calibration: Any, **options: Any) -> PruneResult:
    """As `prune`, but what is pruned is no copy made here: it is ``pruned``, which has the same weights. There are no masks: zeros say it."""
    token = _INTO.set(pruned)
    try:
        return prune(model, calibration, **options)
    finally:
        _INTO.reset(token)


def _transfer(result: PruneResult, model: nn.Module) -> PruneResult:
    """The result in the model itself."""
    with turn():
        there, here = layers.matrices(result.model), layers.matrices(model)
        for layer in result.report.layers:
            layers.write_back(here[layer.name], layers.as_matrix(there[layer.name]))
        if result.report.options["recalibrate_batchnorm"]:
            batchnorm.transfer(result.model, model)
    return PruneResult(model, result.masks, result.report)
