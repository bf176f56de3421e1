"""What is asked of each layer: a budget, or a number of weights to keep, from the arguments of ``nettrim.prune``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from nettrim import allocation, layers, neurons, selection
from nettrim.allocation import Curve
from nettrim.blockwise import Chain
from nettrim.budgets import Budget, make_budget
from nettrim.calibration import Run
from nettrim.counted import make_selection
from nettrim.errors import ArgumentError
from nettrim.metrics import Metric
from nettrim.observing import Layer
from nettrim.options import Options
from nettrim.patterns import NEURON, UNSTRUCTURED, Pattern, parse
from nettrim.sensitivity import output_metrics
from nettrim.tracing import Trace, TracedLayer


@dataclass(frozen=True)
class Goals:
    """What is asked of the layers that are pruned.

    Attributes
    ----------
    options : Options
    relative : dict of str to float
        Relative budgets by name; empty where weights are counted.
    own : bool
        Whether each is the layer's own, or one for all.
    shares : dict of str to float
        Shares of zeros by name; empty where there are budgets.
    pattern : Pattern
    allowed : dict of str to Tensor, (M, N) bool
        The weights that may stay, of layers where not all may.
    metrics : dict of str to Metric
        What errors of a layer cost at the network's output; empty where every layer is kept to its own.
    """

    options: Options
    relative: dict[str, float]
    own: bool
    shares: dict[str, float]
    pattern: Pattern
    allowed: dict[str, Tensor]
    metrics: dict[str, Metric]

    @property
    def names(self) -> set[str]:
        """The layers that are pruned."""
        return {*self.relative, *self.shares}

    def budget(self, layer: TracedLayer, seen: Layer, *, last: bool) -> Budget:
        """The program of a layer for what was ``seen`` of it; ``last`` is the network's last one."""
        options = self.options
        if layer.name in self.shares:
            support = self.allowed.get(layer.name)
            if options.preserve_zeros:
                support = layers.nonzeros(layer.matrix) if support is None else support & layers.nonzeros(layer.matrix)
            return make_selection(
                seen,
                sparsity=self.shares[layer.name],
                pattern=self.pattern,
                repair=float(options.repair),
                damping=options.damping,
                support=support,
                metric=self.metrics.get(layer.name),
            )
        return make_budget(
            seen,
            relative=self.relative[layer.name],
            own=self.own or options.mode == "parallel",
            inflation=options.gamma * options.kappa if last else options.gamma,
            consistency=options.consistency,
            penalty=options.penalty,
            bias_weight=options.bias_weight,
            solver=options.solver,
        )


@dataclass
class Measured:
    """What is measured of the dense network, once for all that is tried."""

    metrics: dict[str, Metric] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)


def _metrics(
    model: nn.Module, batches: list[Any], run: Run, wanted: list[TracedLayer], options: Options, spreads: bool, chain: Chain | None
) -> dict[str, Metric]:
    found = output_metrics(model, batches, run, wanted, options.seed, diagonal=options.fidelity == "diagonal", chain=chain)
    if found is None:
        ways = "fidelity='layer' and allocation='uniform'" if spreads else "fidelity='layer'"
        raise ArgumentError(f"no gradient comes through the network, so nothing says what a layer's errors do to its output; expected {ways}")
    return found


def set_goals(
    model: nn.Module,
    trace: Trace,
    names: list[str],
    skipped: dict[str, str],
    options: Options,
    batches: list[Any],
    run: Run,
    device: torch.device | str | None,
    measured: Measured,
    chain: Chain | None = None,
) -> Goals:
    """The goals of the layers ``names``; those that none is given for are added to ``skipped``, and what is measured to ``measured``. ``chain`` is
    the network's, if it is one of blocks.

    Raises
    ------
    ArgumentError
        A budget or a share out of range, a key that matches no layer, or a pattern that no layer can have.
    """
    pattern = parse(options.pattern)
    if options.epsilon is not None:
        relative = selection.per_layer(trace, names, options.epsilon, "epsilon", selection.positive, skipped)
        return Goals(options, relative, isinstance(options.epsilon, Mapping), {}, pattern, {}, {})
    asked = options.sparsity if options.sparsity is not None else 1 - (pattern.share or 0.0)
    shares = selection.per_layer(trace, names, asked, "sparsity", selection.share_of_zeros, skipped)
    share = float(asked) if isinstance(asked, Real) else 0.0
    spreads = pattern is UNSTRUCTURED and options.allocation == "auto" and 0 < share < 1 and len(names) > 1
    metrics: dict[str, Metric] = {}
    wanted = [layer for layer in trace.layers if layer.name in names]
    for layer in (one for one in wanted if one.name in shares and pattern is not NEURON):  # before hours of solving, not when it is the layer's turn
        M, N = layer.matrix.shape
        pattern.check((M // layer.matrix.groups, N), f"layer {layer.name!r}")
    # where every output has a number of weights of its own, it does not matter which outputs count for more
    weighs = options.fidelity == "network" or (options.fidelity == "diagonal" and pattern.share is None)
    if pattern is not NEURON and (spreads or weighs):
        metrics = measured.metrics = measured.metrics or _metrics(model, batches, run, wanted, options, spreads, chain)
    if spreads:
        curves = measured.curves = measured.curves or allocation.measure(model, batches, run, wanted, metrics, options, device)
        total = sum(curve.size for curve in curves.values())
        kept = allocation.spread(curves, UNSTRUCTURED.kept((1, total), share))
        shares = {name: 1 - kept[name] / curves[name].size for name in names}
    metrics = metrics if weighs else {}
    if pattern is not NEURON:
        return Goals(options, {}, True, shares, pattern, {}, metrics)
    allowed = neurons.supports(model, trace, batches, run, shares, device)
    types = {layer.name: type(layer.module).__name__ for layer in trace.layers if not isinstance(layer.module, nn.Linear)}
    for name in shares:
        if name in types:
            skipped[name] = f"pattern='neuron' takes neurons out of nn.Linear layers, and this is of a {types[name]}"
        elif name not in allowed:
            skipped[name] = "its neurons are not read by one layer alone, and it reads from none that loses some"
    # a layer that was not asked for is fitted to what the one before it leaves
    shares = {name: shares.get(name, 0.0) for name in names if name in allowed}
    if not shares:
        raise ArgumentError(f"pattern='neuron': the model has no layer that can lose neurons ({skipped}); expected one that one other layer reads")
    return Goals(options, {}, True, shares, pattern, allowed, {})
