"""Stages: some layers, and the parts of both networks that they are observed in.

A stage is the whole network, for any of its layers, or one block, for those in it. What each part is given, batch by batch, may differ: a block of
the pruned network is given the hidden states of the network pruned so far.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nettrim import capture, taking
from nettrim.accumulation import accumulated
from nettrim.calibration import Run
from nettrim.capture import Seen
from nettrim.errors import RouteError
from nettrim.grams import Gram
from nettrim.layers import Matrix
from nettrim.layers.linear import is_linear
from nettrim.memory import Room, give_back
from nettrim.observation import HELD_ELEMENTS
from nettrim.observing import Layer, directions, is_wide, observe, observed
from nettrim.replay import Replay
from nettrim.tracing import TracedLayer


class Part(NamedTuple):
    """What some samples are, batch by batch, for the dense part of a stage and for the pruned one."""

    dense: list[Any]
    pruned: list[Any]


@dataclass(frozen=True)
class Ask:
    """How layers are to be observed.

    Attributes
    ----------
    cascade : bool
        Inputs are those of the network pruned so far.
    sums : bool
        Where a layer's output is added to something, it is wanted by how much that is off.
    max_rows, seed, hold, unfold
        Of :func:`nettrim.observing.observe`.
    """

    cascade: bool
    sums: bool
    max_rows: int | None
    seed: int
    hold: bool
    unfold: bool

    def wants_sum(self, layer: TracedLayer) -> bool:
        return self.cascade and self.sums and layer.summed

    def wants_cross(self, layer: TracedLayer) -> bool:
        """Whether the sums for its program are to be made of its inputs in both networks."""
        return self.cascade and self.sums and not layer.summed and self.max_rows is None and is_wide(layer)


@dataclass(eq=False)
class Stage:
    """Some layers and where they are observed.

    Attributes
    ----------
    layers : list of TracedLayer
        As they are in ``dense``, under the names that they have in the network.
    dense, pruned : nn.Module
    run : callable(module, batch)
        How a batch is put through either.
    solve, held : Part
        The samples solved on and those kept out.
    device : optional
        Where the rows are; the layers' own by default.
    """

    layers: list[TracedLayer]
    dense: nn.Module
    pruned: nn.Module
    run: Run
    solve: Part
    held: Part
    device: torch.device | str | None

    def observe(self, layer: TracedLayer, ask: Ask) -> Layer:
        """What the layer's program needs; see :func:`nettrim.observing.observe`."""
        there = self.pruned if ask.cascade else None
        return observe(
            layer, self.dense, there, self.solve.dense, self.run, device=self.device, max_rows=ask.max_rows, seed=ask.seed, hold=ask.hold,
            unfold=ask.unfold, pruned_batches=self.solve.pruned, summed=ask.wants_sum(layer), crosses=ask.wants_cross(layer), sums=ask.sums,
        )  # fmt: skip

    def kept_out(self, layer: TracedLayer, *, cascade: bool) -> Layer:
        """The same of the samples kept out."""
        there = self.pruned if cascade else None
        return observe(layer, self.dense, there, self.held.dense, self.run, device=self.device, pruned_batches=self.held.pruned)

    def accumulated(self, wanted: list[TracedLayer]) -> dict[str, float | None]:
        """How far layers' outputs are off behind all that was pruned before them; see :func:`nettrim.accumulation.accumulated`."""
        return accumulated(self.dense, self.pruned, wanted, self.solve.dense, self.run, self.solve.pruned)


@dataclass(eq=False)
class Block(Stage):
    """The layers of one block, or of a small network: those that are given the same input are observed in one pass, and share its Gram matrix.

    ``hidden(batch's index, output)`` takes what the dense block returns, and returns the hidden state in it, where that is wanted; ``ends`` are
    those, batch by batch, once its layers were observed; ``replay`` is of the pruned block's layers, in the batches solved on. ``compared`` says that
    the trace is of the first batch, and the others are to be looked at. ``seen`` is what dense layers were given and gave in a pass before, batch by
    batch, where that is known.
    """

    hidden: Callable[[int, Any], Tensor] | None = None
    compared: bool = False
    seen: list[dict[str, Seen]] | None = None
    ends: list[Tensor] = field(default_factory=list)
    _in_sum: bool = False  # whether they are the sum that the last layer's output is a part of
    _last: list[Seen] = field(default_factory=list)  # of the last layer in the pruned block, where they are
    _dense: dict[str, list[Seen]] = field(default_factory=dict)
    _along: dict[str, Tensor] = field(default_factory=dict)  # directions along which the dense inputs are known, where they are not held
    replay: Replay = field(default_factory=Replay)
    _groups: dict[str, str] | None = None
    _inputs: tuple[str, list[Seen]] | None = None
    _gram: tuple[tuple[str, bool], Gram] | None = None

    def observe(self, layer: TracedLayer, ask: Ask) -> Layer:
        if any(other.matrix.kind.repeats or not other.matrix.kind.observed for other in self.layers):
            return super().observe(layer, ask)
        if self._groups is None:
            self._look(ask)
        assert self._groups is not None
        group = self._groups[layer.name]
        if self._inputs is not None and self._inputs[0] != group:
            self._inputs = None
        if self._gram is None or self._gram[0] != (group, layer.matrix.has_bias):
            self._gram = (group, layer.matrix.has_bias), Gram()
        try:
            return observed(
                layer,
                partial(self._given, layer, ask),
                partial(self._disturbed, layer, group, ask) if ask.cascade else None,
                device=self.device,
                max_rows=ask.max_rows,
                seed=ask.seed,
                hold=ask.hold,
                unfold=ask.unfold,
                gram=self._gram[1],
                along=self._along.get(layer.name),
                crosses=ask.wants_cross(layer),
                sums=ask.sums,
                outputs=partial(self._stored, layer) if ask.cascade and layer.name in self._dense else None,
            )
        finally:
            self._dense.pop(layer.name, None)

    def _look(self, ask: Ask) -> None:
        """Run the dense block once: what its layers are given and give, where that can be held, and which are given the same."""
        held = sum(layer.rows * (sum(layer.matrix.shape) + layer.matrix.shape[0] * ask.wants_sum(layer)) for layer in self.layers) <= HELD_ELEMENTS
        matrices = {layer.name: layer.matrix for layer in self.layers}
        summed = [layer.name for layer in self.layers if held and ask.wants_sum(layer)]
        rooms = {(layer.name, what): Room(layer.rows) for layer in self.layers for what in Seen._fields}

        if held and ask.cascade:  # programs see the pruned network's inputs; the dense ones only say whether those differ
            self._along = {layer.name: R for layer in self.layers if (R := directions(layer.matrix, self.device)) is not None}

        widths = {layer.matrix.shape[1] for layer in self.layers if ask.wants_cross(layer)}
        # what they are given may be what one is given whose dense inputs are wanted themselves
        whole = {layer.name for layer in self.layers if layer.matrix.shape[1] in widths and not ask.wants_sum(layer)}

        def place(name: str, what: str, tensor: Tensor) -> Tensor:
            if what == "kept" and name in self._along and name not in whole:
                with torch.autocast(tensor.device.type, enabled=False):  # which the network may run under
                    tensor = tensor.to(self._along[name]) @ self._along[name]
            return rooms[name, what].put(tensor)

        names = [layer.name for layer in self.layers]
        if held and not summed and self.seen is not None and all(name in found for found in self.seen for name in names):
            for found in self.seen:
                self._note({name: found[name] for name in names}, held)
            return
        self.ends, last = [], self.layers[-1]
        keep = place if held else None
        self._in_sum = self.hidden is not None and last.name in summed and last.norm is None and is_linear(last.matrix.kind)
        passes = taking.together(
            self.dense, self.solve.dense, self.run, matrices, device=self.device, summed=summed, place=keep, recorded=self.compared
        )
        first, rows = None, Counter[str]()
        for index, (found, output, sums) in enumerate(passes):
            if self.compared:
                first = first or sums.seen
                rows.update(sums.seen.rows)
                other = next(iter(sums.used_outside), None) or first.differs(sums.seen)
                if other is not None:
                    raise _unlike(other, index)
            if self.hidden is not None:
                self.ends.append(self.hidden(len(self.ends), output))
                self._in_sum = self._in_sum and sums.is_sum(last.name, self.ends[-1])
            self._note(found, held)
        other = next((layer.name for layer in self.layers if self.compared and rows[layer.name] != layer.rows), None)
        if other is not None:
            raise _unlike(other, None)
        self._give_back()
        if self.hidden is not None and held and ask.cascade and all(is_linear(layer.matrix.kind) for layer in self.layers):
            self.solve.dense.clear()  # all that the dense block is asked for is known: its hidden states need not be kept

    def _note(self, found: dict[str, Seen], held: bool) -> None:
        """What the dense layers are given and give in the next batch."""
        firsts: dict[int, str] = {}
        here = {name: firsts.setdefault(id(seen.kept), name) for name, seen in found.items()}
        # alike in every batch, or by itself
        self._groups = here if self._groups is None else {name: group if here[name] == group else name for name, group in self._groups.items()}
        if held:
            for name, seen in found.items():
                self._dense.setdefault(name, []).append(seen)

    def _give_back(self) -> None:
        if self.hidden is not None:  # of a whole network little is held, and what is given back is asked for anew
            give_back()

    def _given(self, layer: TracedLayer, ask: Ask) -> Iterator[Seen]:
        if layer.name in self._dense:
            return iter(self._dense[layer.name])
        return capture.kept(self.dense, self.solve.dense, self.run, layer.matrix, device=self.device, summed=ask.wants_sum(layer))

    def _disturbed(self, layer: TracedLayer, group: str, ask: Ask) -> Iterator[Seen]:
        """What the layers of the group are given in the pruned block: it does not depend on their own weights; what is added to them may."""
        if self._inputs is None or ask.wants_sum(layer):
            matrix, summed = layer.of(self.pruned), ask.wants_sum(layer)
            within = self.replay.played
            found = capture.kept(self.pruned, self.solve.pruned, self.run, matrix, device=self.device, summed=summed, given=True, within=within)
            if layer.name not in self._dense:  # too much to hold
                return found
            self._give_back()  # what the programs of the layers before have freed
            room, others = Room(layer.rows), Room(layer.rows)
            held = [seen._replace(kept=room.put(seen.kept), beside=None if seen.beside is None else others.put(seen.beside)) for seen in found]
            self._give_back()
            self._inputs = group, [seen._replace(beside=None) for seen in held]
            if self._in_sum and layer is self.layers[-1]:
                self._last = [seen._replace(beside=None if seen.beside is None else seen.beside.clone()) for seen in held]
            if summed:
                return iter(held)
        return iter(self._inputs[1])

    def _stored(self, layer: TracedLayer, matrix: Matrix) -> Tensor | None:
        """What the stored layer puts out, all rows; None where it cannot be run alone."""
        given = [] if self._inputs is None else [seen.kept for seen in self._inputs[1]]
        return self.replay.record(matrix.module, given, layer.rows, marked=self.hidden is None) if self.replay.runs_alone(matrix, given) else None

    def pruned_ends(self) -> list[Tensor]:
        """What the pruned block puts out, batch by batch, if no pass is needed for it: it is the sum of its last layer's output, which was solved
        last, and of what was seen beside it. Empty where it is not known.
        """
        matrix, found = self.layers[-1].of(self.pruned), []
        inputs = [seen.kept for seen in self._last]
        if inputs and not self.replay.outputs_of(matrix.module) and self.replay.runs_alone(matrix, inputs):  # it was left as it is
            self.replay.record(matrix.module, inputs, self.layers[-1].rows)
        for seen, own, end in zip(self._last, self.replay.outputs_of(matrix.module), self.ends, strict=False):
            assert seen.beside is not None
            if own.dtype != end.dtype:  # the network runs under autocast
                return []
            found.append((seen.beside + own).to(end.dtype).reshape(end.shape))  # exact in the wider dtype, so rounded once
        return found


def _unlike(name: str, index: int | None) -> RouteError:
    where = "the calibration batches" if index is None else f"calibration batch {index}"
    return RouteError(
        f"layer {name!r} does not run in {where} as the first batch had shown, though no values were seen to decide what runs: give "
        "blocks=None, with which every batch is looked at before anything is solved"
    )
