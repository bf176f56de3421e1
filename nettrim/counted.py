"""From what was captured of a layer to its program with a number of weights: the targets, and the weights that may stay.

Before a ReLU too it is the program without one, for the pre-activations: their discrepancy is no smaller than that of the outputs, and the program
sees ``G`` and ``C`` alone (:mod:`nettrim.aims`, where the formulas of its targets are). What is promised is not what the program is about, but what
its weights leave of the layer's own output, undamped.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nettrim.aims import Aim
from nettrim.budgets import Budget, held_targets, l1_weights, rows_of
from nettrim.grams import column_squares
from nettrim.metrics import Metric
from nettrim.observing import Layer
from nettrim.patterns import NEURON, UNSTRUCTURED, Pattern
from nettrim.programs import LayerProgram
from nettrim.rows import Checked, Stream


def make_selection(
    layer: Layer, *, sparsity: float, pattern: Pattern, repair: float, damping: float, support: Tensor | None, metric: Metric | None
) -> Budget:
    """The programs of one layer that is to have a share ``sparsity`` of zeros in a pattern.

    The bias does not count, is fitted, and is not damped. With ``support``, (M, N) bool, only those weights may stay; in the pattern of neurons it
    says which do. ``metric`` is the program's. The groups of a grouped layer share its number of weights by ``‖a_j‖² w²``, what each
    weight puts out.
    """
    M, N = layer.matrix.shape
    omega = l1_weights(layer, 0.0)
    lean = repair if layer.disturbed or layer.observation.summed else 1.0
    if pattern is NEURON:
        assert support is not None
        kept = [int(support[rows_of(layer, group), :N].sum()) for group in range(layer.groups)]
        pattern = UNSTRUCTURED
    else:
        kept = _shared(layer, pattern, sparsity, support)
    metric = None if metric is None else metric.to(layer.dense)
    aim = None if layer.aims is None else Aim(layer.aims, layer.dense, lean, damping, N, metric)
    programs = []
    for group in range(layer.groups):
        inputs, targets = _rows(layer, group, lean, damping)
        inside = rows_of(layer, group)
        programs.append(
            LayerProgram(
                inputs,
                targets,
                nonzeros=kept[group],
                activation=None,
                l1_weights=omega,
                pattern=pattern.text,
                metric=None if metric is None else metric.of_outputs(inside),
                support=None if support is None else support[inside].to(layer.dense.device),
                moments=None if aim is None else aim.moments,
            )
        )
    return Budget(tuple(programs), None, None, aim)


def _rows(layer: Layer, group: int, repair: float, damping: float) -> tuple[Tensor | Stream, Tensor | Stream]:
    """Inputs and targets of a group's program: tensors where they are held, else streams.

    Where sums over the rows are known, which is all that such a program asks for first, the targets are made only when they are read.
    """
    seen, dense = layer.observation, layer.dense[rows_of(layer, group)]
    more = _damping_rows(layer, group, damping)

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for A, T in _aims(layer, group):
            yield A, T if repair == 1 else torch.lerp(A @ dense.T, T, repair)
        if more is not None:
            yield more, more @ dense.T

    def inputs() -> Iterator[Tensor]:
        return (A for A, _ in pairs())

    def targets() -> Iterator[Tensor]:
        return (T for _, T in pairs())

    if layer.aims is not None and not seen.leaves:
        count = (layer.rows if layer.drawn is None else len(layer.drawn.A)) + (0 if more is None else len(more))
        return Checked(inputs, count, dense.shape[1], dense.dtype, dense.device), Checked(targets, count, len(dense), dense.dtype, dense.device)
    if layer.drawn is None and seen.rows is None:
        return inputs, held_targets(layer, targets)
    held = (layer.drawn or seen.rows)[0][:, seen.columns(group)[0]]  # type: ignore[index]
    return held if more is None else torch.cat([held, more]), torch.cat(list(targets()))


def _aims(layer: Layer, group: int) -> Iterator[tuple[Tensor, Tensor]]:
    """``(Â, A Wᵀ + B − B̂)`` of one group, of the rows that the program is solved on, chunk by chunk."""
    if layer.drawn is None:
        return layer.observation.aims(group)
    inside, outputs = layer.observation.columns(group)
    return ((A[:, inside], T[:, outputs]) for A, T in layer.solved_on(summed=True))


def _damping_rows(layer: Layer, group: int, damping: float) -> Tensor | None:
    """``√δ ‖â_j‖`` of every input ``j`` but the bias's ones, as rows (N, N) or (N, N + 1); None without any."""
    if damping == 0:
        return None
    N = layer.matrix.shape[1]
    if layer.aims is not None:
        squares = layer.aims.G.diagonal()
    else:
        squares = sum((column_squares(A) for A, _ in _aims(layer, group)), start=torch.zeros(()))
    rows = squares.new_zeros(N, N + layer.matrix.has_bias)
    rows.diagonal().copy_((damping * squares[:N]).sqrt())
    return rows.to(layer.dense.dtype)


def _shared(layer: Layer, pattern: Pattern, sparsity: float, support: Tensor | None) -> list[int]:
    """How many weights each group keeps."""
    M, N = layer.matrix.shape
    each = (M // layer.groups, N)
    if layer.groups == 1:
        return [pattern.kept(each, sparsity)]
    if pattern is not UNSTRUCTURED:
        return [pattern.kept(each, sparsity)] * layer.groups
    squares = sum(column_squares(A) for A, _ in layer.solved_on())
    assert isinstance(squares, Tensor)
    of_columns = squares.view(layer.groups, 1, -1)[..., :N].expand(layer.groups, each[0], N).reshape(M, N)
    scores = of_columns * layer.dense[:, :N].double().square()
    if support is not None:
        scores = torch.where(support[:, :N].to(scores.device), scores, -1.0)
    mask = pattern.mask(scores, pattern.kept((M, N), sparsity))
    return [int(count) for count in mask.view(layer.groups, -1).sum(1)]
