"""Checks that need no run: digests, masks, and whether both networks are one but for the layers that were pruned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nettrim import digests
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
    names = {f"{layer.name}.weight".lstrip(".") for layer in report.layers}
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
    modules = dict(dense.named_modules())
    unknown = [layer.name for layer in report.layers if getattr(modules.get(layer.name), "weight", None) is None]
    yield decide("network", "layers", not unknown, ", ".join(unknown) or "all", "all", "layers of the report that the dense network has")
    pruned_names = {f"{layer.name}.{key}".lstrip(".") for layer in report.layers for key in ("weight", "bias")}
    changed = [
        name for name in ours if name not in pruned_names and name not in differ and not torch.equal(_bits(ours[name]), _bits(theirs[name]))
    ]
    yield decide("network", "other tensors", not changed, "unchanged", ", ".join(changed[:3]) or "unchanged", "of layers that were not pruned")


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
