"""What flows through the network: a layer's inputs and pre-activations as rows, and the network's outputs.

Everything runs inside `nettrim.passes.evaluation`, and every hook is gone afterwards, whatever happened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nettrim import layers
from nettrim.calibration import Run, run_batch
from nettrim.errors import CalibrationError, RouteError
from nettrim.layers import Matrix
from nettrim.layers.linear import is_linear, silent
from nettrim.passes import Stop, evaluation, replaced, tensors_in
from nettrim.precision import all_finite
from nettrim.sums import Sums


class Seen(NamedTuple):
    """What was seen of a layer in one batch.

    Attributes
    ----------
    kept : Tensor
        What the layer's kind keeps of the input (`nettrim.layers.Kind.inputs`), in its own dtype; or what is made of that where it is taken
        (``place`` of `nettrim.taking.together`).
    Z : Tensor, (P, M)
        Pre-activations in the compute dtype: what the layer returned, before anything changed it.
    beside : Tensor or None, (P, M)
        What it is added to, where that was asked for, in the compute dtype. None of them shares memory with the model.
    """

    kept: Tensor
    Z: Tensor
    beside: Tensor | None = None


def kept(
    model: nn.Module,
    batches: list[Any],
    run: Run,
    matrix: Matrix,
    *,
    device: torch.device | str | None = None,
    summed: bool = False,
    given: bool = False,
    within: Callable[[int], AbstractContextManager[None]] | None = None,
) -> Iterator[Seen]:
    """What a layer is given and what it gives, batch by batch.

    Parameters
    ----------
    model : nn.Module
        The network; every forward pass ends as soon as the layer has run, or its sum.
    batches : list
        As `nettrim.calibration.batches` returns them.
    run : callable(model, batch)
        As `nettrim.calibration.runner` returns it.
    matrix : Matrix
        Of a supported submodule of `model`.
    device : optional
        Where the results are; the layer's device by default.
    summed : bool
        Whether what the layer's output is added to is wanted.
    given : bool
        Whether only what the layer is given is wanted, and what it is added to: ``Z`` is then empty, and the layer need not be computed.
    within : callable(batch's index), optional
        A context that each forward pass is to run in.

    Yields
    ------
    Seen

    Raises
    ------
    CalibrationError
        A batch that the model cannot run or in which the layer does not run, or is not added to anything though that is wanted, or NaN or
        infinity in the layer's input or output; the layer and the batch are named.
    """
    module, kind, part = matrix.module, matrix.kind, matrix.part
    name = matrix.name_in(next((name for name, child in model.named_modules() if child is module), type(module).__name__))
    seen: list[Seen] = []
    calls: list[layers.Call] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        call = layers.Call(args, kwargs, out)
        x = kind.inputs(module, part, call)
        # copies: a model that catches even `Stop` goes on and may change both in place
        kept = x.to(device=device, copy=True)
        if given:
            seen.append(Seen(kept, kept.new_empty(0)))
        else:
            seen.append(Seen(kept, kind.outputs(module, part, call).to(device=device, dtype=matrix.compute_dtype, copy=True)))
        calls[:] = [call]
        if not kind.repeats and not summed:
            raise Stop

    for index, batch in enumerate(batches):
        seen.clear()
        sums = Sums({name: module} if summed else {}, stop=True)
        with evaluation(model), ExitStack() as stack:
            # first among the forward hooks, so that it sees the layer's own output and not what another hook made of it
            stack.callback(module.register_forward_hook(hook, prepend=True, with_kwargs=True).remove)
            if within is not None:
                stack.enter_context(within(index))
            if given and is_linear(kind):  # what is beside its output in a sum does not depend on that
                stack.enter_context(replaced(module, silent(module, matrix.shape[0])))
            if summed:
                stack.enter_context(sums.hooks())
                stack.enter_context(sums)
            try:
                run_batch(model, batch, index, run)
            except Stop:
                pass
        if not seen:
            raise RouteError(
                f"layer {name!r} did not run in calibration batch {index}; expected it to run in every "
                "batch: leave it out (ignore) or leave out that batch"
            )
        for call in seen:
            for what, values in (("input", call.kept), ("output", call.Z)):
                require_finite(values, f"the {what} of layer {name!r}", index)
        if kind.repeats:
            yield Seen(torch.cat([call.kept for call in seen]), torch.cat([call.Z for call in seen]))
        else:
            yield seen[0]._replace(beside=beside(sums, name, matrix, calls[0], index, device) if summed else None)
        calls.clear()


def beside(sums: Sums, name: str, matrix: Matrix, call: layers.Call, index: int, device: torch.device | str | None) -> Tensor:
    """What the layer's output was added to, in the order of its rows."""
    other = sums.beside.get(name)
    if other is None:
        raise RouteError(
            f"the output of layer {name!r} is added to another tensor in the dense network, and not in calibration batch {index} of the pruned one: "
            "leave the layer out (ignore)"
        )
    rows = matrix.kind.outputs(matrix.module, matrix.part, layers.Call(call.args, call.kwargs, other.reshape(call.out.shape)))
    require_finite(rows, f"what the output of layer {name!r} is added to", index)
    return rows.to(device=device, dtype=matrix.compute_dtype)


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
    for seen in kept(model, batches, run, matrix, device=device):
        unfolded = matrix.kind.unfold(matrix.module, matrix.part, seen.kept.to(matrix.compute_dtype))
        pieces.append((matrix.with_ones(unfolded), seen.Z))
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
    found = Outputs()
    with evaluation(model):
        for index, batch in enumerate(batches):
            found.add(run_batch(model, batch, index, run), index)
    return found.joined()


class Outputs:
    """What a network returns, batch by batch, as `outputs` joins it."""

    def __init__(self) -> None:
        self._found: list[list[Tensor]] = []

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, output: Any, index: int) -> None:
        """Of batch ``index``; the errors are those of `outputs`."""
        tensors = comparable(output, index)
        wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
        self._found.append([tensor.to(wide, copy=True) for tensor in tensors])

    def joined(self) -> Tensor:
        """All of them; see `outputs`."""
        found = self._found
        widths = {tensors[0].shape[-1] for tensors in found if len(tensors) == 1 and tensors[0].dim() > 1}
        if len(widths) == 1 and all(len(tensors) == 1 and tensors[0].dim() > 1 for tensors in found):
            return torch.cat([tensors[0].flatten(0, -2) for tensors in found])
        elements = [tensor.reshape(-1, 1) for tensors in found for tensor in tensors]
        return torch.cat([element.to(elements[0].device) for element in elements])


def comparable(output: Any, index: int) -> list[Tensor]:
    """The floating-point tensors in what a network returned of batch ``index``; the errors are those of `outputs`."""
    tensors = [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]
    if not tensors:
        raise CalibrationError(
            f"the network returned a {type(output).__name__} without a floating-point tensor for batch {index}; expected outputs that can be "
            "compared: give a forward_fn that returns them"
        )
    for tensor in tensors:
        require_finite(tensor, "the network's output", index)
    return tensors


def require_finite(values: Tensor, what: str, index: int) -> None:
    """Refuse NaN and infinity in ``what`` of batch ``index``."""
    if not all_finite(values):
        bad = int((~torch.isfinite(values)).sum())
        raise CalibrationError(
            f"{what} holds {bad} NaN or infinite value(s) among {values.numel()} in calibration batch {index}; "
            "expected finite values: check that batch, and the range of the model's dtype"
        )
