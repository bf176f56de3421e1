"""What stored linear layers put out, batch by batch: what was computed to measure them is not computed again in the passes behind them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nettrim.layers import Call, Matrix
from nettrim.layers.linear import is_linear
from nettrim.passes import replaced


class Room:
    """Room for the rows that come batch by batch, as one tensor: a large one goes back to the system when it is freed, many small ones may not."""

    def __init__(self, rows: int) -> None:
        self._rows, self._filled, self._apart = rows, 0, False
        self._whole: Tensor | None = None

    def put(self, piece: Tensor) -> Tensor:
        """A copy of the piece in its place, or elsewhere if it is not some of the rows."""
        end = self._filled + len(piece)
        if piece.dim() != 2 or end > self._rows or (self._whole is not None and self._whole.shape[1] != piece.shape[1]):
            self._apart = True
            return piece.clone()
        if self._whole is None:
            self._whole = piece.new_empty(self._rows, piece.shape[1])
        here = self._whole[self._filled : end]
        self._filled = end
        return here.copy_(piece)

    @property
    def rows(self) -> Tensor | None:
        """All of them, where they are there one behind the other."""
        return self._whole if self._filled == self._rows and not self._apart else None


class Replay:
    """Outputs of layers as they are stored, on what they are given in a network pruned so far."""

    def __init__(self) -> None:
        self._known: dict[nn.Module, tuple[Any, list[Tensor]]] = {}

    @staticmethod
    def knows(matrix: Matrix, given: Iterable[Tensor]) -> bool:
        """Whether a module alone computes what it does in the network."""
        weight = matrix.weight
        return is_linear(matrix.kind) and all(x.dtype == weight.dtype and x.device == weight.device for x in given)

    def record(self, module: nn.Module, given: Iterable[Tensor], rows: int) -> Tensor | None:
        """Run a module on its inputs, batch by batch, so many rows in all: what it returns is played as long as its parameters stay as they are.

        Returns all rows (P, M) of it, where the inputs are so many.
        """
        room = Room(rows)
        with torch.no_grad():  # by its own forward, whose hooks are no part of it; elsewhere in memory products may be rounded in another way
            found = [room.put(module.forward(x.clone())) for x in given]
        self._known[module] = _state(module), found
        return room.rows

    def of(self, module: nn.Module) -> list[Tensor]:
        """What it returns, batch by batch; empty where that is not known."""
        state, found = self._known.get(module, (None, []))
        return found if state == _state(module) else []

    @contextmanager
    def played(self, index: int) -> Iterator[None]:
        """Let the layers return what is known of them in batch ``index``; their hooks run as before. Inside `nettrim.passes.evaluation`."""
        with ExitStack() as stack:
            for module in self._known:
                if found := self.of(module):
                    stack.enter_context(replaced(module, partial(_play, module, module.forward, [found[index]])))
            yield


def _play(module: nn.Module, forward: Any, ready: list[Tensor], *args: Any, **kwargs: Any) -> Any:
    x = Call(args, kwargs, None).argument(module)
    # of a second call, of rows with gaps, and under autocast, something else would come out
    if not ready or not _fits(x, ready[0]) or torch.is_autocast_enabled(x.device.type):
        return forward(*args, **kwargs)
    found = ready.pop()
    return found.clone().view(*x.shape[:-1], found.shape[1])


def _fits(x: Any, rows: Tensor) -> bool:
    return isinstance(x, Tensor) and x.is_contiguous() and x.dtype == rows.dtype and x.device == rows.device and x.shape[:-1].numel() == len(rows)


def _state(module: nn.Module) -> Any:
    return [(id(parameter), parameter._version) for parameter in module.parameters()]
