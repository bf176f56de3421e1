"""``nn.Linear``, and the layer of GPT-2 that holds its weights the other way round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nettrim.layers.base import Call, Kind, Part, register


@register(nn.Linear)
class LinearKind(Kind):
    """Rows in, rows out: the defaults."""


@register("transformers.pytorch_utils.Conv1D")
class TransposedKind(Kind):
    """Hugging Face's ``Conv1D``: a linear layer whose weight is (inputs, outputs)."""

    def to_matrix(self, module: nn.Module, part: Part, weight: Tensor) -> Tensor:
        return weight.T

    def to_weight(self, module: nn.Module, part: Part, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
        return matrix.T


def is_linear(kind: Kind) -> bool:
    """Whether a kind is one of these two, of which it is known what their modules compute: one output row for every row, and nothing else."""
    return type(kind) in (LinearKind, TransposedKind)


def silent(module: nn.Module, outputs: int) -> Callable[..., Any]:
    """A forward for a module of such a kind that computes nothing: zeros where its output would be, for a pass in which that is of no matter.

    Where the output would have another dtype or layout, or the input is one that the module refuses, it computes.
    """
    own: Callable[..., Any] = module.forward
    weight = module.get_parameter("weight")

    def forward(*args: Any, **kwargs: Any) -> Any:
        x = Call(args, kwargs, None).argument(module)
        if not x.is_contiguous() or x.dtype != weight.dtype or x.shape[-1] != weight.numel() // outputs or torch.is_autocast_enabled(x.device.type):
            return own(*args, **kwargs)
        return x.new_zeros(*x.shape[:-1], outputs)

    return forward
