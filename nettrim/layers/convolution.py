"""Convolutions: a row of inputs is the patch that one position of the output reads, a row of weights is a flattened kernel."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nettrim.layers.base import Call, Kind, Part, register


class Geometry(NamedTuple):
    """How the positions of an output are laid over the (padded) input: a number for each dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def dims(self) -> int:
        return len(self.kernel)

    def positions(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """How many there are along each dimension of an input of that size; below 1 where it is smaller than the kernel."""
        return tuple((n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(size, *self, strict=True))


def patches(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...], groups: int) -> Tensor:
    """(B, C, I...) to (B·O..., G, C/G·K...): for each position, its patch of the padded input.

    Positions are in the order of the output's dimensions, and a patch's entries in that of a kernel's.
    """
    dims = len(kernel)
    for i in range(dims):
        x = x.unfold(2 + i, dilation[i] * (kernel[i] - 1) + 1, stride[i])
    x = x[_every(dilation)]
    batch, channels, positions = x.shape[0], x.shape[1], x.shape[2 : 2 + dims]
    order = (0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims))
    return x.permute(order).reshape(batch * math.prod(positions), groups, channels // groups * math.prod(kernel))


def _every(steps: tuple[int, ...]) -> Any:
    """The index that takes every so many entries along the last dimensions."""
    return (..., *(slice(None, None, step) for step in steps))


class Convolutional(Kind):
    """What convolutions and transposed ones share: outputs (B, M, O...), or (M, O...) without a batch."""

    channel = 1

    def unfold(self, module: nn.Module, part: Part, kept: Tensor) -> Tensor:
        return patches(kept, *self.geometry(module), part.groups)

    def geometry(self, module: nn.Module) -> Geometry:
        """How the rows are patches of what is kept of the input."""
        raise NotImplementedError

    def spread(self, module: nn.Module, part: Part, call: Call) -> float:
        """Rows pick entries of the input, so their number of each is all that there is to their spectral norm."""
        with torch.inference_mode(False), torch.enable_grad():
            one = torch.ones_like(_batched(module, call.argument(module))[:1], dtype=torch.float64, requires_grad=True)
            rows = self.unfold(module, part, self.inputs(module, part, Call((one,), {}, _batched(module, call.out)[:1])))
            (times,) = torch.autograd.grad(rows.sum(), one)
        return math.sqrt(float(times.max()))

    def parts(self, module: nn.Module) -> tuple[Part, ...]:
        assert isinstance(module.groups, int)
        return (Part(bias=None if module.bias is None else "bias", groups=module.groups),)

    def outputs(self, module: nn.Module, part: Part, call: Call) -> Tensor:
        out = _batched(module, call.out)
        return out.movedim(1, -1).flatten(0, -2)


def _batched(module: nn.Module, x: Tensor) -> Tensor:
    dims = len(module.kernel_size)  # type: ignore[arg-type]
    return x.unsqueeze(0) if x.dim() == dims + 1 else x


class ConvolutionKind(Convolutional):
    """``nn.Conv1d`` to ``nn.Conv3d``."""

    methods = ("forward", "_conv_forward")

    def inputs(self, module: nn.Module, part: Part, call: Call) -> Tensor:
        """The input as the kernels meet it: padded."""
        x = _batched(module, call.argument(module))
        mode = "constant" if module.padding_mode == "zeros" else str(module.padding_mode)
        return F.pad(x, module._reversed_padding_repeated_twice, mode=mode)  # type: ignore[arg-type]

    def geometry(self, module: nn.Module) -> Geometry:
        return Geometry(module.kernel_size, module.stride, module.dilation)  # type: ignore[arg-type]


class TransposedConvolutionKind(Convolutional):
    """``nn.ConvTranspose1d`` to ``nn.ConvTranspose3d``: a convolution of stride 1, its kernels flipped, over an input spread out by the stride."""

    def to_matrix(self, module: nn.Module, part: Part, weight: Tensor) -> Tensor:
        inputs, outputs = weight.shape[:2]
        grouped = weight.view(part.groups, inputs // part.groups, outputs, *weight.shape[2:]).transpose(1, 2)
        return grouped.flip(*range(3, grouped.dim())).reshape(part.groups * outputs, -1)

    def to_weight(self, module: nn.Module, part: Part, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
        grouped = matrix.reshape(part.groups, shape[1], shape[0] // part.groups, *shape[2:])
        return grouped.flip(*range(3, grouped.dim())).transpose(1, 2).reshape(shape)

    def inputs(self, module: nn.Module, part: Part, call: Call) -> Tensor:
        """The input with ``stride − 1`` zeros between its entries, and as many around as give the output's size."""
        x = _batched(module, call.argument(module))
        size = _batched(module, call.out).shape[2:]
        stride: tuple[int, ...] = module.stride  # type: ignore[assignment]
        spread = x.new_zeros(*x.shape[:2], *((n - 1) * step + 1 for n, step in zip(x.shape[2:], stride, strict=True)))
        spread[_every(stride)] = x
        around: list[int] = []
        options = zip(module.kernel_size, module.dilation, module.padding, size, spread.shape[2:], strict=True)  # type: ignore[arg-type]
        for kernel, dilation, padding, wanted, there in options:
            reach = dilation * (kernel - 1)
            around = [reach - padding, wanted - there + padding, *around]  # F.pad begins with the last dimension
        return F.pad(spread, around)

    def geometry(self, module: nn.Module) -> Geometry:
        kernel: tuple[int, ...] = module.kernel_size  # type: ignore[assignment]
        return Geometry(kernel, (1,) * len(kernel), module.dilation)  # type: ignore[arg-type]


for _convolution in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    register(_convolution)(ConvolutionKind)
for _transposed in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
    register(_transposed)(TransposedConvolutionKind)
