"""One forward pass, recorded: which layers ran, and what became of the output of each.

Module hooks say where a supported layer begins and ends; between layers a dispatch mode sees every tensor operation.
The result of a layer is a *value*: its pre-activation, and what a ReLU makes of it, its post-activation. A value is
followed by the storage that holds it, so that views, reshapes and in-place operations need no special care: a tensor
*is* the value if it covers all of it once, in any order of the elements; any other use counts as another use.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nettrim.capture import tensors_in

_ATEN = torch.ops.aten
_RELU = {_ATEN.relu.default, _ATEN.relu_.default}
_CLAMP = {_ATEN.clamp.default, _ATEN.clamp_.default, _ATEN.clamp_min.default, _ATEN.clamp_min_.default}
_THRESHOLD = {_ATEN.threshold.default, _ATEN.threshold_.default}
_COPIES = {_ATEN.clone.default, _ATEN._to_copy.default}


@dataclass(eq=False)
class _Value:
    """The output of one call of a layer."""

    layer: str
    relu: bool = False
    other_use: str | None = None  # the first use of the pre-activation that is no ReLU
    uses: list[str] = field(default_factory=list)  # every use, before or after the ReLU, but the ReLU itself

    def used_by(self, what: object, *, after: bool) -> None:
        self.uses.append(str(what))
        if not after:
            self.other_use = self.other_use or str(what)


@dataclass(frozen=True)
class _Cell:
    """What a storage holds: a value, before or after its ReLU, at one place in the storage."""

    value: _Value
    after: bool
    offset: int
    numel: int
    dtype: torch.dtype

    def is_whole(self, tensor: Tensor) -> bool:
        """Whether the tensor covers the value's elements once each, as they are."""
        place = (tensor.storage_offset(), tensor.numel(), tensor.dtype)
        same = place == (self.offset, self.numel, self.dtype)
        return same and _is_dense(tensor) and not tensor.is_neg() and not tensor.is_conj()


Reading = tuple[str, bool] | None  # the layer whose value was read, and whether after a ReLU


@dataclass
class PassRecord:
    """What one forward pass has shown.

    Attributes
    ----------
    calls : names of the layers in execution order, one entry a call
    values : the outputs, in the same order
    reads : of what each layer's input exactly is the value, if of any
    returned : of what the model's output exactly is the value, if it is one tensor
    """

    calls: list[str] = field(default_factory=list)
    values: list[_Value] = field(default_factory=list)
    reads: dict[str, Reading] = field(default_factory=dict)
    returned: Reading = None

    def relu(self, name: str) -> bool:
        """Whether everything that the layer put out went through ReLU and nowhere else."""
        values = [value for value in self.values if value.layer == name]
        return bool(values) and all(value.relu and value.other_use is None for value in values)

    def sole_reader(self, name: str) -> str | None:
        """The layer whose input is the one use of what the layer put out; None where there are other uses, or none."""
        uses = [use for value in self.values if value.layer == name for use in value.uses]
        return next((other for other in self.calls if uses == [_input_of(other)]), None)


class Recorder(TorchDispatchMode):
    """Follows the layers' values through one forward pass, and notes weights that are used outside their layer.

    Use as ``with recorder.hooks(), recorder: output = ...``, then `finish(output)`, drop the output, `note_kept()`.
    """

    supports_higher_order_operators = True

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        self.modules = modules
        self.seen = PassRecord()
        self.cells: dict[StorageWeakRef, _Cell] = {}  # weak: the activations are freed as without the trace
        self.inside = False  # a layer's forward: what it does with its own input and weights is no other use
        self.used_outside: dict[str, str] = {}
        self.weights: dict[StorageWeakRef, list[tuple[str, tuple[int, int]]]] = {}
        for name, module in modules.items():
            for parameter in module.parameters(recurse=False):
                self.weights.setdefault(storage_of(parameter), []).append((name, extent_of(parameter)))

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Note where each layer begins and ends, as long as the context lasts."""
        with ExitStack() as stack:
            for name, module in self.modules.items():
                before, after = self._hooks_of(name)
                # last before and first behind the layer's own forward, so that other hooks count as other operations
                stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(after, prepend=True, always_call=True).remove)
            yield

    def _hooks_of(self, name: str) -> tuple[Any, Any]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs.get("input")
            self.seen.reads[name] = self._read(x, _input_of(name)) if isinstance(x, Tensor) else None
            self.inside = True

        def after(module: nn.Module, args: tuple[Any, ...], out: Tensor | None) -> None:
            self.inside = False
            if out is None:  # the forward raised
                return
            value = _Value(name)
            self.seen.calls.append(name)
            self.seen.values.append(value)
            self._put(out, value, after=False)

        return before, after

    def _read(self, tensor: Tensor, reader: str) -> Reading:
        cell = self.cells.get(storage_of(tensor)) if _has_storage(tensor) else None
        if cell is None:
            return None
        cell.value.used_by(reader, after=cell.after)
        return (cell.value.layer, cell.after) if cell.is_whole(tensor) else None

    def _put(self, tensor: Tensor, value: _Value, *, after: bool) -> None:
        if _has_storage(tensor):
            cell = _Cell(value, after, int(tensor.storage_offset()), tensor.numel(), tensor.dtype)
            self.cells[storage_of(tensor)] = cell

    def finish(self, output: Any) -> None:
        """Note what the model returns; its values are then used outside the network."""
        readings = [self._read(tensor, "the model's output") for tensor in tensors_in(output)]
        self.seen.returned = readings[0] if len(readings) == 1 else None

    def note_kept(self) -> None:
        """Note values that outlive the forward pass: the model, or a hook, keeps them for a use."""
        for storage, cell in self.cells.items():
            if not storage.expired():
                cell.value.used_by("something that keeps it after the forward pass", after=cell.after)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self.inside:
            for tensor in {id(leaf): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}.values():
                if _has_storage(tensor):
                    self._use(tensor, func, args, kwargs, out)
        return out

    def _use(self, tensor: Tensor, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        storage = storage_of(tensor)
        for name, extent in self.weights.get(storage, ()):
            if overlap(extent, extent_of(tensor)):
                self.used_outside.setdefault(name, str(func))
        cell = self.cells.get(storage)
        if cell is None:
            return
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and _has_storage(leaf)]
        written = any(tensor is leaf for leaf in _written(func, args, kwargs))
        whole = cell.is_whole(tensor)
        if whole and args and tensor is args[0] and _is_relu(func, args, kwargs):
            cell.value.relu = True
            self._put(out, cell.value, after=True)  # in place this is the same storage, which held the pre-activation
        elif whole and func in _COPIES and out.numel() == tensor.numel() and out.dtype == tensor.dtype:
            self._put(out, cell.value, after=cell.after)
        elif not written and results and all(storage_of(leaf) == storage and cell.is_whole(leaf) for leaf in results):
            pass  # a view of the whole value: the storage says so itself
        else:
            cell.value.used_by(func, after=cell.after)
            if written:
                del self.cells[storage]


def _input_of(name: str) -> str:
    return f"layer {name!r}"


def _is_relu(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    if func in _RELU:
        return True
    if func in _CLAMP:
        low = args[1] if len(args) > 1 else kwargs.get("min")
        high = args[2] if len(args) > 2 else kwargs.get("max")
        return low is not None and low == 0 and high is None
    return func in _THRESHOLD and tuple(args[1:]) == (0, 0)


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that the operation changes in place."""
    schema = getattr(func, "_schema", None)  # higher-order operators have none: they are taken to write nothing
    if schema is None or not schema.is_mutable:
        return []
    given = [
        args[place] if place < len(args) else kwargs.get(argument.name)
        for place, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return tree_leaves(given)


def _has_storage(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_nested


def storage_of(tensor: Tensor) -> StorageWeakRef:
    """A key for the memory that the tensor lives in; it keeps the key's meaning, not the memory, alive."""
    return StorageWeakRef(tensor.untyped_storage())


def extent_of(tensor: Tensor) -> tuple[int, int]:
    """First byte of the storage that the tensor uses, and the one behind its last."""
    if not tensor.numel():
        return 0, 0
    last = sum((size - 1) * int(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset())
    return start * tensor.element_size(), (start + last + 1) * tensor.element_size()


def overlap(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether two ranges of bytes share any."""
    return max(a[0], b[0]) < min(a[1], b[1])


def _is_dense(tensor: Tensor) -> bool:
    """Whether the tensor's elements lie without gap or overlap, in any order of the dimensions."""
    expected = 1
    for stride, size in sorted((st, si) for si, st in zip(tensor.shape, tensor.stride(), strict=True) if si != 1):
        if stride != expected:
            return False
        expected *= size
    return True
