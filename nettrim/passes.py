"""Forward passes that leave the model as it was: how one is run, ended early, and what it returned."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nettrim.buffers import Buffers
from nettrim.sharing import turn


class Stop(BaseException):
    """Ends a forward pass once enough has run; no `Exception`, so that a model's own handlers let it through."""


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Run the model in evaluation mode, without gradients, and leave it as it was.

    Every submodule's own training flag is put back on exit, also after an exception, and so are buffers that the forward pass changes
    (counters, caches). The flags are set directly:
    `model.eval()` may be overridden and change more than flags. The fused kernels of nn.TransformerEncoder and
    nn.MultiheadAttention are off meanwhile: they bypass the forward of the layers that they hold. Threads that do so take
    turns; hooks are put on the model inside, where no other thread runs it.
    """
    with turn(), _evaluation(model):
        yield


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    buffers = Buffers(module for module, _ in flags)
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for module, _ in flags:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        try:
            buffers.put_back()
        finally:
            for module, training in flags:
                module.training = training


class StandIn:
    """A forward that a module has for a while. Who asks `own_attribute` sees past it: other threads may read the module meanwhile, but not run it."""

    def __init__(self, forward: Callable[..., Any], instead_of: Callable[..., Any], own: Callable[..., Any] | None) -> None:
        """``own`` is the forward that the module had of its own, in place of its type's."""
        self._forward, self.own = forward, own
        with contextlib.suppress(TypeError, ValueError):  # of a scripted forward
            self.__signature__ = inspect.signature(instead_of)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)


def own_attribute(module: nn.Module, name: str) -> Any:
    """What the module itself, not its type, has under a name, whatever stands in for it; None where it has nothing."""
    found = vars(module).get(name)
    return found.own if isinstance(found, StandIn) else found


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module compute something else; its hooks run as before. Inside `evaluation`, where no other thread runs it."""
    own = vars(module).get("forward")
    module.forward = StandIn(forward, module.forward, own_attribute(module, "forward"))
    try:
        yield
    finally:
        vars(module).pop("forward", None)
        if own is not None:
            module.forward = own


def tensors_in(output: Any) -> list[Tensor]:
    """All tensors of a model's output: in containers, in mappings and in the attributes of other objects."""
    found: list[Tensor] = []
    visited: set[int] = set()
    # the queue keeps every object alive meanwhile, so that no id is used twice
    queue = [output]
    for item in queue:
        for leaf in tree_leaves(item):
            if isinstance(leaf, Tensor):
                found.append(leaf)
            elif id(leaf) not in visited and not isinstance(leaf, nn.Module | ModuleType | type):
                visited.add(id(leaf))
                if isinstance(leaf, Mapping):
                    queue.append(list(leaf.values()))
                elif isinstance(leaf, set | frozenset):
                    queue.append(list(leaf))
                elif hasattr(leaf, "__dict__"):
                    queue.append(list(vars(leaf).values()))
    return found
