"""Sparsity patterns: which sets of weights may be kept, and the nearest point to a matrix with such a set."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from nettrim.errors import ArgumentError

_SMALL = 16  # scores of a group, up to which comparing all pairs is faster than a sort


def largest(scores: Tensor, count: int) -> Tensor:
    """Where the ``count`` largest of the scores (K,) are: bool, with exactly so many True; of equal ones the first."""
    if not 0 < count < scores.numel():
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    if scores.device.type == "cpu":  # numpy selects and compares many times as fast as torch
        values, cut = scores.numpy(), scores.numel() - count
        threshold = float(np.partition(values, cut)[cut])
        chosen = torch.from_numpy(values >= threshold)
    else:
        threshold = float(scores.topk(count).values[-1])
        chosen = scores >= threshold
    if (over := int(chosen.count_nonzero()) - count) > 0:
        equal = (scores == threshold).nonzero()
        chosen[equal[len(equal) - over :]] = False
    return chosen


def first_of_groups(groups: Tensor, count: int) -> Tensor:
    """Where the ``count`` largest scores of each group (.., m) are: bool; of equal ones the first."""
    if groups.device.type != "cpu" or groups.shape[-1] > _SMALL:
        best = groups.argsort(dim=-1, descending=True, stable=True)[..., :count]
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True)
    # every score counts those that it is behind: for small groups several times as fast as a sort
    scores = groups.movedim(-1, 0).contiguous().numpy()
    behind = np.zeros(scores.shape, dtype=np.uint8)
    for later in range(1, len(scores)):
        for earlier in range(later):
            leads = (scores[earlier] >= scores[later]).view(np.uint8)
            behind[later] += leads
            behind[earlier] += 1 - leads
    return torch.from_numpy(np.stack(list(behind < count), -1))


@dataclass(frozen=True)
class Pattern:
    """A set of allowed supports of an (M, N) weight matrix.

    Attributes
    ----------
    text : str
        As it was given: ``"unstructured"``; ``"n:m"``, n kept of every m along the inputs (other tools count the zeros); ``"block:RxC"``, whole
        blocks of R outputs by C inputs; ``"neuron"``, whole outputs.
    kept_of : (int, int) or None
        n and m.
    block : (int, int)
        R and C; (1, 1) where every weight is on its own, and C is 0 for the whole width.
    """

    text: str
    kept_of: tuple[int, int] | None
    block: tuple[int, int]

    @property
    def share(self) -> float | None:
        """Share of the weights that the pattern itself keeps; None where a sparsity says it."""
        return None if self.kept_of is None else self.kept_of[0] / self.kept_of[1]

    @property
    def single(self) -> bool:
        """Whether every weight is on its own."""
        return self.kept_of is None and self.block == (1, 1)

    def check(self, shape: tuple[int, int], what: str) -> None:
        """Refuse a shape that the pattern does not tile.

        Raises
        ------
        ArgumentError
            Naming ``what`` has it.
        """
        M, N = shape
        rows, columns = (1, self.kept_of[1]) if self.kept_of is not None else self.block_of(N)
        if M % rows or N % columns:
            raise ArgumentError(
                f"{what} has weights of shape {shape}, which pattern={self.text!r} does not tile; expected outputs divisible by {rows} and inputs by "
                f"{columns}: leave the layer out (ignore) or choose another pattern"
            )

    def block_of(self, width: int) -> tuple[int, int]:
        """R and C for weights of so many inputs."""
        return self.block[0], self.block[1] or max(width, 1)

    def kept(self, shape: tuple[int, int], sparsity: float) -> int:
        """How many weights are kept at a sparsity: the nearest number there can be, halves kept."""
        size = math.prod(self.block_of(shape[1]))
        total = math.prod(shape)
        if self.kept_of is not None:
            return total // self.kept_of[1] * self.kept_of[0]
        return math.floor((1 - sparsity) * total / size + 0.5 + 1e-9) * size

    def mask(self, scores: Tensor, kept: int) -> Tensor:
        """The allowed support of ``kept`` weights with the largest sum of scores: (M, N) bool, with exactly so many True.

        For scores ``x²`` this is the support of the nearest allowed matrix to ``x``.
        """
        M, N = scores.shape
        if self.kept_of is not None:
            n, m = self.kept_of
            return first_of_groups(scores.view(M, N // m, m), n).view(M, N)
        R, C = self.block_of(N)
        if (R, C) == (1, 1):
            return largest(scores.flatten(), kept).view(M, N)
        sums = scores.view(M // R, R, N // C, C).sum((1, 3))
        chosen = largest(sums.flatten(), kept // (R * C))
        return chosen.view(sums.shape).repeat_interleave(R, 0).repeat_interleave(C, 1)

    def allows(self, mask: Tensor) -> bool:
        """Whether a support (M, N) is one of the pattern's, or part of one."""
        M, N = mask.shape
        if self.kept_of is not None:
            n, m = self.kept_of
            return bool((mask.view(M, N // m, m).sum(2) <= n).all())
        return True


UNSTRUCTURED = Pattern("unstructured", None, (1, 1))
NEURON = Pattern("neuron", None, (1, 0))


def parse(text: object) -> Pattern:
    """A pattern from its text.

    Raises
    ------
    ArgumentError
        It is none.
    """
    if text == "unstructured":
        return UNSTRUCTURED
    if text == "neuron":
        return NEURON
    found = re.fullmatch(r"(\d+):(\d+)|block:(\d+)x(\d+)", text) if isinstance(text, str) else None
    if found is not None:
        n, m, rows, columns = (None if group is None else int(group) for group in found.groups())
        if n is not None and m is not None and 0 < n <= m:
            return Pattern(str(text), (n, m), (1, 1))
        if rows and columns:
            return Pattern(str(text), None, (rows, columns))
    raise ArgumentError(
        f"pattern={text!r}; expected 'unstructured', 'n:m' (n kept of every m inputs, as '2:4'), 'block:RxC' (as 'block:4x4') or 'neuron'"
    )


@dataclass(frozen=True, eq=False)
class Supports:
    """The supports that a program allows.

    Attributes
    ----------
    pattern : Pattern
    kept : int
        How many of the counted weights may be kept.
    counted : Tensor, (N,) bool
        The columns that count; of the others (a free bias) every weight is kept.
    allowed : Tensor or None, (M, N) bool
        Where only some weights may be kept at all.
    """

    pattern: Pattern
    kept: int
    counted: Tensor
    allowed: Tensor | None

    @cached_property
    def _free(self) -> Tensor:
        """Indices of the columns that do not count."""
        return (~self.counted).nonzero().flatten()

    def nearest(self, scores: Tensor) -> Tensor:
        """The support (M, N) with the largest sum of the ``scores``, all at least 0."""
        if self.allowed is not None:
            scores = torch.where(self.allowed, scores, -1.0)
        if len(self._free) == 0:
            mask = self.pattern.mask(scores, self.kept)
        elif self.pattern.single:  # what does not count leads
            leading = scores.clamp(max=torch.finfo(scores.dtype).max).index_fill_(1, self._free, torch.inf)
            mask = self.pattern.mask(leading, self.kept + len(self._free) * len(scores))
        else:
            mask = torch.ones_like(scores, dtype=torch.bool)
            mask[:, self.counted] = self.pattern.mask(scores[:, self.counted], self.kept)
        return mask if self.allowed is None else mask & self.allowed

    def within(self, columns: Tensor) -> Supports | None:
        """Those that lie in some of the columns, given by their indices, as supports of these alone; None where the pattern takes columns together.
        """
        if not self.pattern.single:
            return None
        counted, allowed = self.counted[columns], None if self.allowed is None else self.allowed[:, columns]
        return dataclasses.replace(self, counted=counted, allowed=allowed)

    def count(self, W: Tensor) -> int:
        """Nonzeros of (M, N) weights, those in columns that count."""
        return int(W[:, self.counted].count_nonzero())

    def excess(self, W: Tensor) -> float:
        """By what share weights have more nonzeros than may be kept; infinite where they break the pattern, or hold one that may not be kept."""
        mask = W != 0
        if not self.pattern.allows(mask[:, self.counted]) or (self.allowed is not None and bool((mask & ~self.allowed).any())):
            return math.inf
        return max(0.0, (self.count(W) - self.kept) / max(self.kept, 1))


def make_supports(text: str, nonzeros: int | None, counted: Tensor, shape: tuple[int, int], allowed: Tensor | None) -> Supports:
    """The supports of a program of ``shape`` (M, N): ``nonzeros`` of its ``counted`` columns (all of them for None) in the pattern ``text``.

    Raises
    ------
    ArgumentError
        The pattern does not tile the weights, or there is no such number of them.
    """
    pattern = parse(text)
    inner = (shape[0], int(counted.sum()))
    pattern.check(inner, "the program")
    total = math.prod(inner)
    possible = total if pattern.share is None else pattern.kept(inner, 0.0)
    kept = possible if nonzeros is None else nonzeros
    if isinstance(kept, bool) or not isinstance(kept, int) or not 0 <= kept <= total:
        raise ArgumentError(f"nonzeros={kept!r}; expected a whole number from 0 to {total}, the weights that count")
    if pattern.share is not None and kept != possible:
        raise ArgumentError(f"nonzeros={kept} with pattern={text!r}, which keeps {possible}; leave nonzeros at that")
    size = math.prod(pattern.block_of(inner[1]))
    if kept % size:
        raise ArgumentError(f"nonzeros={kept} with pattern={text!r}; expected a multiple of {size}")
    if nonzeros is None and pattern is not UNSTRUCTURED:
        raise ArgumentError(f"pattern={text!r} was given without nonzeros; a budget spends its zeros one by one: use pattern='unstructured'")
    return Supports(pattern, kept, counted, allowed)
