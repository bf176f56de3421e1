"""2:4 weights as NVIDIA's sparse tensor cores read them: torch's rules, asked before torch is, because torch drops what breaks the pattern.

``torch.sparse.to_sparse_semi_structured`` keeps two of four values and does not look at the others. Of float32 it keeps one of two, multiplies
in TF32, and its way back changes low bits (torch 2.13, on a CPU), so that only the halves are converted here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

CAPABILITY = (8, 0)  # Ampere, the first with sparse tensor cores


def refusal(weight: Tensor) -> str | None:
    """Why weights (M, N) have no semi-structured form on any device; None where they have one.

    Parameters
    ----------
    weight : Tensor
        Its values are read: there are to be at most 2 nonzeros in every 4 along the inputs.
    """
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return f"{weight.dtype} has no form of 2:4; float16 and bfloat16 have: convert the network first, as with model.to(torch.bfloat16)"
    backends = (SparseSemiStructuredTensorCUTLASS, SparseSemiStructuredTensorCUSPARSELT)
    rules = [backend._DTYPE_SHAPE_CONSTRAINTS[weight.dtype] for backend in backends]
    rows, columns = min((rule.sparse_min_rows, rule.sparse_min_cols) for rule in rules)
    if weight.dim() != 2 or any(size == 0 or size % least for size, least in zip(weight.shape, (rows, columns), strict=True)):
        return f"its shape {tuple(weight.shape)} is no multiple of ({rows}, {columns}), which {weight.dtype} needs"
    broken = int(((weight.detach() != 0).unflatten(1, (-1, 4)).sum(2) > 2).sum())
    if broken:
        return f"{broken} groups of 4 inputs hold more than 2 nonzeros: prune with pattern='2:4'"
    return None


def convert(linear: nn.Linear) -> nn.Linear | str:
    """The layer with its weight in torch's semi-structured form, or why there is none.

    Parameters
    ----------
    linear : nn.Linear
        Left as it is.
    """
    weight = linear.weight.detach()
    if weight.device.type != "cuda":
        return f"semi-structured weights are for CUDA devices, and it is on {weight.device.type!r}"
    capability = torch.cuda.get_device_capability(weight.device)
    if capability < CAPABILITY:
        return f"the device has compute capability {capability}; sparse tensor cores come with {CAPABILITY}"
    reason = refusal(weight)
    if reason is not None:
        return reason
    try:
        packed = torch.sparse.to_sparse_semi_structured(weight.contiguous())
        same = torch.equal(packed.to_dense(), weight)
    except RuntimeError as error:
        return f"torch refused it: {error}"
    if not same:
        return "torch's semi-structured form holds other values"
    sparse = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    sparse.weight = nn.Parameter(packed, requires_grad=False)
    if linear.bias is not None:
        sparse.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
    return sparse.train(linear.training)


def is_converted(module: nn.Module) -> bool:
    """Whether the layer is one that :func:`convert` made."""
    return isinstance(module, nn.Linear) and isinstance(module._parameters.get("weight"), torch.sparse.SparseSemiStructuredTensor)
