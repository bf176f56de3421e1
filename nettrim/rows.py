"""The rows of a layer program: in memory, memory-mapped or streamed, always read chunk by chunk.

A chunk is what a computation over P rows may hold at a time, so that P never decides how much memory is needed beyond what was given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nettrim import sharing
from nettrim.errors import ArgumentError
from nettrim.precision import all_finite

CHUNK_ELEMENTS = 1_000_000
PICKED_ELEMENTS = 32_000_000  # of some columns of rows in memory: up to here they are copied, beyond picked anew from every chunk
BLOCK_ELEMENTS = 125_000  # of a block of neurons' weights: what is computed from it stays in the processor's cache

Stream = Callable[[], Iterable[Any]]


@dataclass(frozen=True)
class Checked:
    """A stream of rows whose numbers were looked at where they were made: what reading it once would say.

    Attributes
    ----------
    chunks : callable
        Returns a fresh iterable of row chunks each time.
    count, width : int
    dtype : torch.dtype
    device : torch.device
    """

    chunks: Stream
    count: int
    width: int
    dtype: torch.dtype
    device: torch.device

    def __call__(self) -> Iterable[Any]:
        return self.chunks()


def _floating(value: object, name: str) -> Tensor:
    """A tensor over the same memory where that is possible, in float32 or float64."""
    if isinstance(value, np.ndarray):
        with sharing.quiet(UserWarning):  # that the array cannot be written: nothing here writes
            value = torch.from_numpy(np.ascontiguousarray(value))
    if not isinstance(value, Tensor):
        raise ArgumentError(f"{name} is a {type(value).__name__}; expected a torch tensor or a numpy array")
    value = value.detach()
    if not value.is_floating_point():
        raise ArgumentError(f"{name} has dtype {value.dtype}; expected a floating-point dtype")
    return value if value.dtype in (torch.float32, torch.float64) else value.float()


def as_rows(value: object, name: str, like: Tensor | None = None) -> Tensor:
    """``value`` as a floating-point tensor, every number finite (checked in chunks); of the device and dtype of ``like``."""
    tensor = _floating(value, name)
    if like is not None:
        tensor = tensor.to(like.device, like.dtype)
    for chunk in tensor.split(max(1, CHUNK_ELEMENTS // max(1, tensor[:1].numel()))) if tensor.ndim else (tensor,):
        if not all_finite(chunk):
            raise ArgumentError(f"{name} holds NaN or infinity; expected finite numbers")
    return tensor


def _check_floor(targets: Tensor, floor: Tensor | None) -> None:
    if floor is None:
        return
    floor = floor.to(targets)
    if any(bool((chunk < floor).any()) for chunk in targets.split(max(1, CHUNK_ELEMENTS // max(1, targets.shape[-1])))):
        raise ArgumentError(
            "targets hold "
            + ("numbers below the floor" if bool(floor.any()) else "negative numbers")
            + "; with activation='relu' they are outputs after the ReLU (or pass activation=None)"
        )


def _batches(pairs: Iterator[tuple[Tensor, Tensor]], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The same rows in batches of one size, the last apart: sums over them then round alike, however the rows come."""
    held: list[tuple[Tensor, Tensor]] = []
    missing = size
    for A, Y in pairs:
        while len(A):
            held.append((A[:missing], Y[:missing]))
            missing -= len(held[-1][0])
            A, Y = A[len(held[-1][0]) :], Y[len(held[-1][0]) :]
            if missing == 0:
                yield _joined(held)
                held, missing = [], size
    if held:
        yield _joined(held)


def _joined(pieces: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return pieces[0] if len(pieces) == 1 else (torch.cat([A for A, _ in pieces]), torch.cat([Y for _, Y in pieces]))


class Rows:
    """``A`` (P, N), ``Y`` (P, M) and perhaps ``V`` (P, M), read side by side.

    Parameters
    ----------
    inputs, targets : Tensor, ndarray or callable
        An array (a ``numpy.memmap`` stays on disk), or a callable that returns a fresh iterable of row chunks each time. ``targets`` may be an
        array beside streamed ``inputs``; two streams must yield chunks of the same lengths.
    upper : Tensor, optional
        An array, beside streams too.
    floor : Tensor, (1,) or (M,), optional
        Targets below it are refused: those of a layer before a ReLU.

    Raises
    ------
    ArgumentError
        Shapes, dtypes or values that don't fit. A stream is read once to count and to check its rows, if they are not `Checked`.
    """

    def __init__(self, inputs: object, targets: object, upper: object = None, *, floor: Tensor | None = None) -> None:
        self._stream: Stream | None = None
        self._target_stream: Stream | None = None
        self.inputs: Tensor | None = None
        self.targets: Tensor | None = None
        self._copy: tuple[Tensor, Tensor] | None = None  # indices of columns, and those columns
        self.in_memory = isinstance(inputs, (Tensor, np.ndarray)) and not isinstance(inputs, np.memmap)
        if callable(inputs) and not isinstance(inputs, (Tensor, np.ndarray)):
            self._stream = inputs
            if callable(targets) and not isinstance(targets, (Tensor, np.ndarray)):
                self._target_stream = targets
            else:
                self.targets = as_rows(targets, "targets")
            if isinstance(inputs, Checked) and isinstance(targets, Checked):
                self.count, self.width, self.outputs, self.dtype, self.device = inputs.count, inputs.width, targets.width, inputs.dtype, inputs.device
            else:
                self._read_once(floor)
        else:
            self.inputs = as_rows(inputs, "inputs")
            self.targets = as_rows(targets, "targets", like=self.inputs)
            if self.inputs.ndim != 2 or self.targets.ndim != 2 or self.inputs.shape[0] != self.targets.shape[0]:
                raise ArgumentError(
                    f"inputs have shape {tuple(self.inputs.shape)} and targets {tuple(self.targets.shape)}; expected (P, N) and (P, M)"
                )
            _check_floor(self.targets, floor)
            self.count, self.width = self.inputs.shape
            self.outputs = self.targets.shape[1]
            self.dtype, self.device = self.inputs.dtype, self.inputs.device
        if 0 in (self.count, self.width, self.outputs):
            raise ArgumentError(f"inputs {(self.count, self.width)} or targets {(self.count, self.outputs)} are empty")
        like = self.inputs if self.inputs is not None else torch.empty(0, dtype=self.dtype, device=self.device)
        self.upper = None if upper is None else as_rows(upper, "upper", like=like)
        if self.upper is not None and self.upper.shape != (self.count, self.outputs):
            raise ArgumentError(f"upper has shape {tuple(self.upper.shape)}; expected that of targets, {(self.count, self.outputs)}")

    @property
    def streamed(self) -> bool:
        return self._stream is not None

    def _read_once(self, floor: Tensor | None) -> None:
        """Count a stream's rows and check them; its first chunk says width, dtype and device."""
        self.count, self.width, self.outputs = 0, 0, 0
        for A, Y in self._pairs():
            if not self.count:
                self.width, self.dtype, self.device, self.outputs = A.shape[1], A.dtype, A.device, Y.shape[1]
            if A.shape != (len(Y), self.width) or Y.shape[1] != self.outputs:
                raise ArgumentError(f"a chunk of the stream has inputs {tuple(A.shape)} and targets {tuple(Y.shape)}; expected rows of one width")
            _check_floor(Y, floor)
            self.count += len(A)
        if self.targets is not None and len(self.targets) != self.count:
            raise ArgumentError(f"the stream of inputs has {self.count} rows and targets {len(self.targets)}; expected as many")

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        assert self._stream is not None
        start = 0
        targets = None if self._target_stream is None else iter(self._target_stream())
        for chunk in self._stream():
            A = as_rows(chunk, "inputs")
            if A.ndim != 2:
                raise ArgumentError(f"a chunk of the stream of inputs has shape {tuple(A.shape)}; expected (rows, N)")
            if targets is None:
                assert self.targets is not None
                Y = self.targets[start : start + len(A)]
            else:
                Y = as_rows(next(targets, A[:0]), "targets")
                if Y.ndim != 2:
                    raise ArgumentError(f"a chunk of the stream of targets has shape {tuple(Y.shape)}; expected (rows, M)")
            yield A, Y.to(A.device)
            start += len(A)

    def chunks(self, dtype: torch.dtype, columns: Tensor | None = None) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
        """``(rows, A, Y, V)`` chunk by chunk in ``dtype``; of ``A`` only some columns, if their indices are given."""

        step = max(1, CHUNK_ELEMENTS // (self.width + self.outputs))
        if self.inputs is not None and self.targets is not None:
            inputs, columns = self._picked(columns)
            for start in range(0, self.count, step):
                rows = slice(start, min(start + step, self.count))
                V = None if self.upper is None else self.upper[rows].to(dtype)
                yield rows, _some(inputs[rows], columns).to(dtype), self.targets[rows].to(dtype), V
            return
        start = 0
        for a, y in _batches(self._pairs(), step):
            V = None if self.upper is None else self.upper[start : start + len(a)].to(dtype)
            yield slice(start, start + len(a)), _some(a, columns).to(dtype), y.to(dtype), V
            start += len(a)
        if start != self.count:
            raise ArgumentError(f"the stream of inputs gave {start} rows after {self.count} the first time; expected the same rows each time")

    def target_chunks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """``(rows, Y, V)`` of the same chunks, without the inputs being read."""
        step = max(1, CHUNK_ELEMENTS // (self.width + self.outputs))
        if self.targets is not None:
            for start in range(0, self.count, step):
                rows = slice(start, min(start + step, self.count))
                yield rows, self.targets[rows].to(dtype), None if self.upper is None else self.upper[rows].to(dtype)
            return
        assert self._target_stream is not None
        start = 0
        for y, _ in _batches(((Y, Y) for Y in (as_rows(chunk, "targets").to(self.device) for chunk in self._target_stream())), step):
            yield slice(start, start + len(y)), y.to(dtype), None if self.upper is None else self.upper[start : start + len(y)].to(dtype)
            start += len(y)

    def _picked(self, columns: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The inputs, and which of their columns are still to be picked: none where a copy of them is small enough to keep."""
        assert self.inputs is not None
        if columns is None or not self.in_memory or self.count * len(columns) > PICKED_ELEMENTS:
            self._copy = None
            return self.inputs, columns
        if self._copy is None or self._copy[0] is not columns:
            self._copy = None  # before the next is made
            self._copy = columns, self.inputs.index_select(1, columns)
        return self._copy[1], None


def _some(A: Tensor, columns: Tensor | None) -> Tensor:
    return A if columns is None else A.index_select(1, columns)
