"""Calibration data: a list of batches, which samples are kept out, and how a batch is handed to the model.

Samples lie along the first dimension. The first tensor of a batch says how many there are, and every tensor of the
batch with as many entries along its first dimension is taken to hold one entry a sample.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, Dataset

from nettrim.errors import ArgumentError, CalibrationError, NetTrimError
from nettrim.surroundings import callers_device

SAMPLES_PER_CHUNK = 1024
LABEL_NAMES = frozenset({"label", "labels", "target", "targets"})

Run = Callable[[nn.Module, Any], Any]


def batches(calibration: Any) -> list[Any]:
    """Materialise calibration data as a list of batches of torch tensors.

    Parameters
    ----------
    calibration : Tensor, numpy array, tuple, mapping, Dataset, or iterable of batches
        A tensor, a tuple (``(inputs, labels)`` or several inputs) or a mapping is *one* batch; it is cut along the
        first dimension into pieces of 1024 samples, so that memory stays bounded. A list, a generator or a DataLoader
        is a sequence of batches (each a tensor, a tuple or list, or a mapping), read once and kept as they come. A
        torch `Dataset` is read through a DataLoader, 1024 samples a batch. How a batch is given to the model, and when
        labels are ignored: see `runner`.

    Returns
    -------
    list
        Batches with at least one sample each; arrays are torch tensors, mappings are dicts.

    Raises
    ------
    CalibrationError
        No sample at all, a batch without a tensor, or batches that do not fit together: another number of tensors,
        another number of dimensions, or, for floating-point inputs, another shape of a sample. (Batches of tokens may
        differ in length.)
    """
    if isinstance(calibration, Dataset):
        calibration = DataLoader(calibration, batch_size=SAMPLES_PER_CHUNK)
    if isinstance(calibration, Tensor | np.ndarray | tuple | Mapping):
        whole = _as_tensors(calibration, 0)
        found = [whole] if sample_count(whole) <= SAMPLES_PER_CHUNK else _chunks(whole)
    elif isinstance(calibration, Iterable) and not isinstance(calibration, str | bytes):
        found = [_as_tensors(batch, index) for index, batch in enumerate(calibration)]
    else:
        raise CalibrationError(
            f"got calibration data of type {type(calibration).__name__}; expected a tensor, a tuple or dict batch, or "
            "an iterable of batches such as a list or a DataLoader"
        )
    filled = {index: batch for index, batch in enumerate(found) if sample_count(batch)}
    if not filled:
        raise CalibrationError("got no calibration sample; expected at least one: is the iterable already used up?")
    _check_alike(filled)
    return list(filled.values())


def _as_tensors(batch: Any, index: int) -> Any:
    def convert(leaf: Any) -> Any:
        try:
            return torch.tensor(leaf) if isinstance(leaf, np.ndarray) else leaf
        except TypeError as error:
            raise CalibrationError(f"batch {index} holds an array of dtype {leaf.dtype}; expected numbers") from error

    batch = tree_map(convert, dict(batch) if isinstance(batch, Mapping) else batch)
    if _first(batch) is None:
        raise CalibrationError(
            f"batch {index} is a {type(batch).__name__} without a tensor of samples ({describe(batch)}); expected "
            "a tensor, or a tuple, list or dict that holds tensors with the samples along the first dimension"
        )
    return batch


def _first(batch: Any) -> Tensor | None:
    return next((leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim() > 0), None)


def sample_count(batch: Any) -> int:
    """Number of samples of a batch: the first dimension of its first tensor."""
    first = _first(batch)
    return 0 if first is None else first.shape[0]


def describe(batch: Any) -> str:
    """Dtypes and shapes of what a batch holds, for messages."""
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')} {tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{key}: {describe(value)}" for key, value in batch.items()) + "}"
    if isinstance(batch, tuple | list):
        return "(" + ", ".join(describe(value) for value in batch) + ")"
    return type(batch).__name__


def take(batch: Any, index: Tensor | slice) -> Any:
    """The samples `index` of a batch, in every tensor that holds one entry a sample."""
    count = sample_count(batch)
    return tree_map(
        lambda leaf: leaf[index] if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == count else leaf, batch
    )


def _chunks(batch: Any) -> list[Any]:
    starts = range(0, sample_count(batch), SAMPLES_PER_CHUNK)
    return [take(batch, slice(start, start + SAMPLES_PER_CHUNK)) for start in starts]


def _check_alike(found: dict[int, Any]) -> None:
    def form(batch: Any) -> tuple[object, ...]:
        first = _first(batch)
        assert first is not None  # `_as_tensors` has refused such a batch
        floating = first.is_floating_point()
        return len(tree_leaves(batch)), first.dim(), floating, tuple(first.shape[1:]) if floating else None

    start, first_batch = next(iter(found.items()))
    expected = form(first_batch)
    for index, batch in found.items():
        if form(batch) != expected:
            raise CalibrationError(
                f"batch {index} ({describe(batch)}) does not fit batch {start} ({describe(first_batch)}); expected "
                "samples of one shape in all batches. A list is a list of batches: give one (inputs, labels) as a tuple"
            )


def holdout_indices(found: list[Any], holdout: float, seed: int = 0) -> Tensor:
    """Draw the samples to keep out, across all batches.

    Parameters
    ----------
    found : list
        Batches, as `batches` returns them.
    holdout : float
        Share of the samples, in [0, 1); rounded to whole samples, halves up. At least one sample is always left.
    seed : int
        The draw is the same for the same seed and number of samples.

    Returns
    -------
    Tensor of int64
        Positions of the samples kept out, counted through all batches in order, ascending; may be empty. All others
        are solved on.

    Raises
    ------
    ArgumentError
        `holdout` is not in [0, 1).
    """
    if isinstance(holdout, bool) or not 0 <= holdout < 1:
        raise ArgumentError(f"got holdout={holdout!r}; expected a share in [0, 1), 0 to keep no sample out")
    total = sum(sample_count(batch) for batch in found)
    count = min(math.floor(holdout * total + 0.5), total - 1)
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(total, generator=generator)[: max(count, 0)].sort().values


def split(found: list[Any], holdout: float, seed: int = 0) -> tuple[list[Any], list[Any]]:
    """Split batches by samples into those solved on and those kept out to audit the certificate.

    Parameters
    ----------
    found, holdout, seed
        As for `holdout_indices`, which says which samples are kept out.

    Returns
    -------
    solve_batches, holdout_batches : list
        Together they hold every sample once, in order; a batch left without a sample is dropped. The second is empty
        when `holdout` is 0 or rounds to no sample.

    Raises
    ------
    ArgumentError
        `holdout` is not in [0, 1).
    """
    out = holdout_indices(found, holdout, seed)
    solve_batches, holdout_batches = [], []
    starts = itertools.accumulate((sample_count(batch) for batch in found), initial=0)
    for start, batch in zip(starts, found, strict=False):
        kept_out = torch.zeros(sample_count(batch), dtype=torch.bool)
        kept_out[out[(out >= start) & (out < start + len(kept_out))] - start] = True
        if not kept_out.any():
            solve_batches.append(batch)
            continue
        holdout_batches.append(take(batch, kept_out.nonzero().squeeze(1)))
        if not kept_out.all():
            solve_batches.append(take(batch, (~kept_out).nonzero().squeeze(1)))
    return solve_batches, holdout_batches


def runner(forward_fn: Run | None = None) -> Run:
    """How one batch is run through a model.

    Parameters
    ----------
    forward_fn : callable(model, batch), optional
        Called with the batch as it is, moved to the model's device. Give it where the rules below do not fit.

    Returns
    -------
    run : callable(model, batch) -> the model's output

    Notes
    -----
    Without `forward_fn` the signature of the model's `forward` decides:

    * a tensor is its only argument;
    * the elements of a tuple or list fill the positional parameters in order; those beyond are labels and ignored. So
      from ``(inputs, labels)`` a model with ``forward(self, x)`` is given the inputs. An element that falls on an
      optional parameter named label, labels, target or targets is ignored too, and those behind it. With ``*args`` all
      are given;
    * a mapping is given as keyword arguments: without the keys that `forward` does not name (all are given with
      ``**kwargs``), and without label, labels, target and targets unless `forward` requires them.

    Tensors are moved to the device of the model's first parameter and, where all of the model's floating-point
    parameters have one dtype, floating-point tensors are cast to it. The model is given copies, so that one which
    writes into its input does not change the calibration data.
    """

    def run(model: nn.Module, batch: Any) -> Any:
        if forward_fn is not None:
            return forward_fn(model, _placed(batch, _device(model), None))
        args, kwargs = prepared(model, batch)
        return model(*args, **kwargs)

    return run


def prepared(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments that the rules of `runner` make of a batch, copied to the model's device and dtype."""
    return _placed(arguments(model, batch), _device(model), _dtype(model))


def arguments(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments that the rules of `runner` make of a batch."""
    if not isinstance(batch, tuple | list | Mapping):
        return (batch,), {}
    wrapped = model.module if isinstance(model, nn.DataParallel) else model
    wrapped = getattr(wrapped, "_orig_mod", wrapped)  # torch.compile's wrapper hides the signature
    try:
        parameters = list(inspect.signature(wrapped.forward).parameters.values())
    except (TypeError, ValueError):  # a scripted forward has no readable signature: give it everything
        parameters = [inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)]
    kinds = {parameter.kind for parameter in parameters}
    optional_labels = {p.name for p in parameters if p.name in LABEL_NAMES and p.default is not p.empty}
    if isinstance(batch, Mapping):
        named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        taken = set(named) | (set(batch) if inspect.Parameter.VAR_KEYWORD in kinds else set())
        taken -= optional_labels | (LABEL_NAMES - set(named))
        kwargs = {key: value for key, value in batch.items() if key in taken}
        if not kwargs:
            raise CalibrationError(
                f"got a batch with the keys {sorted(map(str, batch))}, none of which {type(model).__name__}.forward "
                f"takes ({', '.join(named) or 'no named parameter'}); rename them or give forward_fn"
            )
        return (), kwargs
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return tuple(batch), {}
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    taken_count = next((i for i, p in enumerate(positional) if p.name in optional_labels), len(positional))
    return tuple(batch[:taken_count]), {}


def _device(model: nn.Module) -> torch.device | None:
    tensor = next(itertools.chain(model.parameters(), model.buffers()), None)
    return None if tensor is None else tensor.device


def _dtype(model: nn.Module) -> torch.dtype | None:
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if not dtypes:  # sparse layers hold their values as buffers
        dtypes = {buffer.dtype for buffer in model.buffers() if buffer.is_floating_point()}
    return dtypes.pop() if len(dtypes) == 1 else None


def _placed(batch: Any, device: torch.device | None, dtype: torch.dtype | None) -> Any:
    return tree_map(
        lambda leaf: (
            leaf.detach().to(device=device, dtype=dtype if leaf.is_floating_point() else None, copy=True)
            if isinstance(leaf, Tensor)
            else leaf
        ),
        batch,
    )


def run_batch(model: nn.Module, batch: Any, index: int, run: Run) -> Any:
    """Run one batch and say which one it was if the model cannot.

    Raises
    ------
    CalibrationError
        With the batch's index and shapes, chained to the model's own exception.
    """
    try:
        with callers_device():
            return run(model, batch)
    except NetTrimError:
        raise
    except Exception as error:
        raise CalibrationError(
            f"{type(model).__name__} could not run calibration batch {index} ({describe(batch)}): "
            f"{type(error).__name__}: {error}. Expected batches that the model's forward takes; if they must "
            "be unpacked in another way, give forward_fn(model, batch)"
        ) from error
