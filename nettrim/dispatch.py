"""Each layer's program to a solver: one after the other, or all through an executor."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from typing import Any

from torch import Tensor

from nettrim import sharing
from nettrim.budgets import Budget
from nettrim.errors import NetTrimError
from nettrim.holding import quiet
from nettrim.observing import Layer
from nettrim.options import Options
from nettrim.programs import LayerProgram
from nettrim.solvers import Solution, solve
from nettrim.solvers.base import stacked
from nettrim.tracing import TracedLayer

_FLOOR = 0.1  # of the mean weight: what keeps a zero from staying one for ever


def solutions(
    chosen: Iterable[TracedLayer],
    prepare: Callable[[TracedLayer], tuple[Layer, Budget]],
    options: Options,
    executor: Executor | None,
) -> Generator[tuple[Layer, Budget, Solution], None, None]:
    """Each layer with its solution: one at a time in execution order, or all through the executor, as soon as it is solved, wide ones in blocks."""
    if executor is None or options.mode == "cascade":
        for layer in chosen:
            seen, budget = prepare(layer)
            found = (seen, *_blocks(seen, budget, options, executor))
            del seen, budget
            yield found
            del found  # its rows, before those of the next layer are looked at
        return
    waiting: dict[Future[tuple[Budget, Solution]], Layer] = {}
    wide: list[tuple[Layer, Budget]] = []
    try:
        for layer in chosen:
            seen, budget = prepare(layer)
            if options.neurons is not None and seen.dense.shape[0] > options.neurons:
                wide.append((seen, budget))
                continue
            with _blaming_executor(seen), quiet():
                future = executor.submit(_solve, budget, seen.dense, options.solver, options.tol, options.max_iter, options.reweight)
            waiting[future] = seen
            yield from _done(waiting, timeout=0)
        for seen, budget in wide:  # their blocks queue behind the layers
            yield seen, *_blocks(seen, budget, options, executor)
        while waiting:
            yield from _done(waiting, timeout=None)
    finally:
        for future in waiting:
            future.cancel()


def _blocks(seen: Layer, budget: Budget, options: Options, executor: Executor | None) -> tuple[Budget, Solution]:
    """One layer solved from here: in this process, or its blocks of neurons through the executor."""
    neurons = options.neurons if options.neurons is not None and options.neurons < seen.dense.shape[0] else None
    spread = {} if neurons is None else {"neurons": neurons, "executor": executor}
    with _blaming_executor(seen) if spread and executor is not None else contextlib.nullcontext():
        return _solve(budget, seen.dense, options.solver, options.tol, options.max_iter, options.reweight, **spread)


def _done(
    waiting: dict[Future[tuple[Budget, Solution]], Layer], timeout: float | None
) -> Iterator[tuple[Layer, Budget, Solution]]:
    """Those that are solved, before one that failed; they are waited for no more, nor held in memory."""
    done = wait(waiting, timeout, FIRST_COMPLETED).done
    for future in sorted((future for future in waiting if future in done), key=_failed):
        seen = waiting.pop(future)
        with _blaming_executor(seen):
            budget, solution = future.result()
        yield seen, budget, solution


def _failed(future: Future[tuple[Budget, Solution]]) -> bool:
    return future.cancelled() or future.exception() is not None


@contextlib.contextmanager
def _blaming_executor(layer: Layer) -> Iterator[None]:
    try:
        yield
    except NetTrimError:
        raise
    except Exception as error:
        raise NetTrimError(
            f"the executor failed on layer {layer.name!r} ({type(error).__name__}: {error}); it must accept work, and its workers need nettrim, "
            f"torch and memory for {layer.rows} rows"
        ) from error


def _solve(
    budget: Budget, dense: Tensor, solver: str, tol: float, max_iter: int | None, reweight: int, **spread: Any
) -> tuple[Budget, Solution]:
    """The solution, and the budget with the program that it is one of: the last round's where the ℓ1 norm is reweighted."""
    sharing.thread_count()  # a thread that is new to torch takes the process's number before anything is summed
    programs, found = list(budget.programs), []
    for place, (first, start) in enumerate(zip(budget.programs, dense.split(dense.shape[0] // len(budget.programs)), strict=True)):
        solution = solve(first, solver, tol=tol, max_iter=max_iter, initial=start, **spread)
        for _ in range(reweight):
            if solution.status not in ("optimal", "feasible"):
                break
            program = reweighted(first, solution.weights)
            # feasible already: the set is the same
            again = solve(program, solver, tol=tol, max_iter=max_iter, initial=solution.weights, **spread)
            programs[place] = program
            solution = dataclasses.replace(again, iterations=solution.iterations + again.iterations, seconds=solution.seconds + again.seconds)
        found.append(solution)
    return dataclasses.replace(budget, programs=tuple(programs)), stacked(found, tol)


def reweighted(program: LayerProgram, W: Tensor) -> LayerProgram:
    """The program with ``ω/(|w| + δ)`` in the place of the ``ω`` given, δ a tenth of the mean size of the weights ``W`` (M, N) that are not zero."""
    omega = program.l1_weights
    assert isinstance(omega, Tensor)
    size = W.abs()
    nonzeros = size[(size > 0) & (omega > 0)]
    if nonzeros.numel() == 0:
        return program
    mean = nonzeros.mean()
    return dataclasses.replace(program, l1_weights=omega * mean / (size + _FLOOR * mean))
