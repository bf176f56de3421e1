"""FuseInit (Ghods, Lan, Goldstein, Studer: MSE-optimal neural network initialization via layer fusion, arXiv 2001.10509).

Two dense layers with a ReLU between them become one, ``W₂ relu(W₁ x + b₁) + b₂ ≈ V x + c``, with the least mean squared error over the inputs:
``V = W₂ C_hx C_xx⁻¹``, ``c = W₂ E h + b₂ − V E x``, C the covariances of the inputs x and of the hidden outputs h. The paper derives them for
Gaussian x; here they are measured. Applied after magnitude pruning, where the layer is nearest to linear: least ``E‖h − ĥ(x)‖² / E‖h − E h‖²``, ĥ the
best affine map. Then the smaller network is retrained.
"""

import torch
from torch import Tensor, nn

from benchmarks.neighbours.contract import Method, Outcome, Task, outcome, zeros
from benchmarks.neighbours.models import hidden_units
from benchmarks.neighbours.selection import prune_weights
from nettrim import criteria

RIDGE = 1e-4  # of the mean variance: pixels that are always 0 leave the covariance singular
LIMIT = 0.5  # nonlinearity above which nothing is fused


@torch.no_grad()
def affine_fit(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, float]:
    """``B, d`` of the least ``E‖h − B x − d‖²``, and that error over the variance of h.

    Parameters
    ----------
    x : Tensor, shape (samples, N)
    h : Tensor, shape (samples, M)

    Returns
    -------
    tuple of (Tensor (M, N), Tensor (M,), float)
    """
    x, h = x.double(), h.double()
    x_mean, h_mean = x.mean(dim=0), h.mean(dim=0)
    xc, hc = x - x_mean, h - h_mean
    covariance = xc.T @ xc
    covariance += RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=x.dtype)
    B = torch.linalg.solve(covariance, xc.T @ hc).T
    error = float((hc - xc @ B.T).square().sum() / hc.square().sum().clamp_min(1e-30))
    return B, h_mean - B @ x_mean, error


@torch.no_grad()
def fused(model: nn.Sequential, layer: str, inputs: Tensor) -> tuple[nn.Sequential, float]:
    """The chain with a hidden layer and its reader replaced by one, and the layer's nonlinearity.

    Parameters
    ----------
    model : nn.Sequential
        Linear layers with ReLUs between them.
    layer : str
        The hidden layer's name.
    inputs : Tensor
        What the network is given.
    """
    modules = list(model)
    place = [name for name, _ in model.named_children()].index(layer)
    x = nn.Sequential(*modules[:place])(inputs)
    h = nn.Sequential(*modules[place : place + 2])(x)
    B, d, nonlinearity = affine_fit(x, h)
    reader = modules[place + 2]
    one = nn.Linear(x.shape[1], reader.out_features)
    W = reader.weight.double()
    one.weight.copy_(W @ B)
    one.bias.copy_(W @ d + reader.bias.double())
    return nn.Sequential(*modules[:place], one, *modules[place + 3 :]), nonlinearity


def run(task: Task) -> Outcome:
    """Train, prune the smallest weights, fuse the hidden layer that is nearest to linear if it is near enough, retrain."""
    model = prune_weights(task, task.trained(), criteria.magnitude, retrain=False).model
    sample = task.inputs[:5000]
    assert isinstance(model, nn.Sequential)
    tried = {layer: fused(model, layer, sample) for layer, _ in hidden_units(model)}
    nearest = min(tried, key=lambda layer: tried[layer][1])
    notes = {"nonlinearity": {layer: one[1] for layer, one in tried.items()}, "fused": tried[nearest][1] <= LIMIT}
    if notes["fused"]:
        model = tried[nearest][0]
    before = task.held_accuracy(model)
    task.fit(model, task.retraining, masks=zeros(model), learning_rate=5e-4)
    return outcome(model, held_before_retraining=before, **notes)


METHODS = (Method("magnitude + FuseInit", run, "depth", auto=True),)
