"""The layer programs that the solvers are measured on: a trained layer, random layers of any size, streamed ones."""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.data import Dataset
from benchmarks.mnist import calibration_samples, linear_layers
from benchmarks.networks import load_or_train
from benchmarks.solver_session import Sizes
from nettrim import LayerProgram

FACTORS = 32  # common factors behind correlated inputs

# what follows the layer, which set, budget or penalty
KINDS: dict[str, tuple[str | None, str, bool]] = {
    "relaxed-budget": ("relu", "relaxed", True),
    "paper-budget": ("relu", "paper", True),
    "linear-budget": (None, "relaxed", True),
    "relaxed-penalised": ("relu", "relaxed", False),
    "paper-penalised": ("relu", "paper", False),
    "linear-penalised": (None, "relaxed", False),
}


def make_program(kind: str, A: Tensor, Z: Tensor, share: float) -> LayerProgram:
    """The program of a kind for inputs ``A`` (P, N) and dense pre-activations ``Z`` (P, M).

    ``share`` is ε over ``‖Y‖_F``, or λ over the smallest λ at which 0 is optimal.
    """
    activation, consistency, budget = KINDS[kind]
    Y = Z if activation is None else Z.clamp(min=0)
    if budget:
        return LayerProgram(A, Y, epsilon=share * float(Y.norm()), activation=activation, consistency=consistency)
    # at W = 0 the misfit's gradient is −YᵀA
    largest = float((Y.T @ A).abs().max())
    return LayerProgram(A, Y, regularization=share * largest, activation=activation, consistency=consistency)


def first_layer(data: Dataset, sizes: Sizes, samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs with a column of ones (P, N), and outputs after the ReLU (P, M), of a trained network's first layer; float32.

    The network is trained with seed 0 whatever the seed of the samples, and cached.
    """
    model = load_or_train(data, sizes.network, sizes.recipe).model
    layer = next(iter(linear_layers(model).values()))
    A = calibration_samples(data, samples, seed)
    with torch.no_grad():
        Y = layer(A).relu()
    return torch.cat([A, torch.ones(len(A), 1)], 1), Y[:, : sizes.neurons].contiguous()


def correlated_layer(P: int, N: int, M: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Inputs ``A`` (P, N) and pre-activations ``Z`` (P, M) of a random layer.

    As activations do, inputs share factors and are never negative; a fifth of the weights carries most of the output.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    A = (normal(P, FACTORS) @ normal(FACTORS, N) / FACTORS**0.5 + normal(P, N)).clamp(min=0)
    return A, A @ _weights(M, N, generator, dtype).T


def _weights(M: int, N: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    W = torch.randn(M, N, generator=generator, dtype=dtype)
    small = torch.rand(M, N, generator=generator) > 0.2
    return torch.where(small, 0.05 * W, W) / N**0.5


class CorrelatedStream:
    """The rows of a random layer without a ReLU, made chunk by chunk from a seed: nothing of size P is ever held.

    Parameters
    ----------
    P, N, M : int
        Rows, inputs, outputs.
    chunk : int
        Rows in a chunk.
    seed : int
        Decides every chunk; each has a generator of its own.
    """

    def __init__(self, P: int, N: int, M: int, chunk: int, seed: int) -> None:
        self.rows, self._width, self._chunk, self._seed = P, N, chunk, seed
        generator = torch.Generator().manual_seed(seed)
        self._loadings = torch.randn(FACTORS, N, generator=generator) / FACTORS**0.5
        self._dense = _weights(M, N, generator, torch.float32).T.contiguous()
        # inputs and targets are asked for in turn: one chunk is kept, so that it is made once
        self._made = functools.lru_cache(maxsize=1)(self._make)

    def _make(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed((self._seed + 1) * 1_000_003 + index)
        rows = min(self._chunk, self.rows - index * self._chunk)
        A = torch.randn(rows, self._width, generator=generator)
        return A.addmm_(torch.randn(rows, FACTORS, generator=generator), self._loadings)

    def inputs(self) -> Iterator[Tensor]:
        """``A`` (rows, N), float32."""
        for index in range(-(-self.rows // self._chunk)):
            yield self._made(index)

    def targets(self) -> Iterator[Tensor]:
        """``Y = A Wᵀ`` (rows, M), float32."""
        for index in range(-(-self.rows // self._chunk)):
            yield self._made(index) @ self._dense

    def program(self, share: float = 0.1) -> LayerProgram:
        """Budget program without a ReLU, ε a share of ``‖Y‖_F``."""
        norm = sum(float(Y.double().square().sum()) for Y in self.targets()) ** 0.5
        return LayerProgram(self.inputs, self.targets, epsilon=share * norm, activation=None)
