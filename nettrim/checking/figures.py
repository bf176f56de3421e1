"""The checks of one layer: its weights, its promise, what was measured, its objective and the bound on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from nettrim.checking.bound import Bound
from nettrim.checking.promises import EPS, Asked, Budget, Size, of_norm, size_of
from nettrim.checking.results import Check, compare, decide
from nettrim.checking.streams import LayerPair, numbers
from nettrim.layers import Matrix
from nettrim.report import LayerReport

_PROVEN = 1e-6  # relative to the objective: how much a bound computed twice in float64 may differ
_METRIC = 1e-5  # relative: a metric is summed in the network's dtype
_ADDED = 4.0  # units of its dtype: what is added to a layer's output went through layers before
_GROUPED = 1e-3  # each group keeps a budget of its own, and only their sum is known here
_ONE_SIDED = 1e-4  # of the papers' set, whose stored weights may break z ≤ v by 2e-5 of the budget


def weights(layer: LayerReport, dense: Matrix, pruned: Matrix, asked: Asked, neurons: int | None) -> Iterator[Check]:
    """Shape, dtype, zeros and patterns. ``neurons`` is how many outputs the layer was to lose, None where the pattern is another."""
    name = _name(layer)
    weight = numbers(pruned.weights())
    nonzeros, entries = int(np.count_nonzero(weight)), weight.size
    yield decide(name, "shape", tuple(layer.shape) == weight.shape, str(tuple(layer.shape)), str(weight.shape))
    kinds = [str(matrix.weight.dtype) for matrix in (dense, pruned)]
    yield decide(name, "dtype", kinds[0] == kinds[1], kinds[0], kinds[1], "stated: of the dense layer")
    yield compare(name, "nonzeros", layer.nonzeros, nonzeros)
    yield compare(name, "density", layer.density, nonzeros / entries)
    yield compare(name, "weight_bytes", layer.weight_bytes, entries * pruned.weight.element_size())
    if not asked.counts:
        return
    if asked.preserve_zeros:
        came_back = int(np.count_nonzero(weight[numbers(dense.weights()) == 0]))
        yield decide(name, "zeros kept", came_back == 0, 0, came_back, "weights that were zero and are not")
    if neurons is not None:
        bias = pruned.bias()
        dead = ~weight.any(1) if bias is None else ~weight.any(1) & (numbers(bias) == 0)
        yield decide(name, "neurons taken out", int(dead.sum()) >= neurons, neurons, int(dead.sum()))
        return
    if asked.kept_of is not None:
        n, m = asked.kept_of
        tiles = entries % m == 0 and weight.shape[1] % m == 0
        most = int(np.count_nonzero(weight.reshape(-1, m), axis=1).max()) if tiles else entries
        yield decide(name, f"pattern {asked.pattern}", tiles and most <= n, n, most, "the most that are kept in a group")
        return
    share = asked.of_layer("sparsity", layer.name, pruned.module)
    if asked.shared or share is None:
        return  # the total is what was promised
    held, form = nonzeros, ""
    if asked.block is not None:
        R, C = asked.block
        tiles = weight.shape[0] % R == 0 and weight.shape[1] % C == 0
        blocks = weight.reshape(len(weight) // R, R, -1, C).any((1, 3)) if tiles else np.ones(entries)
        held, form = int(blocks.sum()) * R * C, f" in {asked.pattern}"
    # a grouped layer's blocks are shared out evenly, each group's number rounded by itself; single weights go where they are needed
    kept = asked.kept(entries, share) if asked.block is None else pruned.groups * asked.kept(entries // pruned.groups, share)
    yield decide(name, f"weights kept{form}", held <= kept, kept, held, "stated: what the sparsity asked for leaves")


def promise(layer: LayerReport, pair: LayerPair, asked: Asked, budget: Budget) -> Iterator[Check]:
    """The rows, the budget, and what the stored layer keeps of it."""
    name, found, size = _name(layer), pair.measured, size_of(pair)
    yield compare(name, "rows", layer.rows, found.entries // max(pair.pruned.shape[0], 1))
    target = math.sqrt(found.target_square)
    if asked.counts:
        # of what is large before an activation that is no ReLU, the misfit holds all, and the output perhaps next to nothing
        inner = size_of(pair, before=not pair.behind.relu)
        slack = pair.behind.lipschitz * of_norm(math.sqrt(found.on + found.off), inner.noise, inner) + 1e-3 * size.noise
        note = "what the stored weights leave, and what rounding may add"
    elif budget.inflation is not None:
        base = math.sqrt(found.dense_on + found.dense_off)
        stretch = max(1.0, math.sqrt(budget.inflation))
        slack, note = stretch * of_norm(base, size.noise, size), "what the dense weights leave, times √γ"
    else:
        slack, note = budget.promise / target * of_norm(target, size.noise, size) if target else 0.0, "the share asked for of ‖Y‖"
    yield compare(name, "epsilon", layer.epsilon, budget.promise, slack, note)
    difference = math.sqrt(found.difference)
    slack = of_norm(difference, size.noise, size)
    yield compare(name, "discrepancy", layer.discrepancy, difference, slack, "the stored layer, run again")
    relative = difference / target if target > 0 else 0.0 if difference == 0 else math.inf
    yield compare(name, "relative_discrepancy", layer.relative_discrepancy, relative, 2 * slack / target if target > 0 else 0.0)
    if layer.accumulated is not None:
        yield compare(name, "accumulated", layer.accumulated, *_relative(found.through, found.through_square, size))
    kept = difference <= layer.epsilon + slack and layer.discrepancy <= layer.epsilon
    yield decide(name, "promise kept", kept, layer.epsilon, difference, f"to {slack:.3g}, what rounding may move it by")


def held_out(layer: LayerReport, pair: LayerPair | None) -> Check:
    """The discrepancy on the samples kept out; ``pair`` is None where there are none, or the layer does not run alike on them."""
    name = _name(layer)
    if pair is None or layer.holdout is None:
        return decide(name, "holdout", (pair is None) == (layer.holdout is None), layer.holdout, None)
    found, size = pair.measured, size_of(pair)
    return compare(name, "holdout", layer.holdout, *_relative(found.difference, found.target_square, size))


def _relative(difference: float, square: float, size: Size) -> tuple[float, float]:
    """A discrepancy relative to a norm, from their squares, and by how much rounding may move it."""
    root, norm = math.sqrt(difference), math.sqrt(square)
    if norm == 0:
        return (0.0 if root == 0 else math.inf), 0.0
    return root / norm, 2 * of_norm(root, size.noise, size) / norm


def objective(layer: LayerReport, pair: LayerPair, asked: Asked, own_bound: Callable[[float], Bound | str], budget: Budget) -> Iterator[Check]:
    """Objective, bound, gap and status. ``own_bound(stated)`` is the verifier's own bound, or why there is none."""
    name = _name(layer)
    value, slack = _objective(pair, asked)
    if value is None:
        yield decide(name, "objective", None, layer.objective, None, "the ℓ1 weights of the reweighting rounds are not kept")
        value, slack = layer.objective, 0.0
    else:
        yield compare(name, "objective", layer.objective, value, slack)
    yield _lower_bound(layer, pair, asked, own_bound, budget, value + slack)
    difference = abs(layer.objective - layer.lower_bound)
    gap = 0.0 if difference == 0 else difference / abs(layer.objective) if layer.objective else math.inf
    yield compare(name, "gap", layer.gap, gap, 1e-9, "of the objective and the bound as stated")
    expected = "optimal" if layer.gap <= asked.tol else "feasible"
    yield decide(name, "status", layer.status == expected, layer.status, expected, f"gap against tol={asked.tol:g}")


def _objective(pair: LayerPair, asked: Asked) -> tuple[float | None, float]:
    """The value of the program at the stored weights, and how much rounding may move it; None where it cannot be known."""
    found, size = pair.solved, size_of(pair, pair.solved, before=asked.counts)
    whole = np.abs(pair.folded(pair.pruned))
    weight, bias = (whole[:, :-1], whole[:, -1]) if pair.pruned.has_bias else (whole, None)
    if asked.counts:
        leans = asked.mode == "cascade" and asked.repair < 1 and pair.measured.disturbed(size.kept)
        square = (found.leaning if leans or pair.summed else found.straight) + pair.moved()
        root, stretch = math.sqrt(square), 1.0
        if pair.metric is not None:
            stretch = math.sqrt(float(np.linalg.norm(pair.metric, 2) if pair.metric.ndim == 2 else pair.metric.max()))
        noise = size.noise + _ADDED * EPS[size.dtype] * math.sqrt(found.beside_square)
        slack = of_norm(root, stretch * noise, size)
        return 0.5 * square, slack * (root + 0.5 * slack) + (0.0 if pair.metric is None else _METRIC * square)
    if asked.penalty == "l0":
        return float(np.count_nonzero(weight)), 0.0
    if asked.reweight:
        return None, 0.0
    total = float(weight.sum()) + (0.0 if bias is None else asked.bias_weight * float(bias.sum()))
    return total, EPS["torch.float32"] * total  # the ω of the bias, in the program's dtype


def _lower_bound(
    layer: LayerReport, pair: LayerPair, asked: Asked, own_bound: Callable[[float], Bound | str], budget: Budget, most: float
) -> Check:
    """Whether no weights within the budget undercut the bound stated; ``most`` is the objective of the stored weights."""
    name, stated = _name(layer), layer.lower_bound
    found = pair.solved
    if stated <= 0 and math.isfinite(stated):
        return decide(name, "lower_bound", True, stated, 0.0, "no objective is below 0")
    if not math.isfinite(stated):
        return decide(name, "lower_bound", False, stated, most, "no finite number")
    if asked.counts or asked.penalty == "l0":
        return decide(name, "lower_bound", False, stated, 0.0, "a program that is not convex has none above 0")
    slack = _ONE_SIDED if asked.consistency == "paper" else _PROVEN
    if pair.pruned.groups > 1:
        slack = _GROUPED
    if asked.reweight:
        good = None if stated <= most * (1 + slack) else False
        return decide(name, "lower_bound", good, stated, most, "the ℓ1 weights of the reweighting rounds are not kept; found: the objective")
    own = own_bound(stated * (1 - _PROVEN))
    over, one_sided = 0.0, asked.consistency == "paper" and pair.behind.relu and not pair.behind.capped
    if not one_sided:
        over = max(0.0, math.sqrt(found.on + found.off) - budget.program)  # rounding may take the stored weights out of the set
    elif size_of(pair, found).noise > _ONE_SIDED * budget.program:
        most = math.inf  # so far above z <= v that they say nothing
    most *= 1 + slack
    if over > 0:  # by how much the optimum is lower there only a good dual point can say
        most = most + 2 * own.slope * over if not isinstance(own, str) and own.lower > 0.5 * stated else math.inf
    if not isinstance(own, str):
        if stated <= own.lower + _PROVEN * abs(stated):
            return decide(name, "lower_bound", True, stated, own.lower, "found: the verifier's own bound, as far as it was needed")
        most = min(most, own.upper * (1 + _PROVEN))
    if stated > most:
        return decide(name, "lower_bound", False, stated, most, "weights within the budget have the objective found")
    why = own if isinstance(own, str) else f"not proven here: the verifier's own bound is {own.lower:.9g}"
    return decide(name, "lower_bound", None, stated, None if isinstance(own, str) else own.lower, why)


def _name(layer: LayerReport) -> str:
    return f"layer {layer.name}" if layer.name else "layer (the model itself)"
