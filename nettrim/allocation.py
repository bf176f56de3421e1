"""How one number of weights is spread over the layers: where the next weight does most for the network's output.

For a few numbers of weights ``k`` each layer's support is searched on the dense network's activations, and its misfit weighed by what errors do at
the output (:mod:`nettrim.sensitivity`):

    v_ℓ(k) = E (ẑ − z)ᵀ S_ℓ (ẑ − z)     and     min Σ_ℓ v_ℓ(k_ℓ)  s.t.  Σ_ℓ k_ℓ = K

In between, ``log v`` is linear in ``log k``. The minimum has one marginal value of a weight, ``−v_ℓ'(k_ℓ) = μ``, for all layers; μ is bisected.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nettrim.calibration import Run
from nettrim.metrics import Metric
from nettrim.observing import observe
from nettrim.options import Options
from nettrim.patterns import UNSTRUCTURED, make_supports
from nettrim.solvers.base import threads_for
from nettrim.solvers.refits import refit
from nettrim.solvers.support import normalised, search
from nettrim.tracing import TracedLayer

_DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
_GRID = 400
_BISECTIONS = 100


@dataclass(frozen=True)
class Curve:
    """What a layer's weights do for the output.

    Attributes
    ----------
    kept, error : ndarray, (K,)
        Numbers of weights, ascending, and the squared error that they leave at the output.
    size : int
        All weights of the layer.
    """

    kept: np.ndarray
    error: np.ndarray
    size: int

    def at(self, kept: np.ndarray) -> np.ndarray:
        """The squared error at other numbers; beyond the ends the last slope goes on."""
        x, y = np.log(self.kept), np.log(np.maximum(self.error, 1e-300))
        t = np.log(np.maximum(kept, 1.0))
        inner = np.interp(t, x, y)
        first, last = (y[1] - y[0]) / (x[1] - x[0]), (y[-1] - y[-2]) / (x[-1] - x[-2])
        return np.exp(np.where(t < x[0], y[0] + first * (t - x[0]), np.where(t > x[-1], y[-1] + last * (t - x[-1]), inner)))


def measure(
    model: nn.Module,
    batches: list[Any],
    run: Run,
    wanted: list[TracedLayer],
    metrics: dict[str, Metric],
    options: Options,
    device: torch.device | str | None,
) -> dict[str, Curve]:
    """The curves of the layers ``wanted``, from their rows in the dense network and their metrics."""
    found = {}
    for layer in wanted:
        seen = observe(layer, model, None, batches, run, device=device, max_rows=options.max_rows, seed=options.seed)
        N = seen.matrix.shape[1] + seen.matrix.has_bias
        G, rows = torch.zeros((seen.groups, N, N), dtype=torch.float64, device=seen.dense.device), 0
        for A, _ in seen.solved_on():
            stacked = A.double().unflatten(1, (seen.groups, N)).transpose(0, 1)
            G.baddbmm_(stacked.transpose(1, 2), stacked)
            rows += len(A)
        W = seen.dense.double()
        # of all rows: a layer of a convolutional network has more of them than the one behind it
        with threads_for(W.numel() * W.shape[1]):
            found[layer.name] = _curve(G * (seen.rows / rows), W, metrics[layer.name].to(W), layer.matrix.has_bias)
    return found


def _curve(G: Tensor, W: Tensor, metric: Metric, has_bias: bool) -> Curve:
    """The curve of one layer, from the Gram matrices (G, N, N) of its groups, over which each number of weights is spread by ``‖a_j‖² w²``."""
    groups, N = len(G), G.shape[1]
    height = len(W) // groups
    problems, starts = [], []
    for group in range(groups):
        own = slice(group * height, (group + 1) * height)
        problem, column, row = normalised(G[group], metric.of_outputs(own), torch.float32)
        problems.append(problem)
        starts.append(W[own] * column * row)
    products = [start @ problem.G for problem, start in zip(problems, starts, strict=True)]
    # of no weights at all: the dense ones leave nothing
    total = -2 * sum(problem.value(start, C) for problem, start, C in zip(problems, starts, products, strict=True))
    counted = torch.ones(N, dtype=torch.bool, device=G.device)
    counted[N - has_bias :] = False
    inner = int(counted.sum())
    size = len(W) * inner
    kept: list[int] = []
    errors: list[float] = []
    for density in _DENSITIES:
        count = max(1, round(density * size))
        if kept and count <= kept[-1]:
            continue
        each = [count]
        if groups > 1:
            scores = torch.cat(starts)[:, counted].square()
            each = [int(part) for part in UNSTRUCTURED.mask(scores, count).view(groups, -1).sum(1)]
        value = 0.0
        for problem, start, C, number in zip(problems, starts, products, each, strict=True):
            supports = make_supports(UNSTRUCTURED.text, number, counted, (height, N), None)
            value += problem.value(refit(problem, C, *search(problem, C, supports, start)).W, C)
        kept.append(count)
        errors.append(max(total + 2 * value, 1e-12 * total))
    if len(kept) == 1:
        kept, errors = [kept[0], kept[0] + 1], [errors[0], errors[0]]
    # more weights never do worse
    return Curve(np.array(kept, dtype=float), np.minimum.accumulate(np.array(errors)), size)


def spread(found: dict[str, Curve], total: int) -> dict[str, int]:
    """``total`` weights over the layers: the sum of their errors is least."""
    grids = {name: np.unique(np.round(np.geomspace(1, curve.size, _GRID))) for name, curve in found.items()}
    values = {name: found[name].at(grids[name]) for name in found}
    low, high = math.log(1e-300), math.log(1e300)

    def at(mu: float) -> dict[str, int]:
        return {name: int(grids[name][np.argmin(values[name] + mu * grids[name])]) for name in found}

    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        if sum(at(math.exp(middle)).values()) > total:
            low = middle
        else:
            high = middle
    kept = at(math.exp(high))
    return _exactly(kept, {name: curve.size for name, curve in found.items()}, total)


def _exactly(kept: dict[str, int], sizes: dict[str, int], total: int) -> dict[str, int]:
    """Spread what is left over (or too much) in proportion, to one weight."""
    kept = dict(kept)
    while (rest := total - sum(kept.values())) != 0:
        room = {name: (sizes[name] - count if rest > 0 else count) for name, count in kept.items()}
        most = max(sum(room.values()), 1)
        moved = {name: math.trunc(rest * room[name] / most) for name in kept}
        if not any(moved.values()):
            moved = {max(room, key=lambda name: room[name]): 1 if rest > 0 else -1}
        for name, change in moved.items():
            kept[name] += change
    return kept
