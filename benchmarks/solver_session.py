"""What the sections of ``python -m benchmarks.solvers`` share: sizes, figures of a solution, records, tables, checks."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import click
import torch
from rich.box import HEAVY_HEAD, MARKDOWN
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.data import Dataset
from benchmarks.networks import RECIPES, Recipe
from benchmarks.results import Results
from nettrim import LayerProgram
from nettrim.solvers.base import Solution

Run = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How large everything is; the defaults are what the figures are asked of.

    Attributes
    ----------
    data, network, recipe : str, str, Recipe
        The trained network whose first layer is solved for.
    neurons : int, optional
        Only the first neurons of that layer; all of them if not given.
    samples, many_samples : int
        P of the sections ``mnist-layer1`` and ``mnist-60000``.
    tolerances : tuple of float
        Gaps asked for, loosest first.
    limit : int
        Most iterations of a solve of ours on that layer.
    peer_iterations : tuple of int
        Of ``admm`` with the authors' settings; the first number is also the authors' own code's.
    caps : tuple of int
        Iteration limits of the solves that make up a history.
    oracle : tuple of int
        (P, N, M) of the section ``cvxpy-sized``.
    wide, wide_rows, wide_chunk, wide_tolerance : tuple of int, int, int, float
        N = M of the section ``wide``, its P, the rows in a chunk of the stream, and the gap asked for.
    base, factors : tuple of int, dict of str to tuple of float
        (P, N, M) of the section ``growth``, and what each is multiplied by in turn.
    repeats : int
        Programs of each kind and structure in the section ``agreement``.
    """

    data: str = "mnist"
    network: str = "fc"
    recipe: Recipe = RECIPES["plain"]
    neurons: int | None = None
    samples: int = 10_000
    many_samples: int = 60_000
    tolerances: tuple[float, ...] = (1e-2, 1e-3, 1e-4)
    limit: int = 1500
    peer_iterations: tuple[int, ...] = (200, 1000)
    caps: tuple[int, ...] = (10, 20, 25, 30, 40, 60, 80, 100, 120, 160, 200, 280, 400)
    oracle: tuple[int, int, int] = (2000, 200, 20)
    wide: tuple[int, ...] = (2048, 4096)
    wide_rows: int = 32_768
    wide_chunk: int = 1024
    wide_tolerance: float = 1e-3
    base: tuple[int, int, int] = (4000, 200, 64)
    factors: dict[str, tuple[float, ...]] = field(
        default_factory=lambda: {
            "P": (0.25, 0.5, 1, 2, 4, 8),
            "N": (0.25, 0.5, 1, 2, 4),
            "M": (0.25, 0.5, 1, 2, 4, 8),
        }
    )
    repeats: int = 7


@dataclass(frozen=True)
class Check:
    """A figure that was asked for, and what was found."""

    section: str
    what: str
    found: float
    relation: str
    asked: float

    @property
    def met(self) -> bool:
        return self.found <= self.asked if self.relation == "≤" else self.found >= self.asked


@dataclass
class Session:
    """One call of the command: where results go, what they are measured with, and what was found so far."""

    results: Results
    console: Console
    sizes: Sizes
    seed: int
    threads: int
    data: Callable[[], Dataset]
    # (A, Y, ε, ρ, iterations) -> weights (M, N) of the authors' code, and seconds
    peer: Callable[[Tensor, Tensor, float, float, int], tuple[Tensor, float]] | None = None
    started: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S"))
    runs: list[Run] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)

    def record(self, section: str, case: str, problem: dict[str, Any], measured: dict[str, Any]) -> Run:
        """Write one run to the results file; ``started`` keeps it apart from the same run of another call."""
        settings = {
            "section": section,
            "case": case,
            **problem,
            "seed": self.seed,
            "threads": self.threads,
            "started": self.started,
        }
        run = self.results.append(settings, _writable(measured))
        self.runs.append(run)
        return run

    def check(self, section: str, what: str, found: float, relation: str, asked: float) -> None:
        """Note a figure that the project asks for."""
        self.checks.append(Check(section, what, found, relation, asked))

    def doing(self, text: str) -> contextlib.AbstractContextManager[Any]:
        """A line on the terminal while something runs."""
        return self.console.status(text)

    def table(self, title: str, headers: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "") -> None:
        """Print a table: the first column text, the others numbers (None: a dash)."""
        # where nobody watches, what is printed can go into a page as it is
        box = HEAVY_HEAD if self.console.is_terminal else MARKDOWN
        table = Table(title=title, caption=caption or None, header_style="bold", box=box)
        for index, header in enumerate(headers):
            table.add_column(header, justify="right" if index else "left", overflow="fold")
        for row in rows:
            table.add_row(*(cell(value) for value in row))
        self.console.print(table)

    def of(self, section: str) -> list[Run]:
        """The runs of a section in this call."""
        return [run for run in self.runs if run["settings"]["section"] == section]


def _writable(value: Any) -> Any:
    """JSON has no infinity: what is not finite is written as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _writable(item) for key, item in value.items()}
    return [_writable(item) for item in value] if isinstance(value, (list, tuple)) else value


def cell(value: object) -> str:
    """A table's entry."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def judged(program: LayerProgram, weights: Tensor, seconds: float) -> Run:
    """What any solver's weights are worth, all measured in float64 by the program."""
    measures = program.measure(weights)
    norm = program.norm(weights)
    level = program.epsilon if program.epsilon is not None else program.target_norm
    return {
        "seconds": seconds,
        "norm": norm,
        # ‖relu(Z) − Y‖, and what the program itself bounds, both over the budget (over ‖Y‖ in a penalised program)
        "discrepancy": measures.discrepancy / level,
        "used": math.sqrt(program.misfit_of(measures)) / level,
        "violation": program.violation_of(measures),
        "feasible": program.feasible_by(measures),
        "density": float((weights != 0).double().mean()),
    }


def figures(program: LayerProgram, solution: Solution) -> Run:
    """A solution's own figures, with those of `judged`."""
    return {
        **judged(program, solution.weights, solution.seconds),
        "solver": solution.solver,
        "status": solution.status,
        "objective": solution.objective,
        "lower_bound": solution.lower_bound,
        "gap": solution.gap,
        "iterations": solution.iterations,
    }


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What ``function`` returns in a fresh process: nothing that ran before is in its memory."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


@contextlib.contextmanager
def limited_threads(threads: int | None) -> Iterator[int]:
    """Run torch, and the BLAS under numpy where threadpoolctl is installed, on this many threads; as they are for None."""
    before = torch.get_num_threads()
    if threads is None:
        yield before
        return
    try:
        from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

        limit: contextlib.AbstractContextManager[Any] = threadpool_limits(threads)
    except ImportError:
        click.echo(f"threadpoolctl is not installed: for numpy's threads set OMP_NUM_THREADS={threads} too.", err=True)
        limit = contextlib.nullcontext()
    with limit:
        torch.set_num_threads(threads)
        try:
            yield threads
        finally:
            torch.set_num_threads(before)
