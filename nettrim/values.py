"""What became of a layer's output, stage by stage: a value, the steps it took, and what storages hold it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from nettrim.activations import Activation, Norm

Step = Norm | Activation
Stage = tuple[str, ...]  # the steps that were taken, by name


@dataclass(eq=False)
class Value:
    """The output of one call of a layer, and what became of it: a normalisation, an activation, or one behind the other."""

    layer: str
    layout: tuple[tuple[int, ...], tuple[int, ...]] | None = None  # shape and strides of what the layer put out
    steps: dict[Stage, list[Step]] = field(default_factory=dict)  # the steps that were taken from a stage
    others: dict[Stage, str] = field(default_factory=dict)  # the first other use at a stage
    uses: list[str] = field(default_factory=list)  # every use, whatever the stage, but the steps
    summed: list[Stage] = field(default_factory=list)  # the stages at which it was added to another tensor, entry by entry, laid out as it was

    def used_by(self, what: object, stage: Stage) -> None:
        self.uses.append(str(what))
        self.others.setdefault(stage, str(what))

    def way(self) -> tuple[Step, ...]:
        """The steps that the whole value took, one behind the other, with no other use before the last of them."""
        stage: Stage = ()
        found: list[Step] = []
        while stage not in self.others and self.steps.get(stage):
            first, *rest = self.steps[stage]
            if any(not same_step(first, other) for other in rest):
                break
            found.append(first)
            stage = (*stage, step_name(first))
        return tuple(found)


def same_step(a: Step, b: Step) -> bool:
    """Whether two steps compute the same."""
    if isinstance(a, Norm) and isinstance(b, Norm):
        return a.same_as(b)
    return isinstance(a, Activation) and a == b


def step_name(step: Step) -> str:
    """What a stage is called behind the step."""
    return "norm" if isinstance(step, Norm) else step.name


@dataclass(frozen=True)
class Cell:
    """What a storage holds: a value at some stage, at one place in the storage."""

    value: Value
    stage: Stage
    offset: int
    numel: int
    dtype: torch.dtype
    channel: tuple[int, int] | None  # size and stride of the dimension that counts the layer's outputs, where that is known
    pooled: bool  # maxima of the value: an activation that never falls could as well have come before
    ordered: bool = False  # whether the elements lie in the order in which the layer put them out

    @property
    def active(self) -> bool:
        """Whether an activation was the last step: what comes after is of no matter."""
        return bool(self.stage) and self.stage[-1] != "norm"

    def is_whole(self, tensor: Tensor) -> bool:
        """Whether the tensor covers the value's elements once each, as they are."""
        place = (tensor.storage_offset(), tensor.numel(), tensor.dtype)
        same = place == (self.offset, self.numel, self.dtype)
        return same and _is_dense(tensor) and not tensor.is_neg() and not tensor.is_conj()

    def laid_out_as(self, tensor: Tensor) -> bool:
        """Whether a tensor that is the whole value has the elements where the layer's output had them, but for a reshape of rows without gaps."""
        if not self.ordered or self.value.layout is None:
            return False
        shape, strides = self.value.layout
        return (tuple(tensor.shape), tensor.stride()) == (shape, strides) or (tensor.is_contiguous() and _contiguous(shape) == strides)

    def dimension(self, tensor: Tensor) -> int | None:
        """Which dimension of a tensor that is the whole value counts the layer's outputs; of one output, any of size 1 does."""
        if self.channel is not None and self.channel[0] == 1:
            return 1 if tensor.dim() > 1 and tensor.shape[1] == 1 else None
        places = [i for i in range(tensor.dim()) if (tensor.shape[i], tensor.stride(i)) == self.channel]
        return places[0] if len(places) == 1 else None


def common_way(ways: list[tuple[Step, ...]]) -> tuple[Step, ...]:
    """The steps that all have in common, from the first on."""
    found: list[Step] = []
    for steps in zip(*ways, strict=False):
        if any(not same_step(steps[0], step) for step in steps):
            break
        found.append(steps[0])
    return tuple(found)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a tensor without gaps, its last dimension the innermost."""
    return torch.empty(shape, device="meta").stride()


def _is_dense(tensor: Tensor) -> bool:
    """Whether the tensor's elements lie without gap or overlap, in any order of the dimensions."""
    expected = 1
    for stride, size in sorted((st, si) for si, st in zip(tensor.shape, tensor.stride(), strict=True) if si != 1):
        if stride != expected:
            return False
        expected *= size
    return True
