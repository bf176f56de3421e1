"""A layer in blocks of neurons: one after the other where all outputs at once would not fit, or side by side on an executor.

Given λ, ``λ Σ ω|w| + ½ misfit`` is a sum over neurons, so that a penalised program is solved block by block, and its bound is the sum of the blocks'.
A budget joins the neurons. Its λ is sought from outside: the misfit grows with λ, every λ gives the bound

    Σ ω|w| ≥ (b − ½ε²)/λ    for all weights with misfit ≤ ε²,  as  b ≤ λ Σ ω|w| + ½ misfit

from the blocks' bounds ``b``, and every λ whose misfit is within the budget gives a feasible point. Both meet at the λ that spends the budget.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future

import torch
from torch import Tensor

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
    if program.one_sided and program.epsilon is not None:
        return "its inequalities are met to a share of the budget, which blocks of neurons don't know; give regularization=, or all neurons at once"
    return None


def run(
    program: LayerProgram, solve: Solve, name: str, tol: float, max_iter: int | None, initial: Tensor | None, neurons: int, executor: Executor | None
) -> Solution:
    """Solve for at most ``neurons`` neurons at a time with ``solve(program, name, tol=, max_iter=, initial=)``."""
    began = time.perf_counter()
    blocks = [slice(start, min(start + neurons, program.shape[0])) for start in range(0, program.shape[0], neurons)]
    iterations = 0

    def at(level: float, tolerance: float, start: Tensor | None) -> tuple[Tensor, float]:
        """Weights of the penalised program at λ, and the bound of all blocks together."""
        nonlocal iterations
        parts: list[Solution] = []
        tasks = (
            (_part(program, block, level), name, {"tol": tolerance, "max_iter": max_iter, "initial": None if start is None else start[block]})
            for block in blocks
        )
        if executor is None:
            parts = [solve(part, solver, **options) for part, solver, options in tasks]
        else:
            futures: list[Future[Solution]] = [executor.submit(solve, part, solver, **options) for part, solver, options in tasks]
            parts = [future.result() for future in futures]
        iterations += max(part.iterations for part in parts)
        return torch.cat([part.weights for part in parts]), sum(part.lower_bound for part in parts)

    if program.regularization is not None:
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


def _part(program: LayerProgram, block: slice, level: float) -> LayerProgram:
    """The penalised program of a block of neurons."""
    omega = program.l1_weights
    assert isinstance(omega, Tensor)
    targets = program.targets
    return dataclasses.replace(
        program,
        targets=targets[:, block] if isinstance(targets, Tensor) else _columns(targets, block),
        upper=None if program.upper is None else program.upper[:, block],
        l1_weights=omega[block] if omega.ndim == 2 else omega,
        epsilon=None,
        regularization=level,
    )


def _columns(targets: Stream, block: slice) -> Stream:
    """A stream of the same rows, of some neurons only."""

    def chunks() -> Iterator[Tensor]:
        for chunk in targets():
            yield torch.as_tensor(chunk)[:, block]

    return chunks
