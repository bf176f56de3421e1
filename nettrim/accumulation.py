"""How the error grows through the depth: each layer's output in the pruned network against the dense one, behind all that was pruned before it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from nettrim import layers
from nettrim.calibration import Run, run_batch
from nettrim.capture import evaluation

_ELEMENTS = 2**26  # of one network's layer outputs held at a time: 256 MB in float32


def accumulated(model: nn.Module, pruned: nn.Module, activations: Mapping[str, str | None], batches: list[Any], run: Run) -> dict[str, float | None]:
    """Relative discrepancy of layers' outputs between two whole networks.

    Parameters
    ----------
    model, pruned : nn.Module
        The dense network and the pruned one.
    activations : mapping of str to ("relu" or None)
        The layers, in execution order, with what follows each.
    batches : list
        As `nettrim.calibration.batches` returns them.
    run : callable(model, batch)

    Returns
    -------
    dict of str to (float or None)
        ``‖Â − A‖_F / ‖A‖_F`` of each layer's outputs over all batches; None where the layer does not run alike in both networks.
    """
    if not activations:
        return {}
    sizes = {name: out.numel() for name, out in _outputs(model, activations, batches[0], 0, run).items()}
    found: dict[str, float | None] = {}
    for group in _groups({name: sizes.get(name, 0) for name in activations}):
        here = {name: activations[name] for name in group}
        squares, norms = dict.fromkeys(group, 0.0), dict.fromkeys(group, 0.0)
        for index, batch in enumerate(batches):
            dense, other = (_outputs(network, here, batch, index, run) for network in (model, pruned))
            for name in group:
                if name not in dense or name not in other or dense[name].shape != other[name].shape:
                    squares[name] = math.nan
                    continue
                squares[name] += float((other[name].double() - dense[name].double()).square().sum())
                norms[name] += float(dense[name].double().square().sum())
        found.update({name: _share(squares[name], norms[name]) for name in group})
    return found


def _share(square: float, norm: float) -> float | None:
    if math.isnan(square):
        return None
    return math.sqrt(square / norm) if norm > 0 else 0.0 if square == 0 else math.inf


def _groups(sizes: dict[str, int]) -> Iterator[list[str]]:
    """The names in order, in runs whose sizes add up to no more than what is held at a time (or of one name)."""
    group: list[str] = []
    for name, size in sizes.items():
        if group and sum(sizes[other] for other in group) + size > _ELEMENTS:
            yield group
            group = []
        group.append(name)
    yield group


def _outputs(model: nn.Module, activations: Mapping[str, str | None], batch: Any, index: int, run: Run) -> dict[str, Tensor]:
    """What the layers put out for one batch, after their ReLU, as rows (P, M)."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Tensor) -> None:
            rows = layers.output_rows(module, out).to(layers.compute_dtype(module), copy=True)
            seen[name] = rows.clamp_(min=0) if activations[name] == "relu" else rows

        return hook

    with ExitStack() as stack, evaluation(model), torch.no_grad():
        for name in activations:
            stack.callback(model.get_submodule(name).register_forward_hook(keep(name), prepend=True).remove)
        run_batch(model, batch, index, run)
    return seen
