"""``nn.MultiheadAttention``: the projections of query, key and value, packed or not, and the one of the output.

Its inner layers never run as modules, and on some paths its own weights are read without them; so it is its own forward that is observed. What the
output projection is given is found by running that forward once more with the identity in the projection's place.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nettrim.layers.base import Call, Kind, Part, register

_INPUTS = {"q": "query", "k": "key", "v": "value"}


@register(nn.MultiheadAttention)
class AttentionKind(Kind):
    """Four matrices: ``in_proj_q``, ``in_proj_k``, ``in_proj_v`` and ``out_proj``."""

    observed = False

    def refuses_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        if any(isinstance(x, Tensor) and x.is_nested for x in (*args, *kwargs.values())):
            return "it is given nested tensors; give padded ones, and a mask"
        return None

    def parts(self, module: nn.Module) -> tuple[Part, ...]:
        width: int = module.embed_dim  # type: ignore[assignment]
        packed = module.in_proj_weight is not None
        bias = None if module.in_proj_bias is None else "in_proj_bias"
        found = []
        for place, letter in enumerate(_INPUTS):
            rows = slice(place * width, (place + 1) * width)
            weight = "in_proj_weight" if packed else f"{letter}_proj_weight"
            found.append(Part(f"in_proj_{letter}", weight, bias, rows if packed else None, rows))
        out_bias = None if module.out_proj.bias is None else "out_proj.bias"  # type: ignore[union-attr]
        return (*found, Part("out_proj", "out_proj.weight", out_bias))

    def inputs(self, module: nn.Module, part: Part, call: Call) -> Tensor:
        if part.label == "out_proj":
            return _before_projection(module, call)
        return call.argument(module, _INPUTS[part.label[-1]]).flatten(0, -2)

    def outputs(self, module: nn.Module, part: Part, call: Call) -> Tensor:
        if part.label == "out_proj":
            return call.out[0].flatten(0, -2)
        weight = module.get_parameter(part.weight)
        bias = None if part.bias is None else module.get_parameter(part.bias)[part.bias_rows]
        return F.linear(self.inputs(module, part, call), weight if part.rows is None else weight[part.rows], bias)


def _before_projection(module: nn.Module, call: Call) -> Tensor:
    """The concatenated heads, (tokens, E), as the module's own forward makes them."""
    bare = copy.copy(module)
    bare._parameters = dict(module._parameters)
    weight: Tensor = module.out_proj.weight  # type: ignore[union-attr,assignment]
    identity = nn.Linear(weight.shape[1], weight.shape[1], bias=False, device="meta")  # which draws nothing from the process's generator
    identity.weight = nn.Parameter(torch.eye(weight.shape[1], device=weight.device, dtype=weight.dtype), requires_grad=False)
    bare._modules = {**module._modules, "out_proj": identity}
    return type(module).forward(bare, *call.args, **call.kwargs)[0].flatten(0, -2)
