"""Each layer's program to a solver: one after the other, or all through an executor."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Executor, Future

from torch import Tensor

from nettrim.budgets import Budget, Layer
from nettrim.errors import NetTrimError
from nettrim.options import Options
from nettrim.solvers import Solution, solve
from nettrim.tracing import TracedLayer


def solutions(
    chosen: list[TracedLayer],
    prepare: Callable[[TracedLayer], tuple[Layer, Budget]],
    options: Options,
    executor: Executor | None,
) -> Generator[tuple[Layer, Budget, Solution], None, None]:
    """Each layer with its solution, in execution order; one at a time, or all through the executor."""
    if executor is None:
        for layer in chosen:
            seen, budget = prepare(layer)
            yield seen, budget, _solve(budget, seen.dense, options.solver, options.tol, options.max_iter)
        return
    waiting: list[tuple[Layer, Budget, Future[Solution]]] = []
    try:
        for layer in chosen:
            seen, budget = prepare(layer)
            with _blaming_executor(seen):
                future = executor.submit(_solve, budget, seen.dense, options.solver, options.tol, options.max_iter)
            waiting.append((seen, budget, future))
        for seen, budget, future in waiting:
            with _blaming_executor(seen):
                solution = future.result()
            yield seen, budget, solution
    finally:
        for _, _, future in waiting:
            future.cancel()


@contextlib.contextmanager
def _blaming_executor(layer: Layer) -> Iterator[None]:
    try:
        yield
    except NetTrimError:
        raise
    except Exception as error:
        raise NetTrimError(
            f"the executor failed on layer {layer.name!r} ({type(error).__name__}: {error}); it must accept work, and its workers need nettrim, "
            f"torch and memory for {layer.inputs.shape[0]} rows"
        ) from error


def _solve(budget: Budget, dense: Tensor, solver: str, tol: float, max_iter: int | None) -> Solution:
    return solve(budget.program, solver, tol=tol, max_iter=max_iter, initial=dense)
