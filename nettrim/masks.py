"""Masks in training: put on with ``torch.nn.utils.prune``, so that torch's own conventions hold, checked, and made permanent."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from nettrim.errors import ArgumentError, MaskError


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Mask parameters for fine-tuning: whatever an optimiser does, the weights that the network computes with are zero where a mask is False.

    Each parameter ``name`` becomes torch's ``name_orig`` (what is trained) and the buffer ``name_mask``, in ``state_dict`` too, and ``name`` is
    their product, made before every forward pass. Make the optimiser, and compile, after this call.

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    masks : mapping of str to Tensor
        Parameter name to a bool tensor of its shape, True where a weight is kept: ``result.masks`` of :func:`nettrim.prune`.

    Returns
    -------
    nn.Module
        ``model``.

    Raises
    ------
    ArgumentError
        A name is no parameter of the model, or one that is shared or masked already; a mask has another shape or dtype. Nothing is changed then.
    """
    if hasattr(model, "_orig_mod"):
        raise ArgumentError("the model is compiled, and would not see masks that come now; apply them first, then torch.compile")
    places = {name: _place(model, name, mask) for name, mask in _checked(model, masks).items()}
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, (module, leaf) in places.items():
        own = module._parameters.get(leaf)
        if own is None:
            raise ArgumentError(f"{name!r} is no parameter but computed from others; call nettrim.remove_masks, or make it permanent, first")
        if len(owners[id(own)]) > 1:
            raise ArgumentError(f"{name!r} is shared ({', '.join(owners[id(own)])}): a mask on one of them would part them")
    with torch.no_grad():  # the product is made anew, with its gradient, in every forward pass; without one, the model can be copied
        for name, (module, leaf) in places.items():
            prune.custom_from_mask(module, leaf, masks[name].to(module.get_parameter(leaf).device))
    return model


def remove_masks(model: nn.Module) -> nn.Module:
    """Make the masks permanent: ``name_orig`` and ``name_mask`` become ``name`` again, with exact zeros where the mask is False.

    Parameters
    ----------
    model : nn.Module
        Changed in place.

    Returns
    -------
    nn.Module
        ``model``.

    Raises
    ------
    ArgumentError
        It has no masks.
    """
    masked = _masked(model)
    if not masked:
        raise ArgumentError("the model has no masks to remove; expected one that nettrim.apply_masks was called on")
    for module, leaf in masked:
        mask = module.get_buffer(f"{leaf}_mask") != 0
        prune.remove(module, leaf)
        with torch.no_grad():  # a product with 0 may be -0 or NaN
            module.get_parameter(leaf).masked_fill_(~mask, 0)
    return model


def check_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Refuse a model that has weights where a mask says that there are none: what merging an adapter (LoRA) or training without masks leaves.

    Parameters
    ----------
    model : nn.Module
        With or without masks applied; dense or sparse; compiled or not.
    masks : mapping of str to Tensor
        As for :func:`apply_masks`.

    Raises
    ------
    MaskError
        Naming each such parameter and how many of its zeros were lost.
    ArgumentError
        A name is no parameter of the model; a mask has another shape or dtype.
    """
    model = getattr(model, "_orig_mod", model)
    broken = []
    for name, mask in _checked(model, masks).items():
        module, leaf = _place(model, name, mask)
        weight = _computed(module, leaf).detach()
        lost = int(((weight != 0) & ~mask.to(weight.device)).sum())  # NaN is not 0 either
        if lost:
            broken.append(f"{name}: {lost} of {int((~mask).sum())} zeros lost")
    if broken:
        raise MaskError(f"the masks do not hold: {'; '.join(broken)}. Fine-tune with nettrim.apply_masks, or prune again with preserve_zeros=True")


def _checked(model: object, masks: object) -> Mapping[str, Tensor]:
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    if not isinstance(masks, Mapping) or not masks:
        raise ArgumentError(f"masks is {'empty' if masks == {} else f'a {type(masks).__name__}'}; expected {{parameter name: bool tensor}}")
    return masks


def _place(model: nn.Module, name: str, mask: Tensor) -> tuple[nn.Module, str]:
    """The module and the attribute that a parameter's name means, once the mask is found to fit it."""
    owner, _, leaf = str(name).rpartition(".")
    try:
        module = model.get_submodule(owner)
        weight = _computed(module, leaf)
    except (AttributeError, KeyError) as error:
        known = ", ".join(key.removesuffix("_orig") for key, value in model.named_parameters() if value.dim() > 1) or "none"
        raise ArgumentError(f"masks: {name!r} is no parameter of the model; those with two dimensions or more are {known}") from error
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != weight.shape:
        given = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ArgumentError(f"the mask of {name!r} is {given}; expected torch.bool {tuple(weight.shape)}, True where a weight is kept")
    return module, leaf


def _computed(module: nn.Module, leaf: str) -> Tensor:
    """The tensor that a module computes with; made anew where it is masked, since the attribute is from the last forward pass."""
    if f"{leaf}_orig" in module._parameters:
        return module.get_parameter(f"{leaf}_orig") * module.get_buffer(f"{leaf}_mask")
    value = getattr(module, leaf)
    if not isinstance(value, Tensor):
        raise AttributeError(leaf)
    return value


def _masked(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every module and attribute that ``torch.nn.utils.prune`` masks."""
    found = []
    for module in getattr(model, "_orig_mod", model).modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, prune.BasePruningMethod):
                found.append((module, hook._tensor_name))
    return found
