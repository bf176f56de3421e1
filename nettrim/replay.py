"""What stored linear layers put out, batch by batch: what was computed to measure them is not computed again in the passes behind them.

A later pass gives a layer the same input, since only layers behind it have changed: where it is another, as in a second call, the layer computes.
In the last pass, which measures the network, that is looked at: a network may have noise in it, or change from call to call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nettrim.layers import Call, Matrix
from nettrim.layers.linear import is_linear
from nettrim.memory import Room
from nettrim.passes import replaced
from nettrim.recorder import is_aligned


class Replay:
    """Outputs of layers as they are stored now, each on its inputs in the network pruned so far."""

    def __init__(self) -> None:
        self._known: dict[nn.Module, tuple[_State, list[Tensor]]] = {}
        self._marks: dict[nn.Module, list[Tensor]] = {}

    @staticmethod
    def runs_alone(matrix: Matrix, inputs: Iterable[Tensor]) -> bool:
        """Whether a module computes by itself what it does in the network."""
        weight = matrix.weight
        return is_linear(matrix.kind) and all(x.dtype == weight.dtype and x.device == weight.device for x in inputs)

    def record(self, module: nn.Module, inputs: Iterable[Tensor], rows: int, *, marked: bool = False) -> Tensor | None:
        """Run a module on its inputs, batch by batch. What it returns is played as long as its parameters stay as they are.

        Returns all outputs (``rows``, M) as one tensor, where there are so many. With ``marked`` inputs those that differ can be told apart later.
        """
        room, marks, found = Room(rows), [], []
        # its forward alone: its hooks run when the outputs are played; a copy, since products are rounded by where their factors begin in memory
        with torch.no_grad():
            for x in map(Tensor.clone, inputs):
                marks += [_mark(x)] if marked else []
                found.append(room.put(module.forward(x)))
        self._known[module], self._marks[module] = (_state(module), found), marks
        return room.rows

    def outputs_of(self, module: nn.Module) -> list[Tensor]:
        """What it returns, batch by batch; empty where that is not known."""
        state, found = self._known.get(module, ([], []))
        now = _state(module)
        same = len(state) == len(now) and all(a is b and version == other for (a, version), (b, other) in zip(state, now, strict=True))
        return found if same else []

    @contextmanager
    def played(self, index: int, *, looking: bool = False) -> Iterator[None]:
        """Let the layers return what is known of them in batch ``index``, once each; hooks run as before. Inside `nettrim.passes.evaluation`.

        ``looking`` at what they are given, which was marked: where it is not what it was, they compute.
        """
        with ExitStack() as stack:
            for module in self._known:
                if found := self.outputs_of(module):
                    once = _Once(found[index], self._marks[module][index] if looking else None)
                    stack.callback(module.register_forward_pre_hook(once.called).remove)
                    stack.enter_context(replaced(module, partial(once.forward, module, module.forward)))
            yield


class _Once:
    """One output, for the first call of a module as a module: not for one of its forward, which no hook sees."""

    def __init__(self, output: Tensor, mark: Tensor | None) -> None:
        self._output: Tensor | None = output
        self._mark, self._called = mark, False

    def called(self, module: nn.Module, args: Any) -> None:
        self._called = True

    def forward(self, module: nn.Module, own: Any, *args: Any, **kwargs: Any) -> Any:
        x, output = Call(args, kwargs, None).argument(module), self._output
        called, self._called = self._called, False
        if not called or output is None or not _fits(x, output) or torch.is_autocast_enabled(x.device.type):
            return own(*args, **kwargs)
        if self._mark is not None and not torch.equal(_mark(x), self._mark):
            return own(*args, **kwargs)
        self._output = None
        return output.clone().view(*x.shape[:-1], output.shape[1])


_State = list[tuple[nn.Parameter, int]]


def _fits(x: Any, rows: Tensor) -> bool:
    """Whether the layer would make the very same of its input: another layout, or another place in memory, and products are rounded otherwise."""
    if not isinstance(x, Tensor) or not x.is_contiguous() or not is_aligned(x):
        return False
    return x.dtype == rows.dtype and x.device == rows.device and x.shape[:-1].numel() == len(rows)


def _mark(x: Tensor) -> Tensor:
    """One number a row, by which inputs that differ are told apart: their product with a direction that has no zeros."""
    wide = x.flatten(0, -2) if x.dtype == torch.float64 else x.flatten(0, -2).float()
    return wide @ torch.linspace(1, 2, x.shape[-1], dtype=wide.dtype, device=x.device).sin()


def _state(module: nn.Module) -> _State:
    return [(parameter, parameter._version) for parameter in module.parameters()]
