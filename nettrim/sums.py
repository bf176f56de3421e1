"""What a layer's output is added to, as in a residual connection: of a sum, the other part says what the layer could make up for."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from nettrim.passes import Stop
from nettrim.recorder import Recorder, has_storage, storage_of, written_by


class Sums(Recorder):
    """Keeps, in one forward pass, copies of what the outputs of some layers are added to.

    Attributes
    ----------
    beside : dict of str to Tensor
        Of each layer whose sum has been seen, in the shape of its output there.
    """

    def __init__(self, modules: dict[str, nn.Module], *, wanted: Collection[str] | None = None, stop: bool = False) -> None:
        """``wanted`` are the layers whose sums are; all by default. ``stop`` ends the pass once all those were seen."""
        super().__init__(modules)
        self._wanted = set(modules if wanted is None else wanted)
        self.beside: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}  # until they are written into
        self._stop = stop

    def note_sum(self, layer: str, value: Tensor, other: Tensor, out: Tensor) -> None:
        if layer not in self._wanted:
            return
        # what was written into is the sum now
        self.beside[layer] = out - value if storage_of(out) == storage_of(other) else other.clone()
        if value.dtype == other.dtype == out.dtype and self.seen.contiguous[layer]:
            self._sums[layer] = out
        if self._stop and len(self.beside) == len(self._wanted):
            raise Stop

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._aside:
            return func(*args, **(kwargs or {}))
        before = dict(self._sums)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if before:
            changed = {storage_of(tensor) for tensor in written_by(func, args, kwargs or {}) if isinstance(tensor, Tensor) and has_storage(tensor)}
            self._sums = {name: out for name, out in self._sums.items() if name not in before or storage_of(out) not in changed}
        return result

    def is_sum(self, layer: str, tensor: Tensor) -> bool:
        """Whether, whatever the values, a tensor is the sum of what the layer makes of rows without gaps and of something else of the same dtype."""
        out = self._sums.get(layer)
        return out is not None and not self.decides and _place(out) == _place(tensor)


def _place(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
