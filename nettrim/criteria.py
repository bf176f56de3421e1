"""Scores of trained weights and units, the least of which others prune first (docs/neighbours.md says how they do): a line or three each."""

from __future__ import annotations

from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """``|w|`` of every weight (Han, Pool, Tran, Dally, NIPS 2015, section 3).

    Parameters
    ----------
    weight : Tensor

    Returns
    -------
    Tensor
        Of the same shape.
    """
    return weight.detach().abs()


def unit_norms(weight: Tensor, *, order: float = 1) -> Tensor:
    """``‖W_i·‖`` of every unit: for the filters of a convolution, order 1, the criterion of Li et al. (arXiv 1608.08710, section 3.1).

    Parameters
    ----------
    weight : Tensor, shape (units, ...)
    order : float
        Of the norm.

    Returns
    -------
    Tensor, shape (units,)
    """
    return weight.detach().flatten(1).norm(p=order, dim=1)


def taylor(activations: Tensor, gradients: Tensor) -> Tensor:
    """How much the loss would change, to first order, without a unit: ``mean |mean_positions a · ∂L/∂a|``, scaled to norm 1 over the layer.

    Molchanov, Tyree, Karras, Aila, Kautz (arXiv 1611.06440, eqs. 8 and 9).

    Parameters
    ----------
    activations, gradients : Tensor, each of shape (samples, units, ...)
        A layer's outputs and the gradient of the loss in them.

    Returns
    -------
    Tensor, shape (units,)
    """
    each = (activations.detach() * gradients.detach()).flatten(2) if activations.dim() > 2 else (activations * gradients).detach()[..., None]
    scores = each.mean(dim=2).abs().mean(dim=0)
    return scores / scores.norm().clamp_min(1e-30)
