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
    """

    def __init__(self, modules: dict[str, nn.Module], *, stop: bool = False) -> None:
        """``stop`` ends the pass once the sums of all were seen."""
        super().__init__(modules)
        self.beside: dict[str, Tensor] = {}
        self._stop = stop

    def note_sum(self, layer: str, value: Tensor, other: Tensor, out: Tensor) -> None:
        # what was written into is the sum now
        self.beside[layer] = out - value if storage_of(out) == storage_of(other) else other.clone()
        if self._stop and len(self.beside) == len(self.modules):
            raise Stop
