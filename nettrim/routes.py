"""The way through a network: whole, for every layer anew, or block by block, with the hidden states of both networks carried along.

Behind each block's stage both hidden states go one block further, so that a call's forward passes cost as much as a few of the whole network, however
deep it is. What lies before the first block and behind the last is observed in the whole network, the blocks bypassed.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nettrim import observation
from nettrim.blockwise import Call, Chain, NotBlocks
from nettrim.calibration import Run, run_batch
from nettrim.capture import Seen
from nettrim.layers import copy_of
from nettrim.memory import give_back
from nettrim.passes import evaluation
from nettrim.replay import Replay
from nettrim.stages import Block, Part, Stage
from nettrim.tracing import Trace, TracedLayer


class Whole:
    """One stage: the whole network. Where all that its dense layers are given and give is little, it is held, as it was ``seen`` or of one pass."""

    def __init__(
        self,
        model: nn.Module,
        pruned: nn.Module,
        run: Run,
        solve: list[Any],
        held: list[Any],
        device: torch.device | str | None,
        seen: list[dict[str, Seen]] | None = None,
    ) -> None:
        self._parts = model, pruned, run, Part(solve, solve), Part(held, held), device
        self._seen, self._replay = seen, Replay()

    def stages(self, chosen: list[TracedLayer]) -> Iterator[Stage]:
        """The stages, one behind the other; the next is to be asked for when the layers of the one before it are done."""
        little = sum(layer.rows * sum(layer.matrix.shape) for layer in chosen) <= observation.HELD_ELEMENTS // 4
        stage = Block(chosen, *self._parts, seen=self._seen) if little else Stage(chosen, *self._parts)
        self._replay = stage.replay if isinstance(stage, Block) else Replay()
        yield stage

    def played(self, index: int, _aside: object) -> AbstractContextManager[None]:
        """A context in which the pruned network does not compute again what its layers put out, as they are stored, of what they are given."""
        return self._replay.played(index, looking=True)


@dataclass(eq=False)
class _Carried:
    """One stream of some samples: how every block is called in each batch, and where the hidden states are."""

    model: nn.Module
    batches: list[Any]
    calls: list[list[Call]]
    hidden: list[Tensor]

    @classmethod
    def start(cls, chain: Chain, model: nn.Module, batches: list[Any], run: Run) -> _Carried:
        found = [chain.calls(model, batch, index, run) for index, batch in enumerate(batches)]
        return cls(model, batches, [calls for calls, _ in found], [hidden for _, hidden in found])

    def into(self, place: int) -> list[tuple[Call, Tensor]]:
        return [(calls[place], hidden) for calls, hidden in zip(self.calls, self.hidden, strict=True)]

    def behind(self) -> list[tuple[Any, int, Tensor]]:
        return [(batch, index, hidden) for index, (batch, hidden) in enumerate(zip(self.batches, self.hidden, strict=True))]


class Blocks:
    """A stage for every block, and one for what lies before and behind them.

    Raises
    ------
    NotBlocks
        In some batch the blocks are not called as in the one that the chain was tried on.
    """

    def __init__(
        self,
        chain: Chain,
        model: nn.Module,
        pruned: nn.Module,
        run: Run,
        solve: list[Any],
        held: list[Any],
        device: torch.device | str | None,
        *,
        compared: bool = False,
    ) -> None:
        """``compared`` is that of `nettrim.stages.Block`."""
        self._chain, self._model, self._pruned, self._run, self._device = chain, model, pruned, run, device
        self._compared = compared
        self._batches = solve, held
        self._streams: list[tuple[_Carried, _Carried]] = []
        for batches in self._batches:  # now, not after the first layers were solved
            self._start_dense(batches)

    def _start_dense(self, batches: list[Any]) -> None:
        stream = _Carried.start(self._chain, self._model, batches, self._run)
        self._streams.append((stream, stream))

    def stages(self, chosen: list[TracedLayer]) -> Iterator[Stage]:
        """As of `Whole`."""
        owner = {layer.name: self._chain.place(layer.module_name) for layer in chosen}
        places = [place for place in owner.values() if place is not None]
        first = next((index for index, layer in enumerate(chosen) if owner[layer.name] is not None), len(chosen))
        before = [layer for layer in chosen[:first] if owner[layer.name] is None]
        behind = [layer for layer in chosen[first:] if owner[layer.name] is None]
        outside = partial(Stage, dense=self._model, pruned=self._pruned, device=self._device)
        whole = [Part(batches, batches) for batches in self._batches]
        if not places:
            # which side of the blocks a layer is on is not known then, and costs no less
            yield outside(before + behind, run=self._run, solve=whole[0], held=whole[1])
        elif before:
            yield outside(before, run=self._run, solve=whole[0], held=whole[1])
        streams = [_Carried.start(self._chain, self._pruned, batches, self._run) for batches in self._batches]
        self._streams = [(dense, pruned) for (dense, _), pruned in zip(self._streams, streams, strict=True)]
        for place in range(len(self._chain.names)):
            yield from self._block(place, [layer for layer in chosen if owner[layer.name] == place])
        if places and behind:
            parts = [Part(dense.behind(), pruned.behind()) for dense, pruned in self._streams]
            sole = self._chain.sole
            yield outside(behind, run=self._end if sole else self._run, solve=(parts if sole else whole)[0], held=(parts if sole else whole)[1])

    def _block(self, place: int, here: list[TracedLayer]) -> Iterator[Stage]:
        name = self._chain.names[place]
        home = self._pruned.get_submodule(name)
        dense, pruned = (self._brought(model.get_submodule(name)) for model in (self._model, self._pruned))
        run = partial(self._run_block, place)
        ends: list[list[Tensor]] = [[], []]
        played: Callable[[int], AbstractContextManager[None]] | None = None
        if here:
            inside = [self._rooted(layer, name, dense) for layer in here]
            parts = [Part(ours.into(place), theirs.into(place)) for ours, theirs in self._streams]
            stage = Block(inside, dense, pruned, run, parts[0], parts[1], self._device, partial(self._onward, place), self._compared)
            yield stage
            ends, played = [stage.ends, stage.pruned_ends()], stage.replay.played
            del stage
            give_back()  # what pruning its layers has freed, before the block is run once more
        for ours, theirs in self._streams:
            self._advance(ours, place, dense, run, ends[0])
            self._advance(theirs, place, pruned, run, ends[1], played)
            ends, played = [[], []], None
        if pruned is not home:
            with torch.no_grad():
                for to, value in zip(home.parameters(), pruned.parameters(), strict=True):
                    to.copy_(value)
        give_back()

    def _onward(self, place: int, index: int, out: Any) -> Tensor:
        """Put what a dense block returned of a batch solved on in the place of what it was given."""
        dense, _ = self._streams[0]
        found = self._chain.hidden(place, out)
        dense.hidden[index] = found.to(dense.hidden[index].device)
        return found

    def _brought(self, block: nn.Module) -> nn.Module:
        """The block on the device that it is run on."""
        if self._device is None or all(p.device == torch.zeros(0, device=self._device).device for p in block.parameters()):
            return block
        return copy_of(block).to(self._device)

    @staticmethod
    def _rooted(layer: TracedLayer, name: str, block: nn.Module) -> TracedLayer:
        inner = layer.module_name[len(name) :].lstrip(".")
        return dataclasses.replace(layer, module_name=inner, matrix=layer.matrix.of(block.get_submodule(inner)))

    def _run_block(self, place: int, module: nn.Module, item: tuple[Call, Tensor]) -> Any:
        call, hidden = item
        device = next((p.device for p in module.parameters()), None)
        args, kwargs = call.arguments(hidden, device)
        return module(*args, **kwargs)

    def _advance(
        self,
        stream: _Carried,
        place: int,
        module: nn.Module,
        run: Run,
        ends: list[Tensor],
        within: Callable[[int], AbstractContextManager[None]] | None = None,
    ) -> None:
        """One block further; ``ends`` are the hidden states there, where they are known, and passes run in ``within(batch's index)``."""
        for index, item in enumerate(stream.into(place)):
            if ends:
                hidden = ends[index]
            else:
                with evaluation(module), contextlib.nullcontext() if within is None else within(index):
                    hidden = self._chain.hidden(place, run_batch(module, item, index, run))
            stream.hidden[index] = hidden.to(stream.hidden[index].device)

    def _end(self, model: nn.Module, item: tuple[Any, int, Tensor]) -> Any:
        batch, index, hidden = item
        return self._chain.end(model, batch, index, self._run, hidden)

    def outputs(self) -> Iterator[Iterator[tuple[Any, Any]]]:
        """Of each part that has samples, the outputs of the dense network and the pruned one, batch by batch, when all stages are done."""
        if not self._chain.sole:
            yield from run_both(self._model, self._pruned, [part for part in self._batches if part], self._run)
            return
        for ours, theirs in self._streams:
            if ours.batches:
                pairs = zip(ours.behind(), theirs.behind(), strict=True)
                yield ((self._end(self._model, dense), self._end(self._pruned, pruned)) for dense, pruned in pairs)


def run_both(model: nn.Module, pruned: nn.Module, parts: list[list[Any]], run: Run) -> Iterator[Iterator[tuple[Any, Any]]]:
    """As `Blocks.outputs`, by running both networks whole."""

    def outputs(batch: Any, index: int) -> tuple[Any, Any]:
        found = []
        for network in (model, pruned):
            with evaluation(network):
                found.append(run_batch(network, batch, index, run))
        return found[0], found[1]

    for part in parts:
        yield (outputs(batch, index) for index, batch in enumerate(part))


def check_order(chain: Chain, traced: Trace) -> None:
    """Refuse a network in which a layer that is in no block runs between two of them.

    Raises
    ------
    NotBlocks
    """
    inside = [index for index, layer in enumerate(traced.layers) if chain.place(layer.module_name) is not None]
    for layer in traced.layers[inside[0] : inside[-1]] if inside else ():
        if chain.place(layer.module_name) is None:
            raise NotBlocks(f"layer {layer.name!r} is in no block and runs between them")
