"""How the network's output moves with each layer's pre-activations: what errors there cost at the end.

To first order an error ``δz`` (M,) of a layer's pre-activations moves the output ``f`` by ``J δz``, and with errors independent of ``J``

    E ‖J δz‖² = E δzᵀ S δz,    S = E JᵀJ

``S`` (M, M) is the mean of ``g gᵀ`` over the gradients ``g`` of ``⟨v, f⟩`` for random signs ``v`` (``E v vᵀ = I``; Hutchinson's estimator): a
backward pass gives it for every layer at once. It is the output
factor of K-FAC's Gauss-Newton matrix (Martens, Grosse, ICML 2015), ``G = AᵀA`` the other.

Of a matrix whose pre-activations no module puts out (the inner ones of attention and of recurrent layers) only the weights' gradient can be asked
for, ``H = ∂⟨v, f⟩/∂W = Σ_p g_p a_pᵀ``. Random signs make its terms uncorrelated, so the mean of ``H Hᵀ`` is about ``S Σ_p ‖a_p‖²``.
With a BatchNorm folded in, errors are those of ``s z``, and gradients are divided by ``s``.

The diagonal of ``S`` alone, each output weighed by itself, is the ``fidelity="diagonal"`` of :func:`nettrim.prune`: fewer gradients say it well
enough, and it takes no memory to speak of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointError, checkpoint

from nettrim import layers
from nettrim.buffers import detach
from nettrim.calibration import Run, run_batch
from nettrim.grams import add_gram, symmetric
from nettrim.memory import give_back
from nettrim.passes import evaluation, replaced, tensors_in
from nettrim.tracing import TracedLayer

_DRAWS = 4  # of signs a batch, for a matrix; one for a diagonal
_SAMPLES = 2000  # of rows that are enough for a mean
_WIDEST = 4096  # outputs up to which S is a matrix; above it is its diagonal
_DAMPING = 0.1  # of the mean diagonal: errors that the output does not feel to first order are not free


def output_metrics(
    model: nn.Module, batches: list[Any], run: Run, wanted: list[TracedLayer], seed: int, *, diagonal: bool = False, blocks: Sequence[str] = ()
) -> dict[str, Tensor] | None:
    """``S`` (M, M) float64 of the layers ``wanted``, damped; its diagonal (M,) for very wide ones, and for all if that is asked for; None where no
    gradient comes through the network.

    The model is run in evaluation mode and left as it was; no gradient of its parameters is touched. What was computed in the modules named
    ``blocks``, whose outputs follow from their arguments, is not kept for the gradients but computed again.
    """
    measured = partial(_output_metrics, model, batches, run, wanted, seed, diagonal=diagonal)
    for sparing in (blocks, ()) if blocks else ((),):
        try:
            return measured(kept=False, blocks=sparing)
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error) and not isinstance(error, CheckpointError):
                raise
    # what the network writes into is what a gradient is made of, as a ReLU's output that a residual is added to: torch keeps it, where it can
    return measured(kept=True, blocks=())


def _output_metrics(
    model: nn.Module, batches: list[Any], run: Run, wanted: list[TracedLayer], seed: int, *, kept: bool, diagonal: bool, blocks: Sequence[str]
) -> dict[str, Tensor] | None:
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, Tensor] = {}
    sizes: dict[str, float] = dict.fromkeys((layer.name for layer in wanted), 0.0)
    rows: dict[str, int] = dict.fromkeys(sizes, 0)
    outer = [layer for layer in wanted if layer.matrix.kind.observed]
    inner = [layer for layer in wanted if not layer.matrix.kind.observed]
    draws = 1 if diagonal else _DRAWS

    def add(layer: TracedLayer, g: Tensor, size: float, count: int) -> None:
        """Gradients, a row each, whose products' mean is that over ``size``."""
        if layer.norm is not None:
            scale = layer.norm.scale.to(g)
            g = torch.where(scale != 0, g / torch.where(scale != 0, scale, 1.0), 0.0)
        M = g.shape[1]
        whole = M <= _WIDEST and not diagonal
        if layer.name not in sums:
            sums[layer.name] = g.new_zeros((M, M) if whole else M)
        if whole:
            add_gram(sums[layer.name], g)
        else:
            sums[layer.name] += g.square().sum(0)
        sizes[layer.name] += size
        rows[layer.name] += count

    def came(layer: TracedLayer, gradient: Tensor) -> None:
        g = layers.output_rows(layer.matrix, gradient).to(layer.matrix.compute_dtype)
        add(layer, g, len(g), len(g))

    with ExitStack() as stack:
        stack.enter_context(evaluation(model))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.backends.cudnn.flags(enabled=not inner))  # fused recurrent kernels have no gradient in evaluation mode
        stack.enter_context(_gradients_of(model, inner))
        if kept:
            stack.enter_context(torch.autograd.graph.allow_mutation_on_saved_tensors())
        for name in blocks:
            module = model.get_submodule(name)
            stack.enter_context(replaced(module, _computed_again(module.forward)))
        for index, batch in enumerate(batches):
            starts: list[Tensor] = []
            given: dict[str, tuple[float, int]] = {}
            with _watched(outer, inner, starts, came, given):
                output = run_batch(model, batch, index, run)
                ends = [tensor for tensor in tensors_in(output) if tensor.is_floating_point() and tensor.requires_grad]
                if not ends or set(given) != {layer.name for layer in inner}:
                    return None
                asked = [*starts, *(layer.matrix.weight for layer in inner)]
                noted = dict(given)  # blocks that are computed again are watched once more
                for draw in range(draws):
                    before = dict(rows)
                    signs = [torch.randint(0, 2, end.shape, generator=generator).to(end) * 2 - 1 for end in ends]
                    found = torch.autograd.grad(ends, asked, signs, retain_graph=draw + 1 < draws, allow_unused=True)
                    of_weights = found[len(asked) - len(inner) :]
                    if any(gradient is None for gradient in of_weights) or any(rows[layer.name] == before[layer.name] for layer in outer):
                        return None
                    for layer, gradient in zip(inner, of_weights, strict=True):
                        part, kind = layer.matrix.part, layer.matrix.kind
                        own = kind.to_matrix(layer.module, part, gradient if part.rows is None else gradient[part.rows])
                        add(layer, own.T.to(layer.matrix.compute_dtype), *noted[layer.name])
            if min(rows.values()) >= draws * _SAMPLES:
                break
            for buffer in model.buffers():
                detach(buffer)  # else the next batch's graph would begin in this one's
    means = {name: found.double() / (sizes[name] or 1.0) for name, found in sums.items()}
    return {name: _damped(found if found.ndim == 1 else symmetric(found)) for name, found in means.items()}


def _computed_again(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a module that writes into nothing it is given, and of which a gradient keeps the arguments alone."""

    def of_copies(args: Any, kwargs: Any) -> Any:
        give_back()  # what the block before it has freed
        args, kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))
        return forward(*args, **kwargs)

    return lambda *args, **kwargs: checkpoint(of_copies, args, kwargs, use_reentrant=False, preserve_rng_state=False)


def _damped(S: Tensor) -> Tensor:
    diagonal = S if S.ndim == 1 else S.diagonal()
    mean = float(diagonal.mean())
    if not mean > 0:  # nothing that this layer does is felt: all its errors count alike
        return torch.ones_like(diagonal)
    diagonal += _DAMPING * mean
    return S


@contextmanager
def _watched(
    outer: list[TracedLayer],
    inner: list[TracedLayer],
    starts: list[Tensor],
    came: Callable[[TracedLayer, Tensor], None],
    given: dict[str, tuple[float, int]],
) -> Iterator[None]:
    """Give ``came`` the gradients of some layers' outputs, whenever one is computed, and note those that gradients begin at; and of other layers
    how much they were given: ``Σ ‖a_p‖²`` and rows.
    """

    def output_hook(layer: TracedLayer) -> Any:
        def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            if not out.requires_grad:
                out = out.detach().requires_grad_(True)
                starts.append(out)
            out.register_hook(lambda gradient: came(layer, gradient))
            return out.clone()  # which the network may change in place

        return hook

    def input_hook(layer: TracedLayer) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            with torch.no_grad():
                x = layer.matrix.kind.inputs(module, layer.matrix.part, layers.Call(args, kwargs, out))
            size, count = given.get(layer.name, (0.0, 0))
            given[layer.name] = size + float(x.detach().double().square().sum()), count + len(x)

        return hook

    with ExitStack() as stack:
        for layer in outer:
            stack.callback(layer.module.register_forward_hook(output_hook(layer), prepend=True).remove)
        for layer in inner:
            stack.callback(layer.module.register_forward_hook(input_hook(layer), prepend=True, with_kwargs=True).remove)
        yield


@contextmanager
def _gradients_of(model: nn.Module, wanted: list[TracedLayer]) -> Iterator[None]:
    """Of all parameters only the weights of those layers ask for gradients."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    asked = {id(layer.matrix.weight) for layer in wanted}
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(id(parameter) in asked)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
