"""Checks that need no run: digests, masks, and whether both networks are one but for the layers that were pruned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nettrim import digests, layers
from nettrim.checking.results import Check, decide
from nettrim.report import Report


def identities(dense: nn.Module, pruned: nn.Module, batches: list[Any], report: Report) -> Iterator[Check]:
    """Digests: what the report was made from, and whether it is as it was written."""
    if not report.digests:
        yield decide("report", "digests", None, None, None, "it carries none: it was written by an older version")
        return
    for name, value in digests.make(report, dense, pruned, batches).items():
        stated = report.digests.get(name)
        yield decide("report", f"digest of the {name}", stated == value, (stated or "none")[:16], value[:16], "SHA-256, first half shown")


def masks_of(pruned: nn.Module, masks: Mapping[str, Tensor] | None, report: Report) -> Iterator[Check]:
    """Whether masks, if there are any, say which weights are zero."""
    if masks is None:
        return
    parameters = dict(pruned.named_parameters())
    names = {parts[0] for parts in _parameters(pruned, report).values()}
    yield decide("masks", "names", set(masks) == names, ", ".join(sorted(masks)), ", ".join(sorted(names)), "one for every pruned layer")
    for name in sorted(names & set(masks) & set(parameters)):
        mask, weight = masks[name], parameters[name].detach()
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != weight.shape:
            yield decide("masks", name, False, type(mask).__name__, str(tuple(weight.shape)), "expected a bool tensor of the weight's shape")
            continue
        differ = int((mask.to(weight.device) != (weight != 0)).sum())
        yield decide("masks", name, differ == 0, 0, differ, "entries where mask and zeros differ")


def strangers(dense: nn.Module, pruned: nn.Module, report: Report) -> Iterator[Check]:
    """Whether both networks are one but for the pruned layers: names, shapes, dtypes, and every bit of what was not pruned."""
    ours, theirs = ({**dict(model.named_parameters()), **dict(model.named_buffers())} for model in (dense, pruned))
    forms = [{name: f"{tensor.dtype} {tuple(tensor.shape)}" for name, tensor in side.items()} for side in (ours, theirs)]
    differ = [name for name in {**forms[0], **forms[1]} if forms[0].get(name) != forms[1].get(name)]
    shown = [", ".join(f"{name} {form.get(name, 'missing')}" for name in differ[:3]) or "the same" for form in forms]
    yield decide("network", "dtypes and shapes", not differ, shown[0], shown[1], "of all parameters and buffers; stated: the dense network's")
    sides = [layers.matrices(model) for model in (dense, pruned)]
    unknown = [layer.name for layer in report.layers if any(layer.name not in side for side in sides)]
    yield decide("network", "layers", not unknown, ", ".join(unknown) or "all", "all", "layers of the report that both networks have")
    free = _written(dense, report)
    statistics = _statistics(dense) if report.options.get("recalibrate_batchnorm") is True else set()
    changed = [name for name in ours if name not in differ and name not in statistics and not _same_but_for(ours[name], theirs[name], free.get(name))]
    yield decide("network", "other tensors", not changed, "unchanged", ", ".join(changed[:3]) or "unchanged", "of layers that were not pruned")


def _parameters(model: nn.Module, report: Report) -> dict[str, tuple[str, ...]]:
    """The weight, and the bias if there is one, of every layer of the report that the model has, by their names in the model."""
    found, owners = layers.matrices(model), {module: name for name, module in layers.owners(model).items()}
    reported = {layer.name: found[layer.name] for layer in report.layers if layer.name in found}
    return {
        name: tuple(f"{owners[matrix.module]}.{key}".lstrip(".") for key in matrix.parameter_names()) for name, matrix in reported.items()
    }


def _written(model: nn.Module, report: Report) -> dict[str, Tensor]:
    """Parameters that pruning may have changed: which entries of their first dimension."""
    found, parameters = layers.matrices(model), dict(model.named_parameters())
    free: dict[str, Tensor] = {}
    for name, keys in _parameters(model, report).items():
        part = found[name].part
        for key, rows in zip(keys, (part.rows, part.bias_rows), strict=False):
            free.setdefault(key, torch.zeros(len(parameters[key]), dtype=torch.bool))[slice(None) if rows is None else rows] = True
    return free


def _statistics(model: nn.Module) -> set[str]:
    """The running statistics of BatchNorms."""
    kinds = nn.modules.batchnorm._BatchNorm
    norms = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    return {f"{name}.{key}".lstrip(".") for name in norms for key in ("running_mean", "running_var")}


def _same_but_for(ours: Tensor, theirs: Tensor, free: Tensor | None) -> bool:
    if free is None:
        return torch.equal(_bits(ours), _bits(theirs))
    held = ~free.to(ours.device)
    return torch.equal(_bits(ours[held]), _bits(theirs[~free.to(theirs.device)]))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
