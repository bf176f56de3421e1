"""``python -m benchmarks.scaling``: one and two workers on this machine, what a number of weights for all neurons is worth, and a large model.

The times are wall clock and want a machine with nothing else on it; one thread of torch in every process, so that workers are what is compared.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import click
import torch
from rich.table import Table
from torch import Tensor, nn

from benchmarks.options import Choices, open_console
from benchmarks.results import environment
from benchmarks.scaling_arithmetic import LLAMA_70B, Costs, costs
from nettrim import LayerProgram, prune, solve


def correlated(rows: int, width: int, seed: int = 0) -> Tensor:
    """Rows as layers see them: positive, a few directions strong and most weak."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) * torch.linspace(1, 0.05, width)[:, None]
    return (torch.randn(rows, width, generator=generator) @ mixing).clamp(min=0)


@contextmanager
def pool(kind: str, count: int) -> Iterator[Executor | None]:
    """No executor, processes of this machine, or a Dask scheduler on the loopback interface; every worker has nettrim imported."""
    if kind == "serial":
        yield None
    elif kind == "processes":
        with ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as executor:
            _warm(executor, count)
            yield executor
    else:
        from distributed import Client, LocalCluster

        options = {"n_workers": count, "threads_per_worker": 1, "processes": True, "dashboard_address": None, "silence_logs": "ERROR"}
        with LocalCluster(**options) as cluster, Client(cluster) as client:
            executor = client.get_executor()
            _warm(executor, count)
            yield executor


def _warm(executor: Executor, count: int) -> None:
    program = LayerProgram(torch.randn(20, 4), torch.randn(20, 3), epsilon=1.0, activation=None)
    for future in [executor.submit(solve, program) for _ in range(2 * count)]:
        future.result()


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


WAYS = (("serial", 1), ("processes", 1), ("processes", 2), ("dask", 1), ("dask", 2))


def workers(width: int, layers: int, samples: int, neurons: int) -> Table:
    """The layers of one network in parallel mode, and the blocks of one wide layer, by number of workers."""
    torch.manual_seed(0)
    model = nn.Sequential(*(module for _ in range(layers) for module in (nn.Linear(width, width), nn.ReLU())))
    inputs, wide = correlated(samples, width), nn.Sequential(nn.Linear(width, 2 * width))
    options = {"epsilon": 0.1, "penalty": "l1", "mode": "parallel", "holdout": 0}
    calls = {
        f"{layers} layers of {width}x{width}": lambda executor: prune(model, inputs, **options, executor=executor),
        f"a layer of {2 * width}x{width} in blocks of {neurons}": lambda executor: prune(wide, inputs, **options, neurons=neurons, executor=executor),
    }
    table = Table(title=f"workers, {samples} rows, epsilon 0.1")
    for header in ("what", "executor", "workers", "s", "times serial", "same bits"):
        table.add_column(header, justify="left" if header in ("what", "executor") else "right")
    for what, call in calls.items():
        first: tuple[float, Any] | None = None
        for kind, count in WAYS:
            with pool(kind, count) as executor:
                seconds, result = timed(lambda: call(executor))  # noqa: B023
            first = first or (seconds, result)
            states = zip(result.model.state_dict().values(), first[1].model.state_dict().values(), strict=True)
            same = all(torch.equal(a, b) for a, b in states)
            table.add_row(what, kind, str(count), f"{seconds:.2f}", f"{first[0] / seconds:.2f}", "yes" if same else "NO")
    return table


def shares(width: int, samples: int, blocks: int) -> Table:
    """What it costs to give each block of neurons the same share of a number of weights that was asked of the whole layer."""
    inputs = correlated(samples, width)
    torch.manual_seed(0)
    # rows of very different size and importance, as those of trained layers are
    weights = torch.randn(width, width) * torch.logspace(0, -1.5, width)[:, None]
    targets = inputs @ weights.T
    table = Table(title=f"{width}x{width} weights, so many kept: squared error of the output, relative")
    for header in ("kept", "over all neurons", f"the same in each of {blocks} blocks", "times as much"):
        table.add_column(header, justify="right")
    for density in (0.3, 0.2, 0.1):
        kept = round(density * width * width)
        whole = solve(LayerProgram(inputs, targets, nonzeros=kept, activation=None)).objective
        parts = [LayerProgram(inputs, part, nonzeros=kept // blocks, activation=None) for part in targets.split(width // blocks, 1)]
        apart = sum(solve(part).objective for part in parts)
        norm = 0.5 * float(targets.double().square().sum())
        table.add_row(f"{density:.0%}", f"{whole / norm:.3e}", f"{apart / norm:.3e}", f"{apart / whole:.2f}")
    return table


def measured_costs(width: int, samples: int) -> Costs:
    """This machine's rates: products in both precisions, and iterations of a no-ReLU program."""

    def rate(dtype: torch.dtype) -> float:
        A = torch.randn(width, width, dtype=dtype)
        A @ A
        return 2.0 * width**3 / min(timed(lambda: A @ A)[0] for _ in range(3))

    inputs = correlated(samples, width)
    torch.manual_seed(0)
    targets = inputs @ torch.randn(width, width).T
    program = LayerProgram(inputs, targets, epsilon=0.1 * float(targets.norm()), activation=None)
    return Costs(rate(torch.float32), rate(torch.float64), solve(program, tol=1e-2).iterations)


PARTS = ("model", "shares", "workers")


@click.command()
@click.option("--quick", is_flag=True, help="A minute's worth, to see that it runs.")
@click.option("--only", type=Choices(*PARTS), default=",".join(PARTS), show_default=True, help="Some of these, by commas.")
@click.option("--rows", default=128 * 2048, show_default=True, help="Calibration tokens of the large model.")
@click.option("--flops", type=float, help="Of a worker, a second, in float32, in place of what this machine does.")
def main(quick: bool, only: tuple[str, ...], rows: int, flops: float | None) -> None:
    """Measure one and two workers, and count what a large model takes."""
    torch.set_num_threads(1)
    console = open_console()
    console.print(environment())
    width, layers, samples = (48, 3, 300) if quick else (256, 4, 1500)
    if "model" in only:
        found = measured_costs(128 if quick else 1024, samples)
        if flops is not None:
            found = Costs(flops, flops * found.float64 / found.float32, found.iterations)
        console.print(costs(LLAMA_70B, rows, found))
    if "shares" in only:
        console.print(shares(width if quick else 192, samples, 8))
    if "workers" in only:
        console.print(workers(width, layers, samples, width // 2))


if __name__ == "__main__":
    main()
