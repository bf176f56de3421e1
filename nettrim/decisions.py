"""Whether values of tensors are handed to Python, which may then decide by them what is run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_DECIDING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}  # operations that do so, or whose shapes do
_READING = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__}  # and what does so without an operation


class Decisions(TorchFunctionMode):
    """Use as a context around a forward pass in which `note` is told of every operation.

    Attributes
    ----------
    found : bool
        Whether values were handed over since it was last set to False.
    """

    found = False

    def note(self, operation: Any) -> None:
        self.found = self.found or bool(_DECIDING.intersection(getattr(operation, "tags", ())))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found = self.found or func in _READING
        return func(*args, **(kwargs or {}))
