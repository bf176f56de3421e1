"""How much to prune, the same rule for every score: the largest share of the least that costs at most a point of accuracy on held-out images."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.neighbours.contract import Outcome, Task, outcome, zeros
from benchmarks.neighbours.models import drop_units, hidden_units
from nettrim import penalties

TOLERANCE = 0.01  # of accuracy, before the retraining
HALVINGS = 7

Scores = dict[str, Tensor]


def kept_by_share(scores: Scores, share: float, *, by_layer: bool) -> Scores:
    """Which entries stay when the ``share`` of least score goes: of each tensor, or of all together. At least one of each tensor stays.

    Parameters
    ----------
    scores : dict of str to Tensor
    share : float
    by_layer : bool

    Returns
    -------
    dict of str to Tensor
        bool, of the same shapes.
    """
    flat = torch.cat([score.flatten() for score in scores.values()])
    order = torch.empty_like(flat, dtype=torch.long)
    order[flat.argsort()] = torch.arange(len(flat))
    kept, start = {}, 0
    for name, score in scores.items():
        ranks = order[start : start + score.numel()]
        start += score.numel()
        if by_layer:
            ranks = torch.empty_like(ranks).scatter_(0, score.flatten().argsort(), torch.arange(score.numel()))
        mask = ranks >= round(share * (score.numel() if by_layer else len(flat)))
        mask[score.argmax()] = True
        kept[name] = mask.view(score.shape)
    return kept


def largest_share(
    task: Task, model: nn.Module, prune: Callable[[nn.Module, float], None], *, tolerance: float = TOLERANCE
) -> tuple[nn.Module, float]:
    """Prune a copy by the largest share, found by bisection, that loses at most ``tolerance`` of held-out accuracy; 0 where every share loses more.

    Parameters
    ----------
    task : Task
    model : nn.Module
    prune : callable(model, share)
        In place.
    tolerance : float

    Returns
    -------
    tuple of (nn.Module, float)
        The pruned copy, and the share.
    """
    floor = task.held_accuracy(model) - tolerance
    low, high = 0.0, 1.0
    best = copy.deepcopy(model)
    for _ in range(HALVINGS):
        share = (low + high) / 2
        tried = copy.deepcopy(model)
        prune(tried, share)
        if task.held_accuracy(tried) >= floor:
            low, best = share, tried
        else:
            high = share
    return best, low


def prune_weights(
    task: Task, model: nn.Module, score: Callable[[Tensor], Tensor], *, by_layer: bool = False, retrain: bool = True
) -> Outcome:
    """Prune weights by a score of them, then retrain with the zeros held.

    Parameters
    ----------
    task : Task
    model : nn.Module
    score : callable(Tensor) -> Tensor
        Of a layer's weight; the least go first.
    by_layer : bool
        The same share of each layer, or of all.
    retrain : bool

    Returns
    -------
    Outcome
    """
    scores = {name: score(weight) for name, weight in penalties.weights(model).items()}

    @torch.no_grad()
    def prune(target: nn.Module, share: float) -> None:
        kept = kept_by_share(scores, share, by_layer=by_layer)
        for name, weight in penalties.weights(target).items():
            weight.mul_(kept[name])

    pruned, share = largest_share(task, model, prune)
    if retrain:
        task.fit(pruned, task.retraining, masks=zeros(pruned), learning_rate=5e-4)
    return outcome(pruned, share=share)


def prune_units(task: Task, model: nn.Module, scores: Scores, *, by_layer: bool = False, retraining: int | None = None) -> Outcome:
    """Prune whole hidden units of a chain by their scores, with what reads them, then retrain with the zeros held.

    Parameters
    ----------
    task : Task
    model : nn.Module
    scores : dict of str to Tensor, each of shape (units,)
        By layer; layers that are not named keep all their units.
    by_layer : bool
    retraining : int, optional
        Epochs; the task's if not given.

    Returns
    -------
    Outcome
    """
    readers = dict(hidden_units(model))

    def prune(target: nn.Module, share: float) -> None:
        for name, kept in kept_by_share(scores, share, by_layer=by_layer).items():
            drop_units(target, name, readers[name], kept)

    pruned, share = largest_share(task, model, prune)
    task.fit(pruned, task.retraining if retraining is None else retraining, masks=zeros(pruned), learning_rate=5e-4)
    return outcome(pruned, share=share)
