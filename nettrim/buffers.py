"""The buffers of a model as they were, put back behind forward passes that fill, change or replace them (counters, caches, masks)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


class Buffers:
    """The buffers of some modules at the time that this is made, those among them that are None.

    Parameters
    ----------
    modules : iterable of nn.Module
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules: list[tuple[nn.Module, dict[str, Tensor | None], dict[str, Any]]] = []
        self._values: dict[int, tuple[Tensor, Tensor]] = {}
        for module in modules:
            if isinstance(module, torch.jit.ScriptModule):  # its buffers lie elsewhere, and none of them is replaced by Python
                found: dict[str, Tensor | None] = dict(module.named_buffers(recurse=False))
            else:
                found = dict(module._buffers)
                self._modules.append((module, found, dict(vars(module))))
            for buffer in found.values():
                if buffer is not None and not is_lazy(buffer) and id(buffer) not in self._values:
                    self._values[id(buffer)] = buffer, buffer.detach().clone()

    def put_back(self) -> None:
        """Every module holds the same buffers again, with the same numbers in them.

        A buffer that cannot be written into (one that is expanded, or was resized) is replaced by a copy. Where a forward pass had replaced buffers,
        the module's plain attributes are put back too: what says how long a cache is goes with the cache.
        """
        copies: dict[int, Tensor] = {}
        with torch.no_grad():
            for key, (buffer, value) in self._values.items():
                if not (_write(buffer, value) and detach(buffer)):
                    copies[key] = value
        for module, before, attributes in self._modules:
            now = dict(module._buffers)
            if now.keys() != before.keys() or any(now[name] is not buffer for name, buffer in before.items()):
                vars(module).update(attributes)
                for name in vars(module).keys() - attributes.keys():
                    del vars(module)[name]
                module._buffers.clear()
                module._buffers.update(before)
            for name, kept in before.items():
                if id(kept) in copies:
                    module._buffers[name] = copies[id(kept)]


def detach(buffer: Tensor) -> bool:
    """Take the graph off a buffer that a pass with gradients has written into; False where that cannot be done."""
    if buffer.grad_fn is not None:
        try:
            buffer.detach_()
        except RuntimeError:  # a view
            return False
    return True


def _write(buffer: Tensor, value: Tensor) -> bool:
    """Write the value into the buffer, where it does not hold it; False where that cannot be done."""
    if (buffer.shape, buffer.dtype, buffer.device) != (value.shape, value.dtype, value.device):
        return False
    strided = buffer.layout == torch.strided
    if buffer.is_meta or (strided and torch.equal(buffer, value)):
        return True
    if strided and any(size > 1 and stride == 0 for size, stride in zip(buffer.shape, buffer.stride(), strict=True)):
        return False  # several of its elements are one number in memory
    buffer.copy_(value)
    return True
