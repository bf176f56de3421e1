"""``nettrim.verify``: a report against the two networks and the data, every promise computed again."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nettrim import calibration as calibrations
from nettrim import layers
from nettrim.checking import figures, identities
from nettrim.checking.bound import Bound, Problem, bound
from nettrim.checking.promises import Asked, Budget, Link, budget, network_bound, size_of
from nettrim.checking.results import BROKEN, Check, Verification, compare, decide
from nettrim.checking.streams import Array, LayerPair, Measured, Outputs, numbers, pass_over
from nettrim.errors import ArgumentError
from nettrim.report import LayerReport, Report
from nettrim.sensitivity import output_metrics
from nettrim.tracing import Trace, trace

__all__ = ["Check", "Verification", "verify"]

_LARGEST = 400_000_000  # numbers of a layer's rows, in and out, that a bound may hold in float64


@torch.inference_mode(False)
def verify(
    dense_model: nn.Module,
    pruned_model: nn.Module,
    calibration: Any,
    report: Report,
    *,
    masks: Mapping[str, Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    bounds: bool = True,
) -> Verification:
    """Compute again everything that a report promises, by code that shares nothing with the solvers, and compare.

    Parameters
    ----------
    dense_model : nn.Module
        The network before pruning (with ``inplace=True`` a copy that was made before).
    pruned_model : nn.Module
        The network after.
    calibration : as of :func:`nettrim.prune`
        The same samples in the same order; how they are cut into batches does not matter.
    report : Report
    masks : mapping of str to Tensor, optional
        Parameter name to a bool tensor; checked against the zeros if given.
    forward_fn : callable(model, batch), optional
        As of :func:`nettrim.prune`.
    bounds : bool
        Whether to prove the lower bounds, which takes most of the time; without it they stay "not proven".

    Returns
    -------
    Verification
        ``holds`` is False where anything is broken; ``complete`` says that nothing was left unproven either.

    Raises
    ------
    ArgumentError
        An argument is not as described, or the options in the report are none; CalibrationError where a network cannot run the data.

    Notes
    -----
    What is checked, how, to which tolerance, and what cannot be: docs/verify.md.
    """
    for name, value, kind in (("dense_model", dense_model, nn.Module), ("pruned_model", pruned_model, nn.Module), ("report", report, Report)):
        if not isinstance(value, kind):
            raise ArgumentError(f"{name} is a {type(value).__name__}; expected a {kind.__module__.split('.')[0]} {kind.__name__}")
    asked = Asked.read(report.options)
    found = calibrations.batches(calibration)
    checks = [*identities.identities(dense_model, pruned_model, found, report), *identities.masks_of(pruned_model, masks, report)]
    strange = list(identities.strangers(dense_model, pruned_model, report))
    checks += strange
    if any(check.outcome == BROKEN and check.what != "other tensors" for check in strange):
        return Verification(tuple(checks))  # these networks cannot be run side by side
    run = calibrations.runner(forward_fn)
    solve_on, keep_out = calibrations.split(found, asked.holdout, asked.seed)
    traced = trace(dense_model, solve_on, run)
    work = _Work(dense_model, pruned_model, solve_on, run, report, asked, traced)
    checks += work.order()
    if any(check.outcome == BROKEN for check in checks if check.what == "layers that ran"):
        return Verification(tuple(checks))
    outputs = work.measure()
    pairs_kept_out, held_out = work.measure_kept_out(keep_out)
    for layer in report.layers:
        checks += work.layer(layer, bounds)
        checks.append(figures.held_out(layer, pairs_kept_out.get(layer.name)))
    checks += work.network(outputs, held_out if keep_out else None)
    return Verification(tuple(checks))


class _Work:
    """Both networks on the samples solved on, and what was measured of each layer."""

    def __init__(
        self, dense: nn.Module, pruned: nn.Module, batches: list[Any], run: calibrations.Run, report: Report, asked: Asked, traced: Trace
    ) -> None:
        self.dense, self.pruned, self.batches, self.run = dense, pruned, batches, run
        self.report, self.asked, self.traced = report, asked, traced
        metrics = self._metrics()
        self.pairs = {
            layer.name: LayerPair(
                layer.name,
                dense.get_submodule(layer.name),
                pruned.get_submodule(layer.name),
                layer.activation == "relu",
                numbers(metrics[layer.name]) if layer.name in metrics else None,
            )
            for layer in report.layers
        }
        self.budgets: dict[str, Budget] = {}
        self.rows_drawn: dict[str, Array] = {}

    def _metrics(self) -> dict[str, Tensor]:
        """What the layers' errors cost at the network's output, where their weights were chosen by that."""
        asked = self.asked
        if not asked.counts or asked.fidelity != "network" or asked.pattern == "neuron":
            return {}
        wanted = {*self.left_dense, *(layer.name for layer in self.report.layers)}
        names = [layer.name for layer in self.traced.layers if layer.name in wanted]
        return output_metrics(self.dense, self.batches, self.run, names, asked.seed) or {}

    @property
    def left_dense(self) -> list[str]:
        """Layers that were to be pruned and were not."""
        return [name for name, reason in self.report.skipped.items() if reason.startswith("kept dense:")]

    def order(self) -> Iterator[Check]:
        """Which layers ran, in which order and with what behind them; and that every other one is named."""
        activations = {layer.name: layer.activation for layer in self.traced.layers}
        stated = [layer.name for layer in self.report.layers]
        ran = [name for name in activations if name in self.pairs]
        yield decide("network", "layers that ran", stated == ran, ", ".join(stated), ", ".join(ran), "in execution order")
        silent = [name for name in activations if name not in self.pairs and name not in self.report.skipped]
        yield decide("network", "layers left dense", not silent, "named with a reason", ", ".join(silent) or "named with a reason")
        for layer in self.report.layers:
            if layer.name in activations:
                found = activations[layer.name]
                yield decide(f"layer {layer.name}", "activation", layer.activation == found, layer.activation, found)

    def calls(self, names: list[str]) -> Iterator[tuple[str | None, Any, Any, Array | None]]:
        """Every call of the layers ``names``, dense and pruned, with the rows of it that count; and the outputs, under None."""
        start = dict.fromkeys(names, 0)
        for ours, theirs, dense_output, pruned_output in pass_over(self.dense, self.pruned, names, self.batches, self.run):
            for name in names:
                keep = None
                if name in self.rows_drawn:
                    count = len(layers.output_rows(self.pairs[name].dense, ours[name].output))
                    drawn = self.rows_drawn[name]
                    keep = drawn[(drawn >= start[name]) & (drawn < start[name] + count)] - start[name]
                    start[name] += count
                yield name, ours[name], theirs[name], keep
            yield None, dense_output, pruned_output, None

    def measure(self) -> Outputs:
        """Run everything once (twice where rows are drawn: their number is needed first), and sum it up."""
        names, outputs = list(self.pairs), Outputs()
        if self.asked.max_rows is not None:
            totals = dict.fromkeys(names, 0)
            for name, call, _, _ in self.calls(names):
                if name is not None:
                    totals[name] += len(layers.output_rows(self.pairs[name].dense, call.output))
            for name, total in totals.items():
                if self.asked.max_rows < total:
                    generator = torch.Generator().manual_seed(self.asked.seed)
                    self.rows_drawn[name] = torch.randperm(total, generator=generator)[: self.asked.max_rows].sort().values.numpy()
        repair = float(self.asked.repair)
        for name, ours, theirs, keep in self.calls(names):
            if name is not None:
                self.pairs[name].add(ours, theirs, repair, parallel=self.asked.mode == "parallel", keep=keep)
            else:
                outputs.add(ours, theirs)
        last = self.traced.layers[-1].name
        for name, pair in self.pairs.items():
            relative = self.asked.of_layer("epsilon", name, pair.dense)
            self.budgets[name] = budget(self.asked, relative, pair.measured, size_of(pair.pruned, pair.measured), pair.relu, last=name == last)
        return outputs

    def measure_kept_out(self, batches: list[Any]) -> tuple[dict[str, LayerPair], Outputs]:
        """The same sums over the samples kept out, without those layers that do not run alike on them."""
        pairs, outputs = ({name: dataclasses.replace(pair, measured=Measured()) for name, pair in self.pairs.items()} if batches else {}), Outputs()
        for ours, theirs, dense_output, pruned_output in pass_over(self.dense, self.pruned, list(pairs), batches, self.run):
            outputs.add(dense_output, pruned_output)
            for name in list(pairs):
                if name not in ours or name not in theirs or ours[name].output.shape != theirs[name].output.shape:
                    del pairs[name]
                    continue
                pairs[name].add(ours[name], theirs[name], 1.0, parallel=self.asked.mode == "parallel", keep=None)
        return pairs, outputs

    def layer(self, layer: LayerReport, bounds: bool) -> Iterator[Check]:
        """All checks of one layer."""
        pair, allowed = self.pairs[layer.name], self.budgets[layer.name]
        yield from figures.weights(layer, pair.dense, pair.pruned, self.asked, self._neurons(layer))
        yield from figures.promise(layer, pair, self.asked, allowed)
        own = (lambda stated: self._bound(layer.name, stated)) if bounds else (lambda _: "left out, as asked (bounds=False)")
        yield from figures.objective(layer, pair, self.asked, own, allowed)

    def _neurons(self, layer: LayerReport) -> int | None:
        """How many outputs a layer was to lose; 0 where not one other layer alone reads them."""
        if self.asked.pattern != "neuron":
            return None
        share = self.asked.of_layer("sparsity", layer.name, self.dense.get_submodule(layer.name)) or 0.0
        outputs = figures.layer_rows(self.pairs[layer.name].pruned)
        alone = any(other.reads == layer.name and other.reads_alone for other in self.traced.layers)
        return min(int(share * outputs + 0.5), outputs - 1) if alone else 0

    def _bound(self, name: str, stated: float) -> Bound | str:
        """The verifier's own bound on a layer's optimum, from all of its rows."""
        pair, asked = self.pairs[name], self.asked
        W, W_dense = (numbers(layers.as_matrix(module)) for module in (pair.pruned, pair.dense))
        M, N = W.shape
        if pair.measured.entries // M * (M + N) > _LARGEST:
            return f"not proven here: its rows are {pair.measured.entries // M} x {M + N} numbers, more than {_LARGEST}"
        inputs: list[Array] = []
        targets: list[Array] = []
        for found, ours, theirs, keep in self.calls([name]):
            if found is not None:
                given = layers.input_rows(pair.dense, (ours if asked.mode == "parallel" else theirs).input)
                pieces = numbers(given), numbers(layers.output_rows(pair.dense, ours.output))
                for rows, piece in zip((inputs, targets), pieces, strict=True):
                    rows.append(piece if keep is None else piece[keep])
        A, Y = np.concatenate(inputs), np.concatenate(targets)
        Y = np.maximum(Y, 0.0) if pair.relu else Y
        omega = np.ones(N)
        if layers.has_bias(pair.pruned):
            omega[-1] = asked.bias_weight
        V = None
        if asked.consistency == "paper" and pair.relu:
            V = A @ W_dense.T if self.budgets[name].inflation is not None else np.zeros_like(Y)
        return bound(Problem(A, Y, omega, self.budgets[name].program, pair.relu, V), W, stated=stated)

    def network(self, outputs: Outputs, held_out: Outputs | None) -> Iterator[Check]:
        """The network's certificate, its density, and what was asked of it as a whole."""
        report, certificate, asked = self.report, self.report.certificate, self.asked
        entries = sum(math.prod(layer.shape) for layer in report.layers)
        kept = sum(int((pair.pruned.get_parameter("weight") != 0).sum()) for pair in self.pairs.values())
        yield compare("network", "density", report.density, kept / entries if entries else 1.0)
        if asked.counts and asked.shared:
            total = entries + sum(self.dense.get_submodule(name).get_parameter("weight").numel() for name in self.left_dense)
            most = asked.kept(total, asked.sparsity)
            yield decide("network", "weights kept", kept <= most, most, kept, "stated: what the sparsity leaves")
        slack = self._slack(outputs)
        yield compare("network", "measured", certificate.measured, outputs.norm, slack)
        share = slack / math.sqrt(outputs.square) if outputs.square else 0.0
        yield compare("network", "relative_measured", certificate.relative_measured, outputs.relative, 2 * share)
        if asked.budget is not None:
            within = outputs.relative <= asked.budget + 2 * share
            yield decide("network", "budget kept", within, asked.budget, outputs.relative, "of the whole output, on the samples solved on")
        if held_out is None or certificate.holdout is None:
            same = (held_out is None) == (certificate.holdout is None)
            yield decide("network", "holdout", same, certificate.holdout, None if held_out is None else held_out.relative)
        else:
            share = self._slack(held_out) / math.sqrt(held_out.square) if held_out.square else 0.0
            yield compare("network", "holdout", certificate.holdout, held_out.relative, 2 * share)
        yield from self._guaranteed(outputs, slack)

    def _guaranteed(self, outputs: Outputs, slack: float) -> Iterator[Check]:
        certificate = self.report.certificate
        why_not = "rows were left out" if self.rows_drawn else self.traced.not_chain_reason
        if why_not is not None or certificate.guaranteed is None:
            same = (why_not is None) == (certificate.guaranteed is not None)
            yield decide("network", "guaranteed", same, certificate.guaranteed, None, why_not or "the layers are a chain: there is a bound")
        else:
            promised = {layer.name: layer.epsilon for layer in self.report.layers}
            own = network_bound([self._link(layer.name, promised) for layer in self.traced.layers], self.asked.mode)
            if own is None:
                why = "a layer of the chain is no nn.Linear: its norm is not known here"
                yield decide("network", "guaranteed", None, certificate.guaranteed, None, why)
            else:
                yield compare("network", "guaranteed", certificate.guaranteed, own, 1e-5 * own, "from the budgets and spectral norms")
            kept = certificate.measured <= certificate.guaranteed and outputs.norm <= certificate.guaranteed + slack
            yield decide("network", "bound kept", kept, certificate.guaranteed, outputs.norm)
        kept = all(layer.discrepancy <= layer.epsilon for layer in self.report.layers)
        kept &= certificate.guaranteed is None or certificate.measured <= certificate.guaranteed
        note = "whether the certificate holds, by its figures"
        yield decide("network", "verdict", certificate.holds == kept, str(certificate.holds), str(kept), note)

    def _link(self, name: str, promised: dict[str, float]) -> Link:
        if name not in promised:
            return Link(self.dense.get_submodule(name), self.pruned.get_submodule(name), None, None, None)
        pair = self.pairs[name]
        return Link(pair.dense, pair.pruned, promised[name], self.budgets[name].inflation, pair.measured)

    def _slack(self, outputs: Outputs) -> float:
        """How much rounding may move the network's output: of every layer a part, carried on as the difference itself is."""
        sizes = [size_of(pair.pruned, pair.measured) for pair in self.pairs.values()]
        relative = max((size.noise / size.output for size in sizes if size.output), default=0.0)
        noise = relative * math.sqrt(len(self.traced.layers)) * math.sqrt(outputs.square)
        return math.hypot(outputs.norm, noise) - outputs.norm + 1e-3 * noise if math.isfinite(outputs.norm) else 0.0
