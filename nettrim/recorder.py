"""One forward pass, recorded: which layers ran, and what became of the output of each.

Module hooks say where a supported layer begins and ends; between layers a dispatch mode sees every tensor operation.
The result of a layer is a *value*: its pre-activation, and what a BatchNorm and an activation make of it. A value is
followed by the storage that holds it, so that views, reshapes and in-place operations need no special care: a tensor
*is* the value if it covers all of it once, in any order of the elements; any other use counts as another use. Maxima of
it (pooling) count as the value for an activation that never falls: the two could as well have changed places.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nettrim import layers
from nettrim.activations import RELU, find, find_norm
from nettrim.decisions import Decisions
from nettrim.passes import tensors_in
from nettrim.values import Cell, Stage, Step, Value, common_way, step_name

_ATEN = torch.ops.aten
_COPIES = {_ATEN.clone.default, _ATEN._to_copy.default}
_SUMS = {_ATEN.add.Tensor, _ATEN.add_.Tensor}
_MAXIMA = {
    _ATEN.max_pool2d_with_indices.default,
    _ATEN.max_pool3d_with_indices.default,
    _ATEN.adaptive_max_pool2d.default,
    _ATEN.adaptive_max_pool3d.default,
}

ALIGNMENT = 64  # bytes, of the memory that torch takes

Reading = tuple[str, Stage] | None  # the layer whose value was read, and at which stage


@dataclass
class PassRecord:
    """What one forward pass has shown.

    Attributes
    ----------
    calls : names of the layers in execution order, one entry a call
    values : the outputs, in the same order
    reads : of what each layer's input exactly is the value, if of any
    returned : of what the model's output exactly is the value, if it is one tensor
    refused : calls that a layer cannot be read from, with the reason
    spread : by what factor rows can differ more than inputs do, of layers whose output is followed
    rows : how many rows there are
    contiguous : whether what a layer was given lies in memory without gaps, and begins where a tensor of its own would
    cast : what layers put out that is of another dtype than their weights, as under autocast
    """

    calls: list[str] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    reads: dict[str, Reading] = field(default_factory=dict)
    returned: Reading = None
    refused: dict[str, str] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    contiguous: dict[str, bool] = field(default_factory=dict)
    cast: dict[str, torch.dtype] = field(default_factory=dict)

    def way(self, name: str) -> tuple[Step, ...]:
        """The steps that everything the layer put out took, and nothing else happened to it before."""
        return common_way([value.way() for value in self.values if value.layer == name])

    def sums(self, name: str) -> bool:
        """Whether the layer ran once, and the one use of what it put out, at the end of its way, is a sum with another tensor before another layer
        ran.
        """
        values = [value for value in self.values if value.layer == name]
        end = tuple(step_name(step) for step in self.way(name))
        return len(values) == 1 and len(values[0].uses) == 1 and values[0].summed == [end]

    def differs(self, other: PassRecord) -> str | None:
        """A layer of which another pass has shown something else, but for how many rows it has; None where there is none."""
        if self.calls != other.calls:
            both = zip_longest(self.calls, other.calls)
            return next(ours if ours is not None else theirs for ours, theirs in both if ours != theirs)
        for name in dict.fromkeys(self.calls):
            ways = [self.way(name), other.way(name)]
            if self._facts(name) != other._facts(name) or len({len(common_way(ways)), *map(len, ways)}) > 1:
                return name
        return None

    def _facts(self, name: str) -> tuple[object, ...]:
        return self.reads.get(name), self.refused.get(name), self.spread.get(name), self.sums(name), self.sole_reader(name)

    def sole_reader(self, name: str) -> str | None:
        """The layer whose input is the one use of what the layer put out; None where there are other uses, or none."""
        uses = [use for value in self.values if value.layer == name for use in value.uses]
        return next((other for other in self.calls if uses == [_input_of(other)]), None)


class Recorder(TorchDispatchMode):
    """Follows the layers' values through one forward pass, and notes weights that are used outside their layer.

    Use as ``with recorder.hooks(), recorder: output = ...``, then `finish(output)`, drop the output, `note_kept()`.
    """

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch's wrapper that this asks for would import the whole compiler, seconds on a first call, though nothing is compiled here."""
        return False

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        self.modules = modules
        self._kinds = {name: layers.find_kind(module) for name, module in modules.items()}
        self.seen = PassRecord()
        self.cells: dict[StorageWeakRef, Cell] = {}  # weak: the activations are freed as without the trace
        self.inside = False  # a layer's forward: what it does with its own input and weights is no other use
        self._aside = False
        self.used_outside: dict[str, str] = {}
        self._decisions, self._decided_before = Decisions(), False  # what decided before the first layer was done is kept apart
        self.weights: dict[StorageWeakRef, list[tuple[str, tuple[int, int]]]] = {}
        for name, module in modules.items():
            for parameter in module.parameters():
                self.weights.setdefault(storage_of(parameter), []).append((name, extent_of(parameter)))

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Note where each layer begins and ends, as long as the context lasts."""
        with ExitStack() as stack:
            for name, module in self.modules.items():
                before, after = self._hooks_of(name)
                # last before and first behind the layer's own forward, so that other hooks count as other operations
                stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(after, prepend=True, with_kwargs=True, always_call=True).remove)
            stack.enter_context(self._decisions)
            yield

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is done meanwhile is not the network's."""
        self._aside = True
        try:
            yield
        finally:
            self._aside = False

    @property
    def decides(self) -> bool:
        """Whether values may have decided what ran."""
        return self._decided_before or self._decisions.found

    @property
    def layers_decide(self) -> bool:
        """Whether values that the layers computed may have."""
        return self._decisions.found and bool(self.seen.calls)

    def _hooks_of(self, name: str) -> tuple[Any, Any]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            readings = [self._read(x, _input_of(name)) for x in tensors]
            self.seen.reads[name] = readings[0] if readings else None
            self.seen.contiguous[name] = all(has_storage(x) and x.is_contiguous() and is_aligned(x) for x in tensors)
            kind = self._kinds[name]
            reason = None if kind is None else kind.refuses_call(module, args, kwargs)
            if reason is not None:
                self.seen.refused.setdefault(name, reason)
            self.inside = True

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            if out is None:  # the forward raised
                self.inside = False
                return
            if not self.seen.calls:
                self._decided_before, self._decisions.found = self._decisions.found, False
            value = Value(name, (tuple(out.shape), out.stride()) if isinstance(out, Tensor) and has_storage(out) else None)
            self.seen.calls.append(name)
            self.seen.values.append(value)
            kind = self._kinds[name]
            if isinstance(out, Tensor) and any(parameter.dtype != out.dtype for parameter in module.parameters()):
                self.seen.cast[name] = out.dtype
            if isinstance(out, Tensor) and kind is not None and kind.observed:
                part, call = kind.parts(module)[0], layers.Call(args, kwargs, out)
                self.seen.spread[name] = max(kind.spread(module, part, call), self.seen.spread.get(name, 1.0))
                self.seen.rows[name] = self.seen.rows.get(name, 0) + len(kind.outputs(module, part, call))
                # without a batch, a convolution's outputs come first
                place = kind.channel if kind.channel < 0 or out.dim() > 1 + len(getattr(module, "kernel_size", ())) else 0
                self._put(out, value, (), (out.shape[place], out.stride(place)) if out.dim() else None, ordered=True)
            self.inside = False

        return before, after

    def _read(self, tensor: Tensor, reader: str) -> Reading:
        cell = self.cells.get(storage_of(tensor)) if has_storage(tensor) else None
        if cell is None:
            return None
        cell.value.used_by(reader, cell.stage)
        return (cell.value.layer, cell.stage) if cell.is_whole(tensor) and not cell.pooled else None

    def _put(
        self, tensor: Tensor, value: Value, stage: Stage, channel: tuple[int, int] | None, *, pooled: bool = False, ordered: bool = False
    ) -> None:
        if has_storage(tensor):
            place = int(tensor.storage_offset()), tensor.numel(), tensor.dtype
            self.cells[storage_of(tensor)] = Cell(value, stage, *place, channel, pooled, ordered)

    def finish(self, output: Any) -> None:
        """Note what the model returns; its values are then used outside the network."""
        readings = [self._read(tensor, "the model's output") for tensor in tensors_in(output)]
        self.seen.returned = readings[0] if len(readings) == 1 else None

    def note_kept(self) -> None:
        """Note values that outlive the forward pass: the model, or a hook, keeps them for a use."""
        for storage, cell in self.cells.items():
            if not storage.expired():
                cell.value.used_by("something that keeps it after the forward pass", cell.stage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._aside:
            return func(*args, **kwargs)
        try:
            out = func(*args, **kwargs)
        except Exception:
            self._decisions.found = True
            raise
        self._decisions.note(func, out)
        if not self.inside:
            for tensor in {id(leaf): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}.values():
                if has_storage(tensor):
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
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and has_storage(leaf)]
        written = any(tensor is leaf for leaf in written_by(func, args, kwargs))
        whole = cell.is_whole(tensor)
        step = self._step(cell, tensor, func, args, kwargs) if whole and args and tensor is args[0] else None
        if step is not None:
            cell.value.steps.setdefault(cell.stage, []).append(step)
            # in place this is the same storage, which held the value before the step
            ordered = cell.ordered and tensor.stride() == results[0].stride()
            channel = _channel_of(cell, tensor, results[0])
            self._put(results[0], cell.value, (*cell.stage, step_name(step)), channel, pooled=cell.pooled, ordered=ordered)
        elif whole and cell.active and args and tensor is args[0] and cell.stage[-1] == "relu" and find(func, args, kwargs) == RELU:
            self._put(results[0], cell.value, cell.stage, cell.channel, pooled=cell.pooled)  # once more changes nothing
        elif whole and func in _COPIES and out.numel() == tensor.numel() and out.dtype == tensor.dtype:
            ordered = cell.ordered and tensor.stride() == out.stride()
            self._put(out, cell.value, cell.stage, _channel_of(cell, tensor, out), pooled=cell.pooled, ordered=ordered)
        elif whole and func in _MAXIMA and not cell.active and not written:
            self._put(results[0], cell.value, cell.stage, None, pooled=True)
        elif not written and results and all(storage_of(leaf) == storage and cell.is_whole(leaf) for leaf in results):
            pass  # a view of the whole value: the storage says so itself
        else:
            # what a layer behind it has put out changes when that layer is pruned
            last = bool(self.seen.calls) and self.seen.calls[-1] == cell.value.layer
            if whole and last and func in _SUMS and not cell.active and not cell.pooled and cell.laid_out_as(tensor):
                other = _added(tensor, args, kwargs)
                if other is not None:
                    cell.value.summed.append(cell.stage)
                    self.note_sum(cell.value.layer, tensor, other, out)
            cell.value.used_by(func, cell.stage)
            if written:
                del self.cells[storage]

    def note_sum(self, layer: str, value: Tensor, other: Tensor, out: Tensor) -> None:
        """Called for every sum ``out`` of a layer's ``value`` and another tensor; either may have been written into."""

    def _step(self, cell: Cell, tensor: Tensor, func: Any, args: Any, kwargs: Any) -> Step | None:
        """The step that the operation is, if the value can take it at its stage."""
        if cell.active:
            return None
        activation = find(func, args, kwargs)
        if activation is not None:
            return activation if activation.monotone or not cell.pooled else None
        norm = None if cell.stage or cell.pooled else find_norm(func, args)
        return norm if norm is not None and cell.dimension(tensor) == 1 else None


def _channel_of(cell: Cell, before: Tensor, after: Tensor) -> tuple[int, int] | None:
    """The dimension that counts outputs, in what an operation on all entries alike has made of a tensor."""
    place = cell.dimension(before)
    return None if place is None or after.dim() != before.dim() else (after.shape[place], after.stride(place))


def _input_of(name: str) -> str:
    return f"layer {name!r}"


def _added(value: Tensor, args: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """What is added to the value, entry by entry; None where it is no other tensor of its shape."""
    others = [arg for arg in args[:2] if arg is not value]
    fits = len(others) == 1 and isinstance(others[0], Tensor) and others[0].shape == value.shape and kwargs.get("alpha", 1) == 1
    return others[0] if fits else None


def written_by(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Any]:
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


def is_aligned(tensor: Tensor) -> bool:
    """Whether products of a copy are rounded alike: the kernels go by where a tensor begins in memory."""
    return tensor.data_ptr() % ALIGNMENT == 0


def has_storage(tensor: Tensor) -> bool:
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
