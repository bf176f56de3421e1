"""What several layers are given and give, taken in one forward pass: one that is made for it, or one that is made for something else.

Everything runs inside `nettrim.passes.evaluation`, and every hook is gone afterwards, whatever happened.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nettrim import capture, layers
from nettrim.calibration import Run, run_batch
from nettrim.capture import Seen
from nettrim.errors import RouteError
from nettrim.layers import Matrix
from nettrim.passes import evaluation
from nettrim.precision import all_finite
from nettrim.recorder import has_storage
from nettrim.sums import Sums


def together(
    model: nn.Module,
    batches: list[Any],
    run: Run,
    matrices: Mapping[str, Matrix],
    *,
    device: torch.device | str | None = None,
    summed: Collection[str] = (),
    place: Callable[[str, str, Tensor], Tensor] | None = None,
    recorded: bool = False,
) -> Iterator[tuple[dict[str, Seen], Any, Sums]]:
    """As `nettrim.capture.kept`, of several layers in one forward pass of each batch; what ``run`` returned; and sums. None of the layers may
    run more than once in a pass.

    Of layers that are given the same input, what is kept of it is one tensor. ``summed`` names those of which it is wanted what they are added to.
    ``place(layer, field of Seen, tensor)`` is to return a copy of a tensor, or what is to be kept of it. With ``recorded`` sums record all layers.
    """
    copied = place if place is not None else lambda name, what, tensor: tensor.clone()
    for index, batch in enumerate(batches):
        sums = Sums({name: matrix.module for name, matrix in matrices.items() if recorded or name in summed}, wanted=summed)
        taking = _Taking(matrices, index, device, copied, sums.aside, summed)
        found = taking.found
        with evaluation(model), ExitStack() as stack:
            stack.enter_context(taking.hooks())
            if sums.modules:
                stack.enter_context(sums.hooks())
                stack.enter_context(sums)
            output = run_batch(model, batch, index, run)
        if len(found) < len(matrices):
            missing = next(name for name in matrices if name not in found)
            raise RouteError(
                f"layer {missing!r} did not run in calibration batch {index}; expected it to run in every batch: leave it out (ignore) or leave out "
                "that batch"
            )
        for name in summed:
            beside = capture.beside(sums, name, matrices[name], taking.calls[name], index, device)
            found[name] = found[name]._replace(beside=copied(name, "beside", beside))
        taking.calls.clear()
        yield found, output, sums


class _Taking:
    """Takes what some layers are given and give in one forward pass; of layers that are given the same input, what is kept of it is one tensor."""

    def __init__(
        self,
        matrices: Mapping[str, Matrix],
        index: int,
        device: torch.device | str | None,
        copied: Callable[[str, str, Tensor], Tensor],
        aside: Callable[[], AbstractContextManager[None]],
        calls_of: Collection[str] = (),
    ) -> None:
        self.found: dict[str, Seen] = {}
        self.calls: dict[str, layers.Call] = {}
        self._matrices, self._index, self._device, self._copied, self._aside, self._calls_of = matrices, index, device, copied, aside, calls_of
        self._given: list[tuple[Any, int, Tensor]] = []  # the inputs themselves: while they are held no other has their memory

    @contextmanager
    def hooks(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.callback(self._given.clear)
            for name, matrix in self._matrices.items():
                stack.callback(matrix.module.register_forward_hook(partial(self._after, name), prepend=True, with_kwargs=True).remove)
            yield

    def _after(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        with self._aside():
            self._take(name, self._matrices[name], layers.Call(args, kwargs, out))

    def _take(self, name: str, matrix: Matrix, call: layers.Call) -> None:
        kind, module, part = matrix.kind, matrix.module, matrix.part
        x = call.argument(module)
        # rows that are made of an input are no other layer's: another kernel, stride or padding makes others of it
        plain = type(kind).inputs is layers.Kind.inputs and type(kind).unfold is layers.Kind.unfold
        plain = plain and not x.is_inference()  # which has no version: what is written into it would not be noticed
        kept = next((kept for y, version, kept in self._given if plain and y is x and version == x._version), None)
        if kept is None:
            kept = kind.inputs(module, part, call).to(device=self._device)
            self._check(kept, f"the input of layer {name!r}")
            kept = self._copied(name, "kept", kept)
            if plain:
                self._given.append((x, x._version, kept))
        Z = kind.outputs(module, part, call).to(device=self._device, dtype=matrix.compute_dtype)
        self._check(Z, f"the output of layer {name!r}")
        self.found[name] = Seen(kept, self._copied(name, "Z", Z))
        if name in self._calls_of:
            self.calls[name] = call

    def _check(self, values: Tensor, what: str) -> None:
        capture.require_finite(values, what, self._index)


class Holding:
    """What the linear layers of a network are given and give, taken in passes that are made for something else, as long as that is little.

    Attributes
    ----------
    batches : list of dict of str to Seen, or None
        By layer. None where it is more than ``limit`` elements, or something that is to be said of a layer when it is looked at by itself.
    """

    def __init__(self, matrices: Mapping[str, Matrix], device: torch.device | str | None, limit: int) -> None:
        self.batches: list[dict[str, Seen]] | None = []
        linear = {name: matrix for name, matrix in matrices.items() if type(matrix.module) is nn.Linear}
        # another has weights that are computed, as where masks are applied
        self._matrices = {name: matrix for name, matrix in linear.items() if layers.parameter_reason(matrix.module) is None}
        self._device, self._left = device, limit

    @contextmanager
    def taking(self, index: int, aside: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
        """Take the batch ``index``, which is run in this context; what is done under ``aside`` is no operation of the network."""
        if self.batches is None:
            yield
            return
        one = _Lenient(self._matrices, index, self._device, self._copy, aside)
        with one.hooks():
            yield
        self.batches = None if one.failed or self._left < 0 else [*self.batches, one.found]

    def _copy(self, name: str, what: str, tensor: Tensor) -> Tensor:
        self._left -= tensor.numel()
        return tensor.clone() if self._left >= 0 else tensor.new_empty(0)


class _Lenient(_Taking):
    """Leaves it to a later look to say what is wrong with a layer."""

    failed = False

    def _take(self, name: str, matrix: Matrix, call: layers.Call) -> None:
        tensors = [call.argument(matrix.module), call.out]
        plain = all(isinstance(x, Tensor) and x.dim() > 1 and has_storage(x) and x.is_floating_point() for x in tensors)
        self.failed = self.failed or not plain or name in self.found  # or it runs a second time
        if not self.failed:
            super()._take(name, matrix, call)

    def _check(self, values: Tensor, what: str) -> None:
        self.failed = self.failed or not all_finite(values)
