"""How the network's output moves with each layer's pre-activations: what errors there cost at the end.

To first order an error ``δz`` (M,) of a layer's pre-activations moves the output ``f`` by ``J δz``, and with errors independent of ``J``

    E ‖J δz‖² = E δzᵀ S δz,    S = E JᵀJ

``S`` (M, M) is the mean of ``g gᵀ`` over the gradients ``g`` of ``⟨v, f⟩`` for random signs ``v`` (``E v vᵀ = I``; Hutchinson's estimator): a
backward pass gives it for every layer at once. It is the output
factor of K-FAC's Gauss-Newton matrix (Martens, Grosse, ICML 2015), ``G = AᵀA`` the other.

Of a matrix whose pre-activations no module puts out (the inner ones of attention and of recurrent layers) only the weights' gradient can be asked
for, ``H = ∂⟨v, f⟩/∂W = Σ_p g_p a_pᵀ``. Random signs make its terms uncorrelated, so the mean of ``H Hᵀ`` is about ``S Σ_p ‖a_p‖²``.
With a BatchNorm folded in, errors are those of ``s z``, and gradients are divided by ``s``.

The diagonal of ``S`` alone, each output weighed by itself, is the ``fidelity="diagonal"`` of :func:`nettrim.prune`. Fewer gradients say it well
enough; and where the layers lie in a chain of blocks these are run forwards without gradients, and then backwards, each once more by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nettrim import layers
from nettrim.blockwise import Chain
from nettrim.buffers import detach
from nettrim.calibration import Run, run_batch
from nettrim.errors import ArgumentError
from nettrim.grams import add_gram, symmetric
from nettrim.memory import give_back
from nettrim.metrics import Metric
from nettrim.passes import evaluation, tensors_in
from nettrim.tracing import TracedLayer

_DRAWS = 2  # of signs a batch, for a matrix; one for a diagonal
_SAMPLES = 2000  # of rows that are enough for a mean
_WIDEST = 4096  # outputs up to which S is a matrix; above it is its diagonal
_DAMPING = 0.1  # of the mean diagonal: errors that the output does not feel to first order are not free


def output_metrics(
    model: nn.Module, batches: list[Any], run: Run, wanted: list[TracedLayer], seed: int, *, diagonal: bool = False, chain: Chain | None = None
) -> dict[str, Metric] | None:
    """``S`` of the layers ``wanted``, damped, its small eigenvalues made equal (`Metric.leading`), in the dtype that the layer computes in; its
    diagonal for very wide ones, and for all if that is asked for; None where no gradient comes through the network.

    The model is run in evaluation mode and left as it was; no gradient of its parameters is touched. Of a diagonal, what is kept for the gradients
    is a block's at a time where all the layers lie in a ``chain`` of blocks that alone make the output, and else the network's.
    """
    ways = [(chain, False), (None, False)] if diagonal and chain is not None and _walks(chain, wanted) else [(None, False)]
    for blocks, kept in ways:
        try:
            return _output_metrics(model, batches, run, wanted, seed, kept=kept, diagonal=diagonal, chain=blocks)
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
    # what the network writes into is what a gradient is made of, as a ReLU's output that a residual is added to: torch keeps it, where it can
    return _output_metrics(model, batches, run, wanted, seed, kept=True, diagonal=diagonal, chain=None)


def _walks(chain: Chain, wanted: list[TracedLayer]) -> bool:
    """Whether gradients of all the layers come through the hidden states of the blocks alone."""
    return chain.sole and all(layer.matrix.kind.observed and chain.place(layer.module_name) is not None for layer in wanted)


def _output_metrics(
    model: nn.Module, batches: list[Any], run: Run, wanted: list[TracedLayer], seed: int, *, kept: bool, diagonal: bool, chain: Chain | None
) -> dict[str, Metric] | None:
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

    def signs(ends: list[Tensor]) -> list[Tensor]:
        return [torch.randint(0, 2, end.shape, generator=generator).to(end) * 2 - 1 for end in ends]

    with ExitStack() as stack:
        stack.enter_context(evaluation(model))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.backends.cudnn.flags(enabled=not inner))  # fused recurrent kernels have no gradient in evaluation mode
        stack.enter_context(_gradients_of(model, inner))
        if kept:
            stack.enter_context(torch.autograd.graph.allow_mutation_on_saved_tensors())
        for index, batch in enumerate(batches):
            if chain is not None:
                if not _walked(chain, model, batch, index, run, outer, signs, came):
                    return None
                if min(rows.values()) >= draws * _SAMPLES:
                    break
                continue
            seen: dict[str, Tensor] = {}
            given: dict[str, tuple[float, int]] = {}
            with _watched(outer, inner, seen, given):
                output = run_batch(model, batch, index, run)
            ends = [tensor for tensor in tensors_in(output) if tensor.is_floating_point() and tensor.requires_grad]
            if not ends or {*seen, *given} != set(sizes):
                return None
            asked = [*(seen[layer.name] for layer in outer), *(layer.matrix.weight for layer in inner)]
            for draw in range(draws):
                found = _gradients(ends, signs(ends), asked, retain_graph=draw + 1 < draws)
                if any(gradient is None for gradient in found):
                    return None
                for layer, gradient in zip(outer, found, strict=False):
                    came(layer, gradient)
                for layer, gradient in zip(inner, found[len(outer) :], strict=True):
                    part, kind = layer.matrix.part, layer.matrix.kind
                    own = kind.to_matrix(layer.module, part, gradient if part.rows is None else gradient[part.rows])
                    add(layer, own.T.to(layer.matrix.compute_dtype), *given[layer.name])
            if min(rows.values()) >= draws * _SAMPLES:
                break
            for buffer in model.buffers():
                detach(buffer)  # else the next batch's graph would begin in this one's
    means = {name: found.double() / (sizes[name] or 1.0) for name, found in sums.items()}
    return {name: _damped(name, found if found.ndim == 1 else symmetric(found), sums[name].dtype) for name, found in means.items()}


def _gradients(ends: list[Tensor], directions: list[Tensor], of: list[Tensor], *, retain_graph: bool = False) -> tuple[Any, ...]:
    """``∂⟨v, f⟩`` for the ends ``f`` and directions ``v``; None for what has no part in them.

    Of the sum itself: for gradients along directions torch imports a computer algebra system, which takes a second.
    """
    value = sum((end * along).sum().to(ends[0].device) for end, along in zip(ends, directions, strict=True))
    assert isinstance(value, Tensor)
    return torch.autograd.grad(value, of, retain_graph=retain_graph, allow_unused=True)


def _walked(
    chain: Chain,
    model: nn.Module,
    batch: Any,
    index: int,
    run: Run,
    wanted: list[TracedLayer],
    signs: Callable[[list[Tensor]], list[Tensor]],
    came: Callable[[TracedLayer, Tensor], None],
) -> bool:
    """Give ``came`` the gradients of the layers' outputs in one batch, block by block from the last; False where one does not come."""
    with torch.no_grad():
        calls, first = chain.calls(model, batch, index, run)
        states = [first]
        for place, name in enumerate(chain.names):
            args, kwargs = calls[place].arguments(states[-1], None)
            states.append(chain.hidden(place, model.get_submodule(name)(*args, **kwargs)))
            give_back()
    hidden = states.pop().detach().requires_grad_(True)
    output = chain.end(model, batch, index, run, hidden, traced=True)
    ends = [tensor for tensor in tensors_in(output) if tensor.is_floating_point() and tensor.requires_grad]
    if not ends:
        return False
    (gradient,) = _gradients(ends, signs(ends), [hidden])
    del hidden, output, ends
    for place, name in reversed(list(enumerate(chain.names))):
        here = [layer for layer in wanted if chain.place(layer.module_name) == place]
        hidden, seen = states.pop().detach().requires_grad_(True), dict[str, Tensor]()
        args, kwargs = calls[place].arguments(hidden, None, traced=True)
        with _watched(here, [], seen, {}):
            out = chain.hidden(place, model.get_submodule(name)(*args, **kwargs))
        if gradient is None or not out.requires_grad or len(seen) < len(here):
            return False
        gradient, *found = _gradients([out], [gradient], [hidden, *(seen[layer.name] for layer in here)])
        if any(own is None for own in found):
            return False
        for layer, own in zip(here, found, strict=True):
            came(layer, own)
        del args, kwargs, out, seen, found, hidden
        give_back()  # what the block has freed
    return True


def _damped(name: str, S: Tensor, dtype: torch.dtype) -> Metric:
    diagonal = S if S.ndim == 1 else S.diagonal()
    mean = float(diagonal.mean())
    if mean == 0:  # nothing that this layer does is felt: all its errors count alike
        return Metric.of(torch.ones_like(diagonal, dtype=dtype))
    range_of = torch.finfo(dtype)
    if not range_of.tiny / range_of.eps < mean < range_of.max * range_of.eps:
        raise ArgumentError(
            f"the gradients of the network's output by layer {name!r} have a mean square of {mean:.3g}; expected one well within the range of "
            f"{str(dtype).removeprefix('torch.')}: give the model in a wider dtype, or fidelity='layer' and allocation='uniform'"
        )
    S = S / mean
    (S if S.ndim == 1 else S.diagonal()).add_(_DAMPING)
    return (Metric.of(S.to(dtype)) if S.ndim == 1 else Metric.leading(S.to(dtype))).times(mean)


@contextmanager
def _watched(
    outer: list[TracedLayer], inner: list[TracedLayer], seen: dict[str, Tensor], given: dict[str, tuple[float, int]]
) -> Iterator[None]:
    """Note the outputs of some layers, each with a gradient to be asked for, and of others how much they were given: ``Σ ‖a_p‖²`` and rows."""

    def output_hook(name: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            out = out if out.requires_grad else out.detach().requires_grad_(True)
            seen[name] = out
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
            stack.callback(layer.module.register_forward_hook(output_hook(layer.name), prepend=True).remove)
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
