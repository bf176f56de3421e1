"""``nettrim.bench``: how fast and how large a pruned network is in each form, beside the dense one."""

from __future__ import annotations

import dataclasses
import io
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nettrim import calibration as calibrations
from nettrim import layers, timing
from nettrim.compression import save_compressed
from nettrim.errors import ArgumentError
from nettrim.rendering import WIDTH
from nettrim.shrinking import shrink
from nettrim.sparse_linear import SparseLinear
from nettrim.sparse_report import SparseReport
from nettrim.sparsify import bytes_of, to_dense, to_sparse

if TYPE_CHECKING:
    from rich.table import Table

BATCHES = (1, 8, 64)


@dataclasses.dataclass(frozen=True)
class BenchTiming:
    """One form at one batch.

    Attributes
    ----------
    form : str
        ``"dense"``, ``"sparse"`` or ``"shrunk"``.
    batch : int
        Samples.
    threads : int
        Of torch.
    seconds : float
        Of a forward pass, median.
    speedup : float
        The dense network's time over this form's, median of turns.
    """

    form: str
    batch: int
    threads: int
    seconds: float
    speedup: float


@dataclasses.dataclass(frozen=True)
class BenchReport:
    """What ``nettrim.bench`` measured.

    Attributes
    ----------
    timings : tuple of BenchTiming
    bytes : dict of str to int
        Of each form's parameters and buffers, and of the ``"compressed file"``.
    sparse : dict of int to SparseReport
        By threads: which layers were faster in a sparse form.
    """

    timings: tuple[BenchTiming, ...]
    bytes: dict[str, int]
    sparse: dict[int, SparseReport]

    def to_dict(self) -> dict[str, Any]:
        """The same as dictionaries, lists, strings and numbers only; threads are strings where they are keys, as in JSON."""
        timings = [dataclasses.asdict(one) for one in self.timings]
        return {"timings": timings, "bytes": dict(self.bytes), "sparse": {str(threads): one.to_dict() for threads, one in self.sparse.items()}}

    def table(self) -> Table:
        """A rich table: a row a form and number of threads, milliseconds (times as fast as dense) by batch, bytes."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        batches = list(dict.fromkeys(one.batch for one in self.timings))
        table = Table(box=box.MARKDOWN)
        table.add_column("form")
        for header in ("threads", *(f"batch {batch}: ms" for batch in batches), "bytes"):
            table.add_column(header, justify="right")
        cells = {(one.form, one.threads, one.batch): f"{1e3 * one.seconds:.3g} ({one.speedup:.2f}x)" for one in self.timings}
        for form, threads in dict.fromkeys((one.form, one.threads) for one in self.timings):
            measured = [cells[form, threads, batch] for batch in batches]
            table.add_row(*map(Text, (form, str(threads), *measured, f"{self.bytes[form]:,}")))
        table.add_row("compressed file", "", *("" for _ in batches), f"{self.bytes['compressed file']:,}")
        return table

    @property
    def facts(self) -> dict[str, str]:
        """For the top of a report's page: the fastest form of the smallest batch, by threads; and the compressed file."""
        batch, found = min(one.batch for one in self.timings), {}
        for threads in dict.fromkeys(one.threads for one in self.timings):
            best = max((one for one in self.timings if (one.batch, one.threads) == (batch, threads)), key=lambda one: one.speedup)
            found[f"Speed, batch {batch}, threads {threads}"] = f"{best.speedup:.2f} times dense ({best.form}), measured here"
        return {**found, "Compressed file": f"{self.bytes['compressed file']:,} bytes; dense {self.bytes['dense']:,}"}

    def __str__(self) -> str:
        from rich.console import Console

        out = io.StringIO()
        Console(file=out, width=WIDTH, color_system=None, force_terminal=False, force_jupyter=False).print(self.table())
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n")


@torch.inference_mode(False)
@torch.no_grad()
def bench(
    model: nn.Module,
    dense: nn.Module | None = None,
    *,
    example_inputs: Any = None,
    batches: Iterable[int] = BATCHES,
    threads: Iterable[int] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
) -> BenchReport:
    """Measure a pruned network on this machine: dense, with the layers sparse that are faster so, and without the neurons that do nothing.

    The forms are timed in turns, so that a busy machine slows all of them; the ratios are worth more than the times. With one thread on a CPU, time
    is that thread's processor time (see :mod:`nettrim.timing`).

    Parameters
    ----------
    model : nn.Module
        The pruned network, dense or from :func:`nettrim.to_sparse`; it is run in evaluation mode, and left as it was.
    dense : nn.Module, optional
        What to compare with; the pruned network with its zeros stored if not given.
    example_inputs : Tensor, tuple or mapping, optional
        One batch of at least one sample, as for :func:`nettrim.prune`; its samples are repeated as needed. Random numbers if not given, for a model
        that begins with a linear layer.
    batches : iterable of int
        Samples in a forward pass.
    threads : iterable of int, optional
        Numbers of torch's threads; 1 and all processors that this process may use if not given.
    forward_fn : callable(model, batch), optional
        Where ``model(batch)`` is not how a batch is run.

    Returns
    -------
    BenchReport

    Raises
    ------
    ArgumentError
        An argument is not as described, or the model's inputs cannot be guessed; CalibrationError if the model cannot run the example.
    """
    for argument, given in (("model", model), ("dense", dense)):
        if not isinstance(given, nn.Module) and not (given is None and argument == "dense"):
            raise ArgumentError(f"{argument} is a {type(given).__name__}; expected a torch.nn.Module")
    sizes = _numbers(batches, "batches")
    counts = _numbers((1, _processors()) if threads is None else threads, "threads")
    pruned = to_dense(model).eval()
    given = calibrations.batches([example_inputs if example_inputs is not None else _random_inputs(model)])[0]
    samples = calibrations.sample_count(given)
    examples = {size: calibrations.take(given, torch.arange(size) % samples) for size in sizes}
    forms = {"dense": pruned if dense is None else layers.copy_of(dense).eval()}
    smaller = shrink(pruned, [examples[min(sizes)]], forward_fn=forward_fn)
    if bytes_of(smaller) < bytes_of(pruned):
        forms["shrunk"] = smaller
    run = calibrations.runner(forward_fn)
    for index, example in enumerate(examples.values()):  # one that does not run is an error that says so, before anything is timed
        for network in forms.values():
            calibrations.run_batch(network, example, index, run)
    reports: dict[int, SparseReport] = {}
    timings: list[BenchTiming] = []
    cpu = all(tensor.device.type == "cpu" for network in forms.values() for tensor in (*network.parameters(), *network.buffers()))
    before = torch.get_num_threads()
    try:
        for count in counts:
            torch.set_num_threads(count)  # a layer may be faster with one number of threads and slower with another
            forms["sparse"] = to_sparse(pruned, example_inputs=list(examples.values()), forward_fn=forward_fn)
            reports[count] = forms["sparse"].nettrim_sparse_report  # type: ignore[assignment]
            for size, example in examples.items():
                calls = {form: _call(None if forward_fn is None else run, network, example) for form, network in forms.items()}
                for form, found in timing.compare(calls, cpu=cpu, threads=count).items():
                    timings.append(BenchTiming(form, size, count, found.seconds, found.speedup))
    finally:
        torch.set_num_threads(before)
    with tempfile.TemporaryDirectory() as folder:
        file = save_compressed(pruned, None, Path(folder) / "model").bytes
    timings.sort(key=lambda one: (one.threads, list(forms).index(one.form), one.batch))
    return BenchReport(tuple(timings), {**{form: bytes_of(network) for form, network in forms.items()}, "compressed file": file}, reports)


def _call(run: calibrations.Run | None, network: nn.Module, example: Any) -> Callable[[], object]:
    """A forward pass, and nothing besides: without a ``forward_fn`` the arguments are made now."""
    if run is not None:
        return lambda: run(network, example)
    args, kwargs = calibrations.prepared(network, example)
    return lambda: network(*args, **kwargs)


def _numbers(given: Iterable[int], argument: str) -> list[int]:
    numbers = sorted(set(given))
    if not numbers or any(isinstance(number, bool) or not isinstance(number, int) or number < 1 for number in numbers):
        raise ArgumentError(f"{argument}={given!r}; expected whole numbers of at least 1")
    return numbers


def _processors() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _random_inputs(model: nn.Module) -> torch.Tensor:
    leaf = next((module for module in model.modules() if not list(module.children())), None)
    if not isinstance(leaf, nn.Linear | SparseLinear) or not isinstance(model, nn.Sequential | nn.Linear | SparseLinear):
        raise ArgumentError(f"what a {type(model).__name__} is called with cannot be guessed; give example_inputs, one batch")
    weight = leaf.weight
    return torch.randn(1, leaf.in_features, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
