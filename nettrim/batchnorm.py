"""The running statistics of BatchNorms, estimated again on the calibration data: pruning has moved what they are statistics of."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nettrim.calibration import Run, run_batch
from nettrim.errors import ArgumentError
from nettrim.passes import evaluation


def _norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None and module.running_var is not None
    ]


def require(model: nn.Module) -> None:
    """Refuse a model without running statistics.

    Raises
    ------
    ArgumentError
    """
    if not _norms(model):
        raise ArgumentError("recalibrate_batchnorm=True, but the model has no BatchNorm with running statistics; leave it at False")


def recalibrate(model: nn.Module, batches: list[Any], run: Run) -> None:
    """Replace running means and variances, in place, by the averages of the batches' own, each batch normalised by itself meanwhile.

    Everything else stays as it was: training flags, momenta, counters, other buffers.

    Raises
    ------
    CalibrationError
        A batch that the model cannot run so (one value a channel has no variance). The statistics are then as they were.
    """
    norms = _norms(model)
    momenta = [norm.momentum for norm in norms]
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    with evaluation(model):
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the plain average of all batches
                norm.training = True
            for index, batch in enumerate(batches):
                run_batch(model, batch, index, run)
            found = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]  # type: ignore[union-attr]
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    # `evaluation` has put all buffers back
    for norm, (mean, variance) in zip(norms, found, strict=True):
        norm.running_mean.copy_(mean)  # type: ignore[union-attr]
        norm.running_var.copy_(variance)  # type: ignore[union-attr]


def transfer(source: nn.Module, target: nn.Module) -> None:
    """Copy the running statistics of one network into another of the same form."""
    for there, here in zip(_norms(source), _norms(target), strict=True):
        here.running_mean.copy_(there.running_mean)  # type: ignore[union-attr,arg-type]
        here.running_var.copy_(there.running_var)  # type: ignore[union-attr,arg-type]
