"""How the error grows through the depth: each layer's output in the pruned network against the dense one, behind all that was pruned before it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from nettrim.activations import output
from nettrim.calibration import Run, run_batch
from nettrim.certificate import share
from nettrim.grams import square_sum
from nettrim.layers import Call
from nettrim.passes import evaluation
from nettrim.tracing import TracedLayer

_ELEMENTS = 2**26  # of one network's layer outputs held at a time: 256 MB in float32


def accumulated(
    model: nn.Module, pruned: nn.Module, wanted: Sequence[TracedLayer], batches: list[Any], run: Run, pruned_batches: list[Any] | None = None
) -> dict[str, float | None]:
    """Relative discrepancy of layers' outputs between two networks, or the same part of both.

    Parameters
    ----------
    model, pruned : nn.Module
        The dense network and the pruned one.
    wanted : sequence of TracedLayer
        The layers, in execution order: the outputs are those after their BatchNorm and activation, of an inner matrix what it adds there.
    batches : list
        As `nettrim.calibration.batches` returns them.
    run : callable(model, batch)
    pruned_batches : list, optional
        What the pruned one is given, where it is not the same.

    Returns
    -------
    dict of str to (float or None)
        ``‖Â − A‖_F / ‖A‖_F`` of each layer's outputs over all batches; None where the layer does not run alike in both networks.
    """
    if not wanted:
        return {}
    sizes = {name: out.numel() for name, out in _outputs(model, wanted, batches[0], 0, run).items()}
    found: dict[str, float | None] = {}
    for group in _groups({layer.name: sizes.get(layer.name, 0) for layer in wanted}):
        here = [layer for layer in wanted if layer.name in group]
        squares, norms = dict.fromkeys(group, 0.0), dict.fromkeys(group, 0.0)
        for index, batch in enumerate(batches):
            theirs = batch if pruned_batches is None else pruned_batches[index]
            dense, other = (_outputs(network, here, given, index, run) for network, given in ((model, batch), (pruned, theirs)))
            for name in group:
                if name not in dense or name not in other or dense[name].shape != other[name].shape:
                    squares[name] = math.nan
                    continue
                squares[name] += square_sum(other[name].double() - dense[name].double())
                norms[name] += square_sum(dense[name])
        found.update({name: None if math.isnan(squares[name]) else share(math.sqrt(squares[name]), math.sqrt(norms[name])) for name in group})
    return found


def _groups(sizes: dict[str, int]) -> Iterator[list[str]]:
    """The names in order, in runs whose sizes add up to no more than what is held at a time (or of one name)."""
    group: list[str] = []
    for name, size in sizes.items():
        if group and sum(sizes[other] for other in group) + size > _ELEMENTS:
            yield group
            group = []
        group.append(name)
    yield group


def _outputs(model: nn.Module, wanted: Sequence[TracedLayer], batch: Any, index: int, run: Run) -> dict[str, Tensor]:
    """What the layers put out for one batch, as rows (P, M)."""
    seen: dict[str, list[Tensor]] = {}

    def keep(layer: TracedLayer) -> Any:
        matrix = layer.of(model)

        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            Z = matrix.output_rows(Call(args, kwargs, out)).to(matrix.compute_dtype, copy=True)
            seen.setdefault(layer.name, []).append(output(Z, layer.norm, layer.function))

        return hook

    with evaluation(model), torch.no_grad(), ExitStack() as stack:
        for layer in wanted:
            module = model.get_submodule(layer.module_name)
            stack.callback(module.register_forward_hook(keep(layer), prepend=True, with_kwargs=True).remove)
        run_batch(model, batch, index, run)
    return {name: torch.cat(pieces) for name, pieces in seen.items()}
