"""What flows through the network: a layer's inputs and pre-activations as rows, and the network's outputs.

Everything runs inside `evaluation`, and every hook is gone afterwards, whatever happened.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nettrim import layers
from nettrim.buffers import Buffers
from nettrim.calibration import Run, run_batch
from nettrim.errors import CalibrationError, RouteError
from nettrim.layers import Matrix
from nettrim.sharing import turn


class Stop(BaseException):
    """Ends a forward pass once enough has run; no `Exception`, so that a model's own handlers let it through."""


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Run the model in evaluation mode, without gradients, and leave it as it was.

    Every submodule's own training flag is put back on exit, also after an exception, and so are buffers that the forward pass changes
    (counters, caches). The flags are set directly:
    `model.eval()` may be overridden and change more than flags. The fused kernels of nn.TransformerEncoder and
    nn.MultiheadAttention are off meanwhile: they bypass the forward of the layers that they hold. Threads that do so take
    turns; hooks are put on the model inside, where no other thread runs it.
    """
    with turn(), _evaluation(model):
        yield


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    buffers = Buffers(module for module, _ in flags)
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for module, _ in flags:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        try:
            buffers.put_back()
        finally:
            for module, training in flags:
                module.training = training


def kept(
    model: nn.Module, batches: list[Any], run: Run, matrix: Matrix, *, device: torch.device | str | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """What a layer is given and what it gives, batch by batch.

    Parameters
    ----------
    model : nn.Module
        The network; every forward pass ends as soon as the layer has run.
    batches : list
        As `nettrim.calibration.batches` returns them.
    run : callable(model, batch)
        As `nettrim.calibration.runner` returns it.
    matrix : Matrix
        Of a supported submodule of `model`.
    device : optional
        Where the results are; the layer's device by default.

    Yields
    ------
    kept : Tensor
        What the layer's kind keeps of the input (`nettrim.layers.Kind.inputs`), in its own dtype.
    Z : Tensor, shape (P, M)
        Pre-activations in the compute dtype: what the layer returned, before anything changed it. Both share no memory with the model.

    Raises
    ------
    CalibrationError
        A batch that the model cannot run or in which the layer does not run, or NaN or infinity in the layer's input
        or output; the layer and the batch are named.
    """
    module, kind, part = matrix.module, matrix.kind, matrix.part
    name = matrix.name_in(next((name for name, child in model.named_modules() if child is module), type(module).__name__))
    seen: list[tuple[Tensor, Tensor]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        call = layers.Call(args, kwargs, out)
        x, z = kind.inputs(module, part, call), kind.outputs(module, part, call)
        # copies: a model that catches even `Stop` goes on and may change both in place
        seen.append((x.to(device=device, copy=True), z.to(device=device, dtype=matrix.compute_dtype, copy=True)))
        if not kind.repeats:
            raise Stop

    for index, batch in enumerate(batches):
        seen.clear()
        with evaluation(model):
            # first among the forward hooks, so that it sees the layer's own output and not what another hook made of it
            handle = module.register_forward_hook(hook, prepend=True, with_kwargs=True)
            try:
                run_batch(model, batch, index, run)
            except Stop:
                pass
            finally:
                handle.remove()
        if not seen:
            raise RouteError(
                f"layer {name!r} did not run in calibration batch {index}; expected it to run in every "
                "batch: leave it out (ignore) or leave out that batch"
            )
        for call in seen:
            for what, values in zip(("input", "output"), call, strict=True):
                _require_finite(values, f"the {what} of layer {name!r}", index)
        if not kind.repeats:
            yield seen[0]
        else:
            yield torch.cat([x for x, _ in seen]), torch.cat([z for _, z in seen])


@dataclass(frozen=True, eq=False)
class Seen:
    """What was seen of a layer in one batch: what its kind keeps of the input, the same tensor for layers that were given the same one, and ``Z``."""

    kept: Tensor
    Z: Tensor


def together(
    model: nn.Module, batches: list[Any], run: Run, matrices: Mapping[str, Matrix], *, device: torch.device | str | None = None
) -> Iterator[tuple[dict[str, Seen], Any]]:
    """As `kept`, of several layers in one forward pass of each batch, and what ``run`` returned. None of them may run more than once in a pass."""
    for index, batch in enumerate(batches):
        found: dict[str, Seen] = {}
        given: list[tuple[Any, int, type, Tensor]] = []  # the inputs themselves: while they are held no other has their memory

        def hook(name: str, matrix: Matrix, index: int = index, found: dict[str, Seen] = found, given: list[Any] = given) -> Any:
            kind, part = matrix.kind, matrix.part

            def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
                call = layers.Call(args, kwargs, out)
                x, own = call.argument(module), type(kind)
                kept = next((kept for y, version, other, kept in given if y is x and version == x._version and other is own), None)
                if kept is None:
                    kept = kind.inputs(module, part, call).to(device=device, copy=True)
                    _require_finite(kept, f"the input of layer {name!r}", index)
                    given.append((x, x._version, own, kept))
                Z = kind.outputs(module, part, call).to(device=device, dtype=matrix.compute_dtype, copy=True)
                _require_finite(Z, f"the output of layer {name!r}", index)
                found[name] = Seen(kept, Z)

            return after

        with evaluation(model), ExitStack() as stack:
            for name, matrix in matrices.items():
                stack.callback(matrix.module.register_forward_hook(hook(name, matrix), prepend=True, with_kwargs=True).remove)
            output = run_batch(model, batch, index, run)
        if len(found) < len(matrices):
            missing = next(name for name in matrices if name not in found)
            raise RouteError(
                f"layer {missing!r} did not run in calibration batch {index}; expected it to run in every batch: leave it out (ignore) or leave out "
                "that batch"
            )
        yield found, output


def rows(
    model: nn.Module, batches: list[Any], run: Run, layer: nn.Module | Matrix, *, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """All rows of a layer at once; the arguments and errors are those of `kept`.

    Returns
    -------
    A : Tensor, shape (P, N)
        Inputs, one row a sample (token, patch), with a column of ones when the layer has a bias.
    Z : Tensor, shape (P, M)
        Pre-activations. Both are in the compute dtype (float64 for float64 weights, else float32).
    """
    matrix = layers.only_matrix(layer)
    pieces = []
    for x, z in kept(model, batches, run, matrix, device=device):
        unfolded = matrix.kind.unfold(matrix.module, matrix.part, x.to(matrix.compute_dtype))
        pieces.append((matrix.with_ones(unfolded), z))
    return torch.cat([a for a, _ in pieces]), torch.cat([z for _, z in pieces])


def outputs(model: nn.Module, batches: list[Any], run: Run) -> Tensor:
    """The network's output over all batches.

    Returns
    -------
    Tensor, shape (R, K)
        If the output is one tensor whose last dimension is the same in all batches, K is that dimension and the rows
        are all others, in order. Otherwise K is 1: the elements of all floating-point tensors of the output, however
        nested, in order. float64 if any of them is, float32 otherwise; on the device of the output.

    Raises
    ------
    CalibrationError
        A batch that the model cannot run, NaN or infinity in the output (the batch is named), or an output without a
        floating-point tensor.
    """
    found: list[list[Tensor]] = []
    with evaluation(model):
        for index, batch in enumerate(batches):
            output = run_batch(model, batch, index, run)
            tensors = [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]
            if not tensors:
                raise CalibrationError(
                    f"{type(model).__name__} returned a {type(output).__name__} without a floating-point tensor for "
                    f"batch {index}; expected outputs that can be compared: give a forward_fn that returns them"
                )
            for tensor in tensors:
                _require_finite(tensor, "the network's output", index)
            wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
            found.append([tensor.to(wide, copy=True) for tensor in tensors])
    widths = {tensors[0].shape[-1] for tensors in found if len(tensors) == 1 and tensors[0].dim() > 1}
    if len(widths) == 1 and all(len(tensors) == 1 and tensors[0].dim() > 1 for tensors in found):
        return torch.cat([tensors[0].flatten(0, -2) for tensors in found])
    elements = [tensor.reshape(-1, 1) for tensors in found for tensor in tensors]
    return torch.cat([element.to(elements[0].device) for element in elements])


def tensors_in(output: Any) -> list[Tensor]:
    """All tensors of a model's output: in containers, in mappings and in the attributes of other objects."""
    found: list[Tensor] = []
    visited: set[int] = set()
    # the queue keeps every object alive meanwhile, so that no id is used twice
    queue = [output]
    for item in queue:
        for leaf in tree_leaves(item):
            if isinstance(leaf, Tensor):
                found.append(leaf)
            elif id(leaf) not in visited and not isinstance(leaf, nn.Module | ModuleType | type):
                visited.add(id(leaf))
                if isinstance(leaf, Mapping):
                    queue.append(list(leaf.values()))
                elif isinstance(leaf, set | frozenset):
                    queue.append(list(leaf))
                elif hasattr(leaf, "__dict__"):
                    queue.append(list(vars(leaf).values()))
    return found


def _require_finite(values: Tensor, what: str, index: int) -> None:
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise CalibrationError(
            f"{what} holds {bad} NaN or infinite value(s) among {values.numel()} in calibration batch {index}; "
            "expected finite values: check that batch, and the range of the model's dtype"
        )
