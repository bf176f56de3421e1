"""What follows a layer, in numpy: a BatchNorm's scale and shift, an activation, and the misfit that a program before them is held to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from nettrim.activations import Activation
from nettrim.tracing import TracedLayer

Array = np.ndarray


@dataclass(frozen=True, eq=False)
class Behind:
    """``act(s z + t)``, neuron by neuron; a layer's program is about ``u = s z``.

    Attributes
    ----------
    scale, shift : Array or None, (M,)
        ``s`` and ``t`` of a BatchNorm; None without one.
    function : Activation or None
    """

    scale: Array | None = None
    shift: Array | None = None
    function: Activation | None = None

    @classmethod
    def of(cls, layer: TracedLayer) -> Behind:
        """What a traced layer's output goes through."""
        if layer.norm is None:
            return cls(function=layer.function)
        return cls(layer.norm.scale.cpu().double().numpy(), layer.norm.shift.cpu().double().numpy(), layer.function)

    @property
    def relu(self) -> bool:
        """Whether the program has a ReLU, perhaps between other ends."""
        return self.function is not None and self.function.interval is not None

    @property
    def lipschitz(self) -> float:
        return 1.0 if self.function is None else self.function.lipschitz

    @property
    def capped(self) -> bool:
        """Whether there is an upper end; then the papers' set is not asked for."""
        return self._ends()[1] is not None

    @property
    def moved(self) -> bool:
        """Whether the lower end of the ReLU is another than 0."""
        return self.relu and bool(np.any(self._ends()[0] != 0))

    def _ends(self) -> tuple[Array, Array | None]:
        """Of ``u``, each (M,) or a scalar array."""
        ends = None if self.function is None else self.function.interval
        low, high = ends if ends is not None else (0.0, None)
        shift = np.zeros(()) if self.shift is None else self.shift
        return low - shift, None if high is None else high - shift

    def folded(self, W: Array) -> Array:
        """Rows of weights (M, N), or of ``Z`` transposed, times ``s``."""
        return W if self.scale is None else W * self.scale[:, None]

    def scaled(self, Z: Array) -> Array:
        """``u`` of pre-activations (p, M)."""
        return Z if self.scale is None else Z * self.scale

    def output(self, U: Array) -> Array:
        """``act(u + t)``, (p, M)."""
        U = U if self.shift is None else U + self.shift
        if self.function is None:
            return U
        return np.maximum(U, 0.0) if self.function.name == "relu" else self.function(torch.from_numpy(U)).numpy()

    def targets(self, U: Array) -> Array:
        """What the program aims at where the dense layer's are ``U`` (p, M)."""
        if not self.relu:
            return U
        low, high = self._ends()
        return np.maximum(U, low) if high is None else np.minimum(np.maximum(U, low), high)

    def misfit(self, U: Array, T: Array) -> tuple[float, float]:
        """The squared misfit of ``U`` to targets ``T`` on Ω and off it, Ω being everything without a ReLU."""
        if not self.relu:
            return float(np.square(U - T).sum()), 0.0
        low, high = self._ends()
        on = np.broadcast_to(low, T.shape) < T
        D = U - T
        if high is not None:
            D = np.where(np.broadcast_to(high, T.shape) <= T, np.minimum(D, 0.0), D)
        return float(np.square(D[on]).sum()), float(np.square(np.maximum(D[~on], 0.0)).sum())
