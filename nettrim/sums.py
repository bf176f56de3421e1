"""What a layer's output is added to, as in a residual connection: of a sum, the other part says what the layer could make up for."""

from __future__ import annotations

from torch import Tensor, nn

from nettrim.passes import Stop
from nettrim.recorder import Recorder, storage_of


class Sums(Recorder):
    """Keeps, in one forward pass, copies of what the outputs of some layers are added to.

    Attributes
    ----------
    beside : dict of str to Tensor
        Of each layer whose sum has been seen, in the shape of its output there.
    sums : dict of str to (Tensor, int)
        The sums themselves, and their versions when they were made: one that is written into later is another one.
    """

    def __init__(self, modules: dict[str, nn.Module], *, stop: bool = False) -> None:
        """``stop`` ends the pass once the sums of all were seen."""
        super().__init__(modules)
        self.beside: dict[str, Tensor] = {}
        self.sums: dict[str, tuple[Tensor, int]] = {}
        self._stop = stop

    def note_sum(self, layer: str, value: Tensor, other: Tensor, out: Tensor) -> None:
        # what was written into is the sum now
        self.beside[layer] = out - value if storage_of(out) == storage_of(other) else other.clone()
        if not out.is_inference():  # which has no version
            self.sums[layer] = out, out._version
        if self._stop and len(self.beside) == len(self.modules):
            raise Stop

    def is_sum(self, layer: str, tensor: Tensor) -> bool:
        """Whether a tensor is the layer's sum, as it was made."""
        out, version = self.sums.get(layer, (None, 0))
        if out is None or out._version != version:
            return False
        return out is tensor or _place(out) == _place(tensor)


def _place(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
