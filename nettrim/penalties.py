"""Penalties and proximal steps for a training loop of your own, that leave a network more prunable: one function each, for any module.

What is penalised is the weights of the ``nn.Linear`` and convolution layers; biases and all else are left alone. A weight is read as outputs ×
inputs × positions, so that a unit's *incoming* group is a row and its *outgoing* group a column of the next layer. Add a penalty, times a factor
of your own, to the loss; call a projection after the optimiser's step::

    loss = cross_entropy(model(x), y) + 1e-4 * nettrim.penalties.incoming_groups(model)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from nettrim.errors import ArgumentError

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that the penalties are of, by the names of their layers, in the order of ``model.named_modules()``.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    dict of str to Tensor
        The parameters themselves, with their gradients; a layer that is shared appears once.

    Raises
    ------
    ArgumentError
        There is none.
    """
    found = {name: module.weight for name, module in model.named_modules() if isinstance(module, _LAYERS)}
    if not found:
        raise ArgumentError(f"{type(model).__name__} has no linear or convolution layer; expected a model with weights to penalise")
    return found


def _total(model: nn.Module, each: Callable[[Tensor], Tensor]) -> Tensor:
    """The sum of a figure of each layer's weight."""
    return torch.stack([each(weight) for weight in weights(model).values()]).sum()


def l1(model: nn.Module) -> Tensor:
    """``Σ |w|``: the weights that matter least go to 0 first.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    Tensor, shape ()
    """
    return _total(model, lambda weight: weight.abs().sum())


def l2(model: nn.Module) -> Tensor:
    """``Σ w²``: weight decay; makes weights small, and none zero.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    Tensor, shape ()
    """
    return _total(model, lambda weight: weight.square().sum())


def incoming_groups(model: nn.Module, *, by_size: bool = False) -> Tensor:
    """``Σ_ℓ Σ_i ‖W_i·‖₂``: whole units (rows, filters) go to 0 together.

    The ``li`` of DropNeuron (Pan, Dong, Guo, arXiv 1606.07326, section 3.1); with ``by_size`` the ``ℓ2,1`` term ``Σ √n_i ‖W_i·‖₂`` of the sparse
    group lasso over output channels (Bui et al., doi 10.3389/fams.2020.529564).

    Parameters
    ----------
    model : nn.Module
    by_size : bool
        Weigh each group by the square root of its number of weights.

    Returns
    -------
    Tensor, shape ()
    """
    return _total(model, lambda weight: weight.flatten(1).norm(dim=1).sum() * (weight[0].numel() ** 0.5 if by_size else 1.0))


def outgoing_groups(model: nn.Module) -> Tensor:
    """``Σ_ℓ Σ_j ‖W_·j‖₂``: what a layer reads from a unit (a column, an input channel) goes to 0 together.

    The ``lo`` of DropNeuron (Pan, Dong, Guo, arXiv 1606.07326, section 3.1).

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    Tensor, shape ()
    """
    return _total(model, lambda weight: weight.transpose(0, 1).flatten(1).norm(dim=1).sum())


def hard_threshold(weight: Tensor, penalty: float, coupling: float) -> Tensor:
    """``argmin_V  penalty · ‖V‖₀ + ½ coupling · ‖V − W‖²``: entries with ``|w| ≤ √(2 penalty / coupling)`` are 0, the others stay.

    The splitting step of the nonconvex sparse group lasso (Bui et al., doi 10.3389/fams.2020.529564, Algorithm 1): add
    ``½ coupling · ‖W − V‖²`` to the loss, and take V anew now and then.

    Parameters
    ----------
    weight : Tensor
        W, of any shape.
    penalty, coupling : float
        Positive.

    Returns
    -------
    Tensor
        V, of the same shape, detached.

    Raises
    ------
    ArgumentError
        A number that is not positive.
    """
    if not (penalty > 0 and coupling > 0):
        raise ArgumentError(f"got penalty={penalty} and coupling={coupling}; expected positive numbers")
    weight = weight.detach()
    return weight * (weight.abs() > (2 * penalty / coupling) ** 0.5)


def joined_channels(model: nn.Module, pairs: Sequence[tuple[str, str]] | None = None) -> Tensor:
    """``Σ_ℓ Σ_i ‖(W^ℓ_i·, W^{ℓ+1}_·i)‖₂``: what makes a unit and what reads it are one group.

    OICSR, out-in-channel sparsity regularization (Li et al., arXiv 1905.11664).

    Parameters
    ----------
    model : nn.Module
    pairs : sequence of (str, str), optional
        Names of a layer and of the one that reads it; by default each layer and the next in ``model.named_modules()``, which is right for a chain.
        A linear layer behind flattened channels reads each channel at several positions.

    Returns
    -------
    Tensor, shape ()

    Raises
    ------
    ArgumentError
        A name is no such layer, or the reader's inputs are not a multiple of the layer's outputs.
    """
    known = weights(model)
    if pairs is None:
        names = list(known)
        pairs = list(zip(names[:-1], names[1:], strict=True))
    if not pairs:
        raise ArgumentError("got no pair of layers; expected a model with two layers or more")
    return torch.stack([joined_norms(known, layer, reader).sum() for layer, reader in pairs]).sum()


def joined_norms(known: Mapping[str, Tensor], layer: str, reader: str) -> Tensor:
    """``‖(W^ℓ_i·, W^{ℓ+1}_·i)‖₂`` of every unit i: OICSR's score of a unit as well.

    Parameters
    ----------
    known : mapping of str to Tensor
        Weights by layer name, see :func:`weights`.
    layer, reader : str

    Returns
    -------
    Tensor, shape (units,)

    Raises
    ------
    ArgumentError
        See :func:`joined_channels`.
    """
    for name in (layer, reader):
        if name not in known:
            raise ArgumentError(f"{name!r} is no linear or convolution layer of the model; those are {', '.join(known)}")
    made, read = known[layer].flatten(1), known[reader]
    units = len(made)
    if read.shape[1] % units:
        raise ArgumentError(
            f"{reader!r} has {read.shape[1]} inputs, which is no multiple of the {units} outputs of {layer!r}; name the layers that read "
            "each other with pairs="
        )
    columns = read.transpose(0, 1).reshape(units, -1)
    return torch.cat([made, columns], dim=1).norm(dim=1)


def feature_flow(features: Sequence[Tensor], *, curvature: float = 1.0) -> Tensor:
    """Length and curvature of the path that a sample's features take through the depth, the mean over samples.

    ``Σ_ℓ ‖x_{ℓ+1} − x_ℓ‖₂ + curvature · Σ_ℓ ‖x_{ℓ+1} − 2x_ℓ + x_{ℓ−1}‖₂``: feature flow regularization (Wu, Lan, Zhang, Xiang, arXiv 2106.02914).

    Parameters
    ----------
    features : sequence of Tensor, each of shape (samples, ...)
        Of consecutive layers. A narrower one is padded with zeros to the wider, as ResNet's parameter-free shortcut does.
    curvature : float
        Weight of the second differences.

    Returns
    -------
    Tensor, shape ()

    Raises
    ------
    ArgumentError
        Fewer than two features, or numbers of samples that differ.
    """
    if len(features) < 2 or len({len(feature) for feature in features}) > 1:
        raise ArgumentError(f"got {len(features)} features of {[len(f) for f in features]} samples; expected two or more, of the same samples")
    flat = [feature.flatten(1) for feature in features]
    width = max(feature.shape[1] for feature in flat)
    path = torch.stack([nn.functional.pad(feature, (0, width - feature.shape[1])) for feature in flat])
    total = path.diff(dim=0).norm(dim=2).sum(dim=0).mean()
    if len(flat) > 2 and curvature:
        total = total + curvature * path.diff(n=2, dim=0).norm(dim=2).sum(dim=0).mean()
    return total


@torch.no_grad()
def project_rows(model: nn.Module, reference: Mapping[str, Tensor], radius: float) -> None:
    """Bring the weights back to within ``radius`` of given ones, in the maximum absolute row sum (MARS): in place, after an optimiser's step.

    ``W ← argmin_X ‖X − W‖_F  s.t.  max_i Σ_j |x_ij − r_ij| ≤ radius``: each row of ``W − R`` onto an ℓ1 ball, in closed form (sort, soft-threshold).
    The constraint is that of Gouk, Hospedales, Pontil (arXiv 2002.08253, section 4).

    Parameters
    ----------
    model : nn.Module
    reference : mapping of str to Tensor
        R by layer name: copies of :func:`weights` from before the fine-tuning.
    radius : float
        At least 0.

    Raises
    ------
    ArgumentError
        A negative radius, or a layer without a reference of its shape.
    """
    if not radius >= 0:
        raise ArgumentError(f"got radius={radius}; expected a number that is at least 0")
    known = weights(model)
    for name, weight in known.items():
        if name not in reference or reference[name].shape != weight.shape:
            raise ArgumentError(f"reference holds no tensor of shape {tuple(weight.shape)} for {name!r}; copy nettrim.penalties.weights(model) first")
    for name, weight in known.items():
        away = (weight - reference[name]).flatten(1)
        sizes = away.abs()
        outside = sizes.sum(dim=1) > radius
        if outside.any():
            descending = sizes[outside].sort(dim=1, descending=True).values
            count = torch.arange(1, descending.shape[1] + 1, device=weight.device, dtype=weight.dtype)
            thresholds = (descending.cumsum(dim=1) - radius) / count
            # the last place where the sorted entry is still above its threshold
            last = (descending > thresholds).sum(dim=1, keepdim=True).clamp_min(1) - 1
            shrunk = (sizes[outside] - thresholds.gather(1, last)).clamp_min(0)
            away[outside] = away[outside].sign() * shrunk
            # rows within the ball keep their bits
            weight.copy_(torch.where(outside.view(-1, *[1] * (weight.dim() - 1)), reference[name] + away.view_as(weight), weight))
