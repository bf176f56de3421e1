"""A layer in blocks of neurons: one after the other where all outputs at once would not fit, or side by side on an executor.

Given λ, ``λ Σ ω|w| + ½ misfit`` is a sum over neurons, so that a penalised program is solved block by block, and its bound is the sum of the blocks'.
A budget joins the neurons. Its λ is sought from outside: the misfit grows with λ, every λ gives the bound

    Σ ω|w| ≥ (b − ½ε²)/λ    for all weights with misfit ≤ ε²,  as  b ≤ λ Σ ω|w| + ½ misfit

from the blocks' bounds ``b``, and every λ whose misfit is within the budget gives a feasible point. Both meet at the λ that spends the budget.

Programs with a number of nonzeros are not convex, and no λ says how the number is to be divided. They separate where every neuron has its own:
``n:m``, and a given support.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future

import torch
from torch import Tensor

from nettrim.holding import hold, quiet
from nettrim.programs import LayerProgram
from nettrim.rows import Stream
from nettrim.solvers.base import Best, Solution, judge
from nettrim.solvers.feasibility import rounding_margin, smallest_step
from nettrim.solvers.splitting import first_level

_ROUNDS = 30
_STEP = 10.0  # by which λ may change until both sides of the budget have been seen
_LEAST_STEP = 1.5
_CLOSE = 1e-3
_SHARE = 0.25  # of the tolerance for what a block's own solve leaves open

Solve = Callable[..., Solution]


def refuses(program: LayerProgram) -> str | None:
    """Why a program does not come apart into blocks of neurons, or None."""
    if program.supports is not None and not _own_counts(program):
        return "its weights are counted over all of them"
    if program.S is not None and program.S.couples:
        return "its metric weighs the errors of all neurons together"
    if program.one_sided and program.epsilon is not None:
        return "its inequalities are met to a share of the budget, which blocks of neurons don't know; give regularization=, or all neurons at once"
    return None


def _own_counts(program: LayerProgram) -> bool:
    """Whether every neuron has a number of nonzeros of its own: that of a pattern ``n:m``, or all of a given support."""
    supports = program.supports
    if supports is None or program.nonzeros is None:
        return False
    whole = supports.allowed is not None and supports.kept == int(supports.allowed[:, supports.counted].sum())
    return whole or supports.pattern.kept_of is not None


def run(
    program: LayerProgram, solve: Solve, name: str, tol: float, max_iter: int | None, initial: Tensor | None, neurons: int, executor: Executor | None
) -> Solution:
    """Solve for at most ``neurons`` neurons at a time with ``solve(program, name, tol=, max_iter=, initial=)``."""
    began = time.perf_counter()
    blocks = [slice(start, min(start + neurons, program.shape[0])) for start in range(0, program.shape[0], neurons)]
    iterations, held = 0, program if executor is None else hold(executor, program)

    def at(level: float | None, tolerance: float, start: Tensor | None) -> tuple[Tensor, float]:
        """Weights of the penalised program at λ (None: with a number of nonzeros), and the bound of all blocks together."""
        nonlocal iterations
        tasks = ((held, block, level, solve, name, tolerance, max_iter, None if start is None else start[block].clone()) for block in blocks)
        if executor is None:
            parts = [_solve_part(*task) for task in tasks]
        else:
            with quiet():
                futures: list[Future[Solution]] = [executor.submit(_solve_part, *task) for task in tasks]
            try:
                parts = [future.result() for future in futures]
            finally:
                for future in futures:
                    future.cancel()
        iterations += max(part.iterations for part in parts)
        return torch.cat([part.weights for part in parts]), sum(part.lower_bound for part in parts)

    if program.supports is not None:
        W, bound = at(None, tol, initial)
    elif program.regularization is not None:
        W, bound = at(program.regularization, tol, initial)
    else:
        W, bound = _budget(program, at, tol, initial)
    return judge(program, W, bound, tol=tol, iterations=iterations, seconds=time.perf_counter() - began, solver=name)


@dataclasses.dataclass
class _Side:
    """A λ on one side of the budget, its weights, and ``log misfit/ε²``."""

    level: float
    W: Tensor
    excess: float


def _budget(
    program: LayerProgram, at: Callable[[float, float, Tensor | None], tuple[Tensor, float]], tol: float, initial: Tensor | None
) -> tuple[Tensor, float]:
    """The best feasible weights and the best bound over a sequence of λ that closes in on the budget."""
    assert program.epsilon is not None
    budget, W, best = program.epsilon**2, initial, Best(None, math.inf, 0.0)
    zero = torch.zeros(program.shape, dtype=program.dtype, device=program.device)
    _offer(program, best, zero)
    if initial is not None:
        _offer(program, best, initial)
    level, share = first_level(program), _SHARE
    below: _Side | None = None
    above: _Side | None = None
    for _ in range(_ROUNDS):
        if best.gap <= tol or budget == 0:
            break
        W, b = at(level, share * tol, W)
        best.bound = max(best.bound, (b - 0.5 * budget) / level)
        excess = math.log(max(program.misfit(W) / budget, 1e-30))
        if excess <= 0:
            below = _Side(level, W, excess)
            _offer(program, best, W)
        else:
            above = _Side(level, W, excess)
        if below is None or above is None:
            step = min(max(math.exp(0.5 * abs(excess)), _LEAST_STEP), _STEP)  # misfit ~ λ², where no part of it is there for every λ
            level *= step if above is None else 1 / step
            continue
        _offer(program, best, _between(program, below.W, above.W))
        width = math.log(above.level / below.level)
        if width > _CLOSE:
            level = below.level * math.exp(width * min(max(-below.excess / (above.excess - below.excess), 0.1), 0.9))
        else:  # what the blocks' own tolerance leaves open now decides
            share /= 4
            level = math.sqrt(below.level * above.level)
    found = (best.W, W, zero)
    return next(weights for weights in found if weights is not None), best.bound


def _offer(program: LayerProgram, best: Best, W: Tensor) -> None:
    objective = program.norm(W)
    if objective < best.objective and program.is_feasible(W):
        best.W, best.objective = W, objective


def _between(program: LayerProgram, inside: Tensor, outside: Tensor) -> Tensor:
    """The point nearest to ``outside`` on the way from there to ``inside`` that keeps the budget.

    Its norm is no more than the way says, and both ends are optimal for almost the same λ: so is it.
    """
    assert program.epsilon is not None
    margin = rounding_margin(program, inside.dtype)
    budget = (program.epsilon * (1 - margin)) ** 2

    def excess(t: float) -> float:
        return program.misfit(torch.lerp(outside, inside, t)) / budget - 1

    end = excess(1.0)
    return inside if end > 0 else torch.lerp(outside, inside, smallest_step(excess, max(excess(0.0), 0.0), end, margin))


def _solve_part(
    program: LayerProgram, block: slice, level: float | None, solve: Solve, name: str, tol: float, max_iter: int | None, initial: Tensor | None
) -> Solution:
    """What a worker does: its block of the program that it holds."""
    return solve(_part(program, block, level), name, tol=tol, max_iter=max_iter, initial=initial)


def _part(program: LayerProgram, block: slice, level: float | None) -> LayerProgram:
    """A block of neurons: their penalised program at λ, or (None) the one with their own numbers of nonzeros."""
    omega = program.l1_weights
    assert isinstance(omega, Tensor)
    targets, supports = program.targets, program.supports
    support = None if program.support is None else program.support[block]
    nonzeros = None
    if supports is not None and supports.pattern.kept_of is None:
        assert support is not None
        nonzeros = int(support[:, supports.counted].sum())
    elif supports is not None:
        nonzeros = supports.pattern.kept((block.stop - block.start, int(supports.counted.sum())), 0.0)
    return dataclasses.replace(
        program,
        moments=None if program.moments is None else program.moments.of(block),
        targets=targets[:, block] if isinstance(targets, Tensor) else _columns(targets, block),
        upper=None if program.upper is None else program.upper[:, block],
        floor=None if program.floor is None else program.floor[block],
        ceiling=None if program.ceiling is None else program.ceiling[block],
        l1_weights=omega[block] if omega.ndim == 2 else omega,
        metric=None if program.S is None else program.S.of_outputs(block),
        support=support,
        nonzeros=nonzeros,
        epsilon=None,
        regularization=level,
    )


def _columns(targets: Stream, block: slice) -> Stream:
    """A stream of the same rows, of some neurons only."""

    def chunks() -> Iterator[Tensor]:
        for chunk in targets():
            yield torch.as_tensor(chunk)[:, block]

    return chunks
