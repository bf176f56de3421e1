"""Spectral Dropout (Khan, Hayat, Porikli: Regularization of deep neural networks with spectral dropout, arXiv 1711.08591).

In training, a layer's activations x become ``Dᵀ (m ∘ D x)``, D the orthonormal DCT-II: coefficients whose size is below a threshold are weak, and are
off with probability p; the others always pass. The threshold is the quantile of a sample's own coefficients that makes so many weak. In evaluation
the layer is the identity. The smallest weights go afterwards.
"""

import math

import torch
from torch import Tensor, nn

from benchmarks.neighbours.contract import Method, Outcome, Task
from benchmarks.neighbours.selection import prune_weights
from nettrim import criteria

WEAK = 0.4  # share of the coefficients
OFF = 0.5  # probability that a weak one is off


def dct_matrix(n: int) -> Tensor:
    """D (n, n): row k is ``√(2/n) cos(π k (2j + 1) / 2n)``, the first divided by √2; ``D Dᵀ = I``."""
    k, j = torch.meshgrid(torch.arange(n, dtype=torch.float64), torch.arange(n, dtype=torch.float64), indexing="ij")
    D = math.sqrt(2 / n) * torch.cos(math.pi * k * (2 * j + 1) / (2 * n))
    D[0] /= math.sqrt(2)
    return D.float()


def weak(coefficients: Tensor, share: float) -> Tensor:
    """Which coefficients of each sample are weak: the ``share`` of least size, bool, of the same shape (samples, n)."""
    count = round(share * coefficients.shape[1])
    mask = torch.zeros_like(coefficients, dtype=torch.bool)
    return mask.scatter(1, coefficients.abs().topk(count, dim=1, largest=False).indices, True)


class SpectralDropout(nn.Module):
    """The layer.

    Parameters
    ----------
    n : int
        Width.
    share, off : float
        Of the coefficients that are weak; probability that a weak one is off.
    """

    def __init__(self, n: int, share: float = WEAK, off: float = OFF) -> None:
        super().__init__()
        self.register_buffer("D", dct_matrix(n))
        self.share, self.off = share, off

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        coefficients = x @ self.D.T
        gone = weak(coefficients.detach(), self.share) & (torch.rand_like(coefficients) < self.off)
        return coefficients.masked_fill(gone, 0) @ self.D


def run(task: Task) -> Outcome:
    """Train with the layer behind each ReLU, prune the smallest weights, retrain without it."""
    model = task.build()
    modules: list[nn.Module] = []
    width = 0
    for module in model:
        modules.append(module)
        width = module.out_features if isinstance(module, nn.Linear) else width
        if isinstance(module, nn.ReLU):
            modules.append(SpectralDropout(width))
    task.fit(nn.Sequential(*modules), task.training)
    return prune_weights(task, model.eval(), criteria.magnitude)


METHODS = (Method("spectral dropout", run, "stochastic"),)
