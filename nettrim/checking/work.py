"""Both networks on the samples solved on: what is measured of each layer, and the checks of what a report says of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from nettrim import batchnorm, layers
from nettrim import calibration as calibrations
from nettrim.checking import figures
from nettrim.checking.behind import Array, Behind
from nettrim.checking.bound import Bound, Problem, bound
from nettrim.checking.promises import EPS, Asked, Budget, Link, budget, network_bound, size_of
from nettrim.checking.results import Check, compare, decide
from nettrim.checking.streams import Call, LayerPair, Measured, Outputs, numbers, pass_over
from nettrim.metrics import Metric
from nettrim.report import LayerReport, Report
from nettrim.sensitivity import output_metrics
from nettrim.tracing import Trace, TracedLayer, trace

_ALIKE = 1e-6  # of squares: two ways to compute a misfit in float64
_CANCELLING = 10.0
_LARGEST = 400_000_000  # numbers of a layer's rows, in and out, that a bound may hold in float64


class Work:
    """Both networks on the samples solved on, and what was measured of each layer."""

    def __init__(
        self, dense: nn.Module, pruned: nn.Module, batches: list[Any], run: calibrations.Run, report: Report, asked: Asked, traced: Trace
    ) -> None:
        self.dense, self.final, self.batches, self.run = dense, pruned, batches, run
        self.report, self.asked, self.traced = report, asked, traced
        self.pruned = pruned
        if asked.recalibrate_batchnorm:  # the layers were pruned, and measured, with the dense network's statistics
            self.pruned = layers.copy_of(pruned)
            batchnorm.transfer(dense, self.pruned)
        self.matrices, self.others = layers.matrices(dense), layers.matrices(self.pruned)
        self.by_name = {layer.name: layer for layer in traced.layers}
        self.unchecked = {layer.name: reason for layer in report.layers if (reason := self._unknown(layer.name)) is not None}
        metrics = self._metrics()
        self.pairs = {
            layer.name: LayerPair(
                layer.name,
                self.matrices[layer.name],
                self.others[layer.name],
                Behind.of(self.by_name[layer.name]),
                self._metric(metrics.get(layer.name), self.matrices[layer.name].groups),
                self._summed(layer.name),
                float(self.asked.damping),
            )
            for layer in report.layers
            if layer.name not in self.unchecked
        }
        self.budgets: dict[str, Budget] = {}
        self.rows_drawn: dict[str, Array] = {}

    def _unknown(self, name: str) -> str | None:
        """Why a layer's figures cannot be computed again here, or None."""
        if name not in self.by_name:
            return "it did not run"
        if (reason := self.by_name[name].skip_reason) is not None:
            return reason
        matrix = self.matrices[name]
        kind = type(matrix.module).__name__
        if not matrix.kind.observed or matrix.part.label:
            return f"it is one matrix of a {kind}, whose forward gives no such layer's output alone"
        if matrix.kind.repeats or matrix.kind.feeds_itself:
            return f"a {kind} runs several times in a pass, or on what it put out itself"
        return None

    def _summed(self, name: str) -> bool:
        """Whether a layer's program was about the sum that its outputs are part of."""
        asked = self.asked
        return asked.counts and asked.mode == "cascade" and float(asked.repair) > 0 and self.by_name[name].summed

    @staticmethod
    def _metric(metric: Metric | None, groups: int) -> Array | None:
        """A metric in numpy; errors of different groups are not weighed against each other."""
        if metric is None or not metric.couples:
            return None if metric is None else numbers(metric.own)
        S = numbers(metric.to(torch.float64).matrix)
        return S * np.kron(np.eye(groups), np.ones((len(S) // groups,) * 2))

    def _metrics(self) -> dict[str, Metric]:
        """What the layers' errors cost at the network's output, where their weights were chosen by that."""
        asked = self.asked
        alone = asked.fidelity == "diagonal"  # every output is weighed by itself, which says nothing where each has its own number of weights
        if not asked.counts or asked.fidelity == "layer" or asked.pattern == "neuron" or (alone and asked.kept_of is not None):
            return {}
        wanted = {*self.left_dense, *(layer.name for layer in self.report.layers)}
        found = [layer for layer in self.traced.layers if layer.name in wanted]
        return output_metrics(self.dense, self.batches, self.run, found, asked.seed, diagonal=alone) or {}

    @property
    def left_dense(self) -> list[str]:
        """Layers that were to be pruned and were not."""
        return [name for name, reason in self.report.skipped.items() if reason.startswith("kept dense:")]

    def order(self) -> Iterator[Check]:
        """Which layers ran, in which order and with what behind them; and that every other one is named."""
        activations = {layer.name: layer.activation for layer in self.traced.layers}
        stated = [layer.name for layer in self.report.layers]
        ran = [name for name in activations if name in stated]
        yield decide("network", "layers that ran", stated == ran, ", ".join(stated), ", ".join(ran), "in execution order")
        silent = [name for name in activations if name not in stated and name not in self.report.skipped]
        yield decide("network", "layers left dense", not silent, "named with a reason", ", ".join(silent) or "named with a reason")
        for layer in self.report.layers:
            if layer.name in activations:
                found = activations[layer.name]
                yield decide(f"layer {layer.name}", "activation", layer.activation == found, layer.activation, found)

    def calls(self, names: list[str]) -> Iterator[tuple[str | None, Any, Any, Array | None]]:
        """Every call of the layers ``names``, dense and pruned, with the rows of it that count; and the outputs, under None."""
        start = dict.fromkeys(names, 0)
        summed = [name for name in names if name in self.pairs and self.pairs[name].summed]
        for ours, theirs, dense_output, pruned_output in pass_over(self.dense, self.pruned, names, self.batches, self.run, summed):
            for name in names:
                if name not in self.pairs:
                    continue
                if not self._alike(ours[name], theirs.get(name)):
                    self.unchecked[name] = "it does not run alike in the pruned network"
                    del self.pairs[name]
                    continue
                keep = None
                if name in self.rows_drawn:
                    count = len(self.pairs[name].rows(ours[name]))
                    drawn = self.rows_drawn[name]
                    keep = drawn[(drawn >= start[name]) & (drawn < start[name] + count)] - start[name]
                    start[name] += count
                yield name, ours[name], theirs.get(name), keep
            yield None, dense_output, pruned_output, None

    def _alike(self, call: Call, seen: Call | None) -> bool:
        """Whether a call in the dense network and that in the pruned one can be compared; in parallel mode nothing but the former is needed."""
        if self.asked.mode == "parallel":
            return True
        return seen is not None and seen.output.shape == call.output.shape and (seen.beside is None) == (call.beside is None)

    def measure(self) -> Outputs:
        """Run everything once (twice where rows are drawn: their number is needed first), and sum it up."""
        names, outputs = list(self.pairs), Outputs()
        if self.asked.max_rows is not None:
            totals = dict.fromkeys(names, 0)
            for name, call, _, _ in self.calls(names):
                if name is not None:
                    totals[name] += len(self.pairs[name].rows(call))
            for name, total in totals.items():
                if name in self.pairs and self.asked.max_rows < total:
                    chosen = np.random.default_rng(self.asked.seed).choice(total, self.asked.max_rows, replace=False)
                    self.rows_drawn[name] = np.sort(chosen)
                    self.pairs[name] = dataclasses.replace(self.pairs[name], drawn=Measured())
        repair = float(self.asked.repair)
        for name, ours, theirs, keep in self.calls(names):
            if name is not None:
                self.pairs[name].add(ours, theirs, repair, parallel=self.asked.mode == "parallel", keep=keep)
            else:
                outputs.add(ours, theirs)
        last = self.traced.layers[-1].name
        for name, pair in self.pairs.items():
            relative = self.asked.of_layer("epsilon", name, pair.dense.module)
            self.budgets[name] = budget(self.asked, relative, pair, last=name == last)
        return outputs

    def measure_kept_out(self, batches: list[Any]) -> tuple[dict[str, LayerPair], Outputs]:
        """The same sums over the samples kept out, without those layers that do not run alike on them."""
        fresh = {name: dataclasses.replace(pair, summed=False, measured=Measured(), drawn=None) for name, pair in self.pairs.items()}
        pairs, outputs = fresh if batches else {}, Outputs()
        for ours, theirs, dense_output, pruned_output in pass_over(self.dense, self.pruned, list(pairs), batches, self.run):
            outputs.add(dense_output, pruned_output)
            for name in list(pairs):
                if name not in ours or not self._alike(ours[name], theirs.get(name)):
                    del pairs[name]
                    continue
                pairs[name].add(ours[name], theirs.get(name), 1.0, parallel=self.asked.mode == "parallel", keep=None)
        return pairs, outputs

    def final_outputs(self, batches: list[Any]) -> Outputs:
        """Both networks' outputs, the pruned one as it is returned."""
        outputs = Outputs()
        for _, _, ours, theirs in pass_over(self.dense, self.final, [], batches, self.run):
            outputs.add(ours, theirs)
        return outputs

    def statistics(self) -> Check:
        """Whether the BatchNorms' statistics are those that the samples give."""
        again = layers.copy_of(self.pruned)
        batchnorm.recalibrate(again, self.batches, self.run)
        stated, found = dict(self.final.named_buffers()), dict(again.named_buffers())
        apart = [name for name in found if not torch.allclose(stated[name].double(), found[name].double(), rtol=1e-3, atol=1e-5)]
        note = "estimated again, batch by batch, on the samples solved on"
        return decide("network", "BatchNorm statistics", not apart, "as estimated", ", ".join(apart[:3]) or "as estimated", note)

    def layer(self, layer: LayerReport, bounds: bool) -> Iterator[Check]:
        """All checks of one layer."""
        yield from figures.weights(layer, self.matrices[layer.name], self.others[layer.name], self.asked, self._neurons(layer))
        if layer.name in self.unchecked:
            why = f"not checked here: {self.unchecked[layer.name]}"
            kept = None if layer.discrepancy <= layer.epsilon else False  # by its own figures
            yield decide(f"layer {layer.name}", "promise kept", kept, layer.epsilon, None, why)
            yield decide(f"layer {layer.name}", "objective and bound", None, layer.objective, None, why)
            return
        pair, allowed = self.pairs[layer.name], self.budgets[layer.name]
        yield from figures.promise(layer, pair, self.asked, allowed)
        own = (lambda stated: self._bound(layer.name, stated)) if bounds else (lambda _: "left out, as asked (bounds=False)")
        yield from figures.objective(layer, pair, self.asked, own, allowed)

    def _neurons(self, layer: LayerReport) -> int | None:
        """How many outputs a layer was to lose; 0 where not one other layer alone reads them."""
        if self.asked.pattern != "neuron":
            return None
        matrix = self.matrices[layer.name]
        share = self.asked.of_layer("sparsity", layer.name, matrix.module) or 0.0
        outputs = matrix.shape[0]
        alone = any(other.reads == layer.name and other.reads_alone for other in self.traced.layers)
        return min(int(share * outputs + 0.5), outputs - 1) if alone else 0

    def _bound(self, name: str, stated: float) -> Bound | str:
        """The verifier's own bound on a layer's optimum, from all of its rows."""
        pair, asked, behind = self.pairs[name], self.asked, self.pairs[name].behind
        W, W_dense = pair.folded(pair.pruned), pair.folded(pair.dense)
        M, N = W.shape
        if pair.pruned.groups > 1:
            return "not proven here: each of its groups has a program, and a budget, of its own"
        if behind.moved or behind.capped:
            return "not proven here: its ReLU has other ends than 0 and infinity"
        if pair.solved.entries // M * (M + N) > _LARGEST:
            return f"not proven here: its rows are {pair.solved.entries // M} x {M + N} numbers, more than {_LARGEST}"
        inputs: list[Array] = []
        targets: list[Array] = []
        for found, ours, theirs, keep in self.calls([name]):
            if found is not None:
                source = ours if asked.mode == "parallel" else theirs
                pieces = numbers(pair.dense.input_rows(layers.Call(source.args, source.kwargs, source.output))), pair.rows(ours)
                for rows, piece in zip((inputs, targets), pieces, strict=True):
                    rows.append(piece if keep is None else piece[keep])
        A, Y = np.concatenate(inputs), behind.targets(np.concatenate(targets))
        misfit, measured = sum(behind.misfit(A @ W.T, Y)), pair.solved.on + pair.solved.off
        if abs(misfit - measured) > _ALIKE * (measured + float(np.square(Y).sum())):  # an unfolding of ours that is not the module's
            return f"not proven here: its rows times its weights are not what the module computes (misfit {misfit:.9g}, not {measured:.9g})"
        omega = np.ones(N)
        if pair.pruned.has_bias:
            omega[-1] = asked.bias_weight
        V = None
        if asked.consistency == "paper" and behind.relu:
            V = A @ W_dense.T if self.budgets[name].inflation is not None else np.zeros_like(Y)
        return bound(Problem(A, Y, omega, self.budgets[name].program, behind.relu, V), W, stated=stated)

    def network(self, outputs: Outputs, held_out: Outputs | None) -> Iterator[Check]:
        """The network's certificate, its density, and what was asked of it as a whole."""
        report, certificate, asked = self.report, self.report.certificate, self.asked
        entries = sum(math.prod(layer.shape) for layer in report.layers)
        kept = sum(int((self.others[layer.name].weights() != 0).sum()) for layer in report.layers)
        yield compare("network", "density", report.density, kept / entries if entries else 1.0)
        if asked.counts and asked.shared:
            total = entries + sum(self.matrices[name].weights().numel() for name in self.left_dense if name in self.matrices)
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
        why_not = self.traced.not_chain_reason
        if self.asked.recalibrate_batchnorm:
            why_not = "the BatchNorms' statistics were estimated again"
        elif why_not is None:
            why_not = self.traced.unlike(trace(self.pruned, self.batches, self.run))
        if why_not is not None or certificate.guaranteed is None:
            same = (why_not is None) == (certificate.guaranteed is not None)
            yield decide("network", "guaranteed", same, certificate.guaranteed, None, why_not or "the layers are a chain: there is a bound")
        else:
            if self.unchecked:
                why = f"a layer of the chain is not checked here: {', '.join(self.unchecked)}"
                yield decide("network", "guaranteed", None, certificate.guaranteed, None, why)
            else:
                promised = {layer.name: layer.epsilon for layer in self.report.layers}
                own = network_bound([self._link(layer, promised) for layer in self.traced.layers], self.asked.mode)
                yield compare("network", "guaranteed", certificate.guaranteed, own, 1e-5 * own, "from the budgets and spectral norms")
            kept = certificate.measured <= certificate.guaranteed and outputs.norm <= certificate.guaranteed + slack
            yield decide("network", "bound kept", kept, certificate.guaranteed, outputs.norm)
        kept = all(layer.discrepancy <= layer.epsilon for layer in self.report.layers)
        kept &= certificate.guaranteed is None or certificate.measured <= certificate.guaranteed
        note = "whether the certificate holds, by its figures"
        yield decide("network", "verdict", certificate.holds == kept, str(certificate.holds), str(kept), note)

    def _link(self, layer: TracedLayer, promised: dict[str, float]) -> Link:
        whole = Link(layer.of(self.dense), layer.of(self.pruned), Behind.of(layer), layer.spread, layer.rows)
        if layer.name not in promised:
            return whole
        pair = self.pairs[layer.name]
        return dataclasses.replace(whole, promise=promised[layer.name], inflation=self.budgets[layer.name].inflation, size=size_of(pair))

    def _slack(self, outputs: Outputs) -> float:
        """How much rounding may move the network's output: of every layer a part, carried on as the difference itself is."""
        sizes = [size_of(pair) for pair in self.pairs.values()]
        shares = [size.noise / size.output for size in sizes if size.output]
        for name in self.unchecked:  # the sums' sizes are not known: as if no product cancelled another by more than that
            matrix = self.matrices[name]
            shares.append(EPS[str(matrix.weight.dtype)] + _CANCELLING * math.sqrt(matrix.shape[1]) * torch.finfo(matrix.compute_dtype).eps)
        relative = max(shares, default=0.0)
        noise = relative * math.sqrt(len(self.traced.layers)) * math.sqrt(outputs.square)
        return math.hypot(outputs.norm, noise) - outputs.norm + 1e-3 * noise if math.isfinite(outputs.norm) else 0.0
