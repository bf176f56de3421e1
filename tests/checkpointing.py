"""What the tests of checkpoint folders share: a network, and how to look at a result and at a folder."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from networks import chain, same_bits, samples, state_of
from torch import nn

from nettrim import PruneResult

INPUTS = samples(60, 8)


def model() -> nn.Sequential:
    return chain(8, 12, 6, 4)


def heavier() -> nn.Module:
    """The same network with one weight a rounding larger."""
    other = model()
    with torch.no_grad():
        other[2].weight[0, 0] = torch.nextafter(other[2].weight[0, 0], torch.tensor(9.0))
    return other


def same(a: PruneResult, b: PruneResult) -> bool:
    return (
        same_bits(state_of(a.model), state_of(b.model))
        and same_bits(a.masks, b.masks)
        and a.report.certificate == b.report.certificate
        and a.report.skipped == b.report.skipped
        and [layer.discrepancy for layer in a.report.layers] == [layer.discrepancy for layer in b.report.layers]
    )


def state(result: PruneResult) -> dict[str, Any]:
    found = result.report.options["checkpoint"]
    assert isinstance(found, dict)
    return found


def files(folder: Path) -> list[Path]:
    """The layers' files, in the order in which they were written."""
    return sorted(folder.glob("execution-*/*"), key=lambda path: path.stat().st_mtime_ns)


def in_fresh_process(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a function of a module returns in a new process: one that forks must not have had threads, as this one has had.

    MKL's list of buffers is not whole in a child that was forked after another thread multiplied matrices: its first product may never end.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return pool.submit(function, *args, **kwargs).result()
