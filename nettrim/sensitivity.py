"""How much the network's output moves with each neuron's pre-activation: what an error there costs at the end.

To first order an error ``δz`` (P, M) of a layer's pre-activations moves the output ``f`` by ``J δz``. Where the errors of neurons are uncorrelated,

    E ‖J δz‖² = Σ_m d_m E δz_m²,    d_m = E ‖∂f/∂z_m‖²

and ``d_m`` is the mean square of the gradient of ``⟨v, f⟩`` for random signs ``v`` (``E v vᵀ = I``; Hutchinson's estimator): one backward pass a
batch gives it for every layer at once.
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


def sensitivities(model: nn.Module, batches: list[Any], run: Run, names: list[str], seed: int) -> dict[str, Tensor] | None:
    """``d`` (M,) float64 of the layers ``names``; None where no gradient comes through the network.

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
                    squares = layers.output_rows(model.get_submodule(name), gradient).double().square()
                    sums[name] = sums.get(name, torch.zeros_like(squares[0])) + squares.sum(0)
                    rows[name] += len(squares)
            if min(rows.values()) >= _DRAWS * _SAMPLES:
                break
    return {name: sums[name] / rows[name] for name in names}


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
