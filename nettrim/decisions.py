"""Whether values of tensors are handed to Python, or to code that is not torch's, which may then decide by them what is run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}  # of operations that do so, or whose shapes do
_UNTAGGED = {torch.ops.aten._linalg_check_errors.default, torch.ops.aten._pack_padded_sequence.default}
# what does so without an operation of its own
_FUNCTIONS = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.__repr__, Tensor.__format__, Tensor.tensor_split,
              torch.tensor_split}  # fmt: skip


class Decisions(TorchFunctionMode):
    """Use as a context around a forward pass in which `note` is told of every operation; one that fails, which may be for its values, sets `found`.

    Attributes
    ----------
    found : bool
        Whether values were handed over. Not everything that does so is known: what hangs on a False is to be looked at again.
    """

    found = False

    def note(self, operation: Any, result: Any) -> None:
        if self.found:
            return
        leaves = [leaf for leaf in tree_leaves(result) if leaf is not None]
        plain = bool(leaves) and not any(isinstance(leaf, Tensor) for leaf in leaves)
        known = getattr(operation, "namespace", None) in ("aten", "prim", "prims")
        self.found = plain or not known or operation in _UNTAGGED or bool(_TAGS.intersection(getattr(operation, "tags", ())))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found = self.found or func in _FUNCTIONS
        return func(*args, **(kwargs or {}))
