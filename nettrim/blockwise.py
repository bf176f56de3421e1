"""Networks of blocks, one behind the other: how each block is called, found by running the network once, so that blocks can be run alone.

A block's input is the output of the block before it; whatever else it is called with (masks, position embeddings, tuples, flags) is what the network
makes before its first block, and is taken from a run in which every block is replaced by a stub, which computes nothing. That a network is made like
this is not assumed but tried on a batch: with stubs that put out random numbers, every block is given just what the one before it put out, and
nothing else that it is given has changed; and every block run alone gives what it gives in the network.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from nettrim.calibration import Run, run_batch
from nettrim.errors import NetTrimError
from nettrim.passes import Stop, evaluation, replaced

HIDDEN = object()  # where a block's output holds the hidden state
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


class NotBlocks(NetTrimError):
    """The network is not one of blocks, and why; it is run whole then, or the call is refused."""


@dataclass(frozen=True)
class Call:
    """What a block is called with: the leaves of its arguments, the hidden state left out, and where that belongs."""

    leaves: list[Any]
    spec: TreeSpec
    slot: int

    def arguments(self, hidden: Tensor, device: torch.device | None, *, traced: bool = False) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments for one run: copies, which the block may write into; of the hidden state with its gradient, if it is ``traced``."""
        made = [_copied(leaf, device) for leaf in self.leaves]
        made[self.slot] = hidden.clone() if traced else _copied(hidden, device)
        return tree_unflatten(made, self.spec)


def _copied(leaf: Any, device: torch.device | None) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.detach().to(device=device, copy=True)
    return leaf if isinstance(leaf, _PLAIN) else copy.deepcopy(leaf)  # a cache, say, that the block fills


@dataclass(frozen=True)
class Chain:
    """The blocks of a network, and what each puts out.

    Attributes
    ----------
    names : tuple of str
        Qualified names, in execution order.
    slots : tuple of int
        Which leaf of a block's arguments is the hidden state.
    outputs : tuple of (list, TreeSpec)
        The leaves of what a block returns: `HIDDEN`, the number of the argument that it passes on, or a constant in a tuple.
    said : str
        What they are, in words.
    sole : bool
        Whether the network's output is made of what the last block puts out, and of nothing else that the blocks do.
    entries : tuple of int
        How many entries the first block's hidden state has in each batch.
    """

    names: tuple[str, ...]
    slots: tuple[int, ...]
    outputs: tuple[tuple[list[Any], TreeSpec], ...]
    said: str
    sole: bool = True
    entries: tuple[int, ...] = ()

    def place(self, module_name: str) -> int | None:
        """Which block a module is, or lies in."""
        return next((index for index, name in enumerate(self.names) if f"{module_name}.".startswith(f"{name}.")), None)

    def hidden(self, index: int, out: Any) -> Tensor:
        """The hidden state in what block ``index`` returned."""
        leaves, _ = tree_flatten(out)
        return leaves[self.outputs[index][0].index(HIDDEN)]

    @contextmanager
    def bypassed(self, model: nn.Module, put_out: Callable[[int, Call, Tensor], Tensor]) -> Iterator[None]:
        """Every block computes nothing: it returns what ``put_out(block, call, hidden state)`` says."""
        with ExitStack() as stack:
            for index, name in enumerate(self.names):
                stack.enter_context(replaced(model.get_submodule(name), self._stub(index, put_out)))
            yield

    def _stub(self, index: int, put_out: Callable[[int, Call, Tensor], Tensor]) -> Callable[..., Any]:
        template, spec = self.outputs[index]

        def forward(*args: Any, **kwargs: Any) -> Any:
            leaves, own = tree_flatten((args, kwargs))
            slot = self.slots[index]
            if slot >= len(leaves) or not isinstance(leaves[slot], Tensor):
                raise NotBlocks(f"block {self.names[index]!r} is called in another way in some batch")
            given = leaves[slot]
            hidden = put_out(index, Call([None if place == slot else leaf for place, leaf in enumerate(leaves)], own, slot), given)
            made = [hidden if item is HIDDEN else leaves[item] if isinstance(item, int) else item[0] for item in template]
            return tree_unflatten(made, spec)

        return forward

    def calls(self, model: nn.Module, batch: Any, index: int, run: Run) -> tuple[list[Call], Tensor]:
        """How every block is called for a batch, and the first one's hidden state; only what comes before the blocks is computed."""
        found: list[Call] = []
        first: list[Tensor] = []

        def put_out(place: int, call: Call, hidden: Tensor) -> Tensor:
            if place != len(found):
                raise NotBlocks("its blocks run in another order in some batch")
            if not found:
                first.append(hidden.detach().clone())
            found.append(_sparing(call, found))
            if len(found) == len(self.names):
                raise Stop
            return hidden

        with evaluation(model), self.bypassed(model, put_out):
            try:
                run_batch(model, batch, index, run)
            except Stop:
                return found, first[0]
        raise NotBlocks(f"only {len(found)} of its {len(self.names)} blocks run in calibration batch {index}")

    def end(self, model: nn.Module, batch: Any, index: int, run: Run, hidden: Tensor, *, traced: bool = False) -> Any:
        """The network's output where its last block puts out ``hidden``, ``traced`` for its gradient."""

        def put_out(place: int, call: Call, given: Tensor) -> Tensor:
            return hidden.to(given.device) if place + 1 == len(self.names) else given

        with evaluation(model), torch.set_grad_enabled(traced), self.bypassed(model, put_out):
            return run_batch(model, batch, index, run)


def _sparing(call: Call, before: list[Call]) -> Call:
    """The call with tensors that are equal to the first block's in one place in memory."""
    if not before:
        return call
    others = [leaf for leaf in before[0].leaves if isinstance(leaf, Tensor)]
    for index, leaf in enumerate(call.leaves):
        if isinstance(leaf, Tensor) and not any(leaf is other for other in others):
            call.leaves[index] = next((other for other in others if equal(leaf, other)), leaf)
    return call


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same but for where they lie."""
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
