"""How the network's output moves with each layer's pre-activations: what errors there cost at the end.

To first order an error ``δz`` (M,) of a layer's pre-activations moves the output ``f`` by ``J δz``, and with errors independent of ``J``

    E ‖J δz‖² = E δzᵀ S δz,    S = E JᵀJ

``S`` (M, M) is the mean of ``g gᵀ`` over the gradients ``g`` of ``⟨v, f⟩`` for random signs ``v`` (``E v vᵀ = I``; Hutchinson's estimator): a
backward pass gives it for every layer at once. It is the output
factor of K-FAC's Gauss-Newton matrix (Martens, Grosse, ICML 2015), ``G = AᵀA`` the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nettrim import layers
from nettrim.calibration import Run, run_batch
from nettrim.capture import evaluation, tensors_in

_DRAWS = 4  # of signs a batch
_SAMPLES = 2000  # of rows that are enough for a mean
_WIDEST = 4096  # outputs up to which S is a matrix; above it is its diagonal
_DAMPING = 0.1  # of the mean diagonal: errors that the output does not feel to first order are not free


def output_metrics(model: nn.Module, batches: list[Any], run: Run, names: list[str], seed: int) -> dict[str, Tensor] | None:
    """``S`` (M, M) float64 of the layers ``names``, damped; its diagonal (M,) for very wide ones; None where no gradient comes through the network.

    The model is run in evaluation mode and left as it was; no gradient of its parameters is touched.
    """
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = dict.fromkeys(names, 0)
    with evaluation(model), torch.enable_grad(), _without_parameter_gradients(model):
        for index, batch in enumerate(batches):
            seen: dict[str, Tensor] = {}
            with _outputs(model, names, seen):
                output = run_batch(model, batch, index, run)
            ends = [tensor for tensor in tensors_in(output) if tensor.is_floating_point() and tensor.requires_grad]
            if not ends or set(seen) != set(names):
                return None
            for draw in range(_DRAWS):
                signs = [torch.randint(0, 2, end.shape, generator=generator).to(end) * 2 - 1 for end in ends]
                found = torch.autograd.grad(ends, list(seen.values()), signs, retain_graph=draw + 1 < _DRAWS, allow_unused=True)
                for name, gradient in zip(seen, found, strict=True):
                    if gradient is None:
                        return None
                    module = model.get_submodule(name)
                    g = layers.output_rows(module, gradient).to(layers.compute_dtype(module))
                    part = g.T @ g if g.shape[1] <= _WIDEST else g.square().sum(0)
                    sums[name] = sums[name] + part if name in sums else part
                    rows[name] += len(g)
            if min(rows.values()) >= _DRAWS * _SAMPLES:
                break
    return {name: _damped(sums[name].double() / rows[name]) for name in names}


def _damped(S: Tensor) -> Tensor:
    diagonal = S if S.ndim == 1 else S.diagonal()
    mean = float(diagonal.mean())
    if not mean > 0:  # nothing that this layer does is felt: all its errors count alike
        return torch.ones_like(diagonal)
    diagonal += _DAMPING * mean
    return S


@contextmanager
def _outputs(model: nn.Module, names: list[str], seen: dict[str, Tensor]) -> Iterator[None]:
    """Note the layers' outputs, each with a gradient to be asked for."""

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            out = out if out.requires_grad else out.detach().requires_grad_(True)
            seen[name] = out
            return out.clone()  # which the network may change in place

        return hook

    handles = [model.get_submodule(name).register_forward_hook(hook_of(name), prepend=True) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _without_parameter_gradients(model: nn.Module) -> Iterator[None]:
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
