"""``python -m benchmarks.neighbours``: every method around Net-Trim on the same data with the same epochs, alone and followed by `nettrim.prune`.

What is run and measured is in ``docs/neighbours.md`` and ``benchmarks/README.md``.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks.data import LOADERS, load
from benchmarks.neighbours.contract import Task
from benchmarks.neighbours.judge import measure
from benchmarks.neighbours.oracle_report import oracle_runs, oracle_table
from benchmarks.neighbours.registry import METHODS, constants
from benchmarks.neighbours.tables import draw, put_into, rich_tables
from benchmarks.options import Choices, open_console
from benchmarks.results import Results
from benchmarks.solver_session import limited_threads

DEFAULT_OUT = Path(__file__).resolve().parent.parent / "results" / "neighbours.json"
SECTIONS = ("methods", "oracle")
Run = dict[str, Any]


@dataclass(frozen=True)
class Protocol:
    """What is run.

    Attributes
    ----------
    data : str
    epochs : int
        For a method in all, whatever it does with them.
    samples : int, optional
        Training images; all of them if not given.
    batch : int
        Samples in a step.
    seeds : int
        0, 1, ...
    calibration, halvings : int
        Images for `nettrim.prune`, and steps of the search for its sparsity.
    auto_halvings : int
        Steps of the second search, by the defaults of `nettrim.prune`; 0 for none.
    programs : int
        Small programs of the oracle.
    methods : tuple of str
    """

    data: str = "mnist"
    epochs: int = 8
    samples: int | None = None
    batch: int = 200
    seeds: int = 3
    calibration: int = 1000
    halvings: int = 5
    auto_halvings: int = 4
    programs: int = 60
    methods: tuple[str, ...] = tuple(METHODS)


FULL = Protocol()
QUICK = Protocol(epochs=4, samples=8_000, seeds=1, calibration=300, halvings=2, auto_halvings=0, programs=6)
DIGITS = Protocol(data="digits", epochs=12, batch=20, seeds=1, calibration=200, halvings=2, auto_halvings=1, programs=2)


def run_methods(protocol: Protocol, results: Results, console: Console) -> list[Run]:
    """What the results file does not hold yet is run and judged; all methods with one seed before the next seed."""
    data = load(protocol.data)
    runs = []
    for seed in range(protocol.seeds):
        shared: dict[Any, Any] = {}
        for name in protocol.methods:
            method = METHODS[name]
            settings = {
                "section": "methods",
                "method": name,
                "network": method.network,
                "data": protocol.data,
                "epochs": protocol.epochs,
                "samples": protocol.samples,
                "batch": protocol.batch,
                "calibration": protocol.calibration,
                "halvings": protocol.halvings,
                "auto_halvings": protocol.auto_halvings,
                "constants": constants(name),
                "seed": seed,
            }
            task = Task(data, method.network, protocol.epochs, seed, protocol.samples, protocol.batch, shared)
            work = partial(measure, method, task, calibration=protocol.calibration, halvings=(protocol.halvings, protocol.auto_halvings))
            runs.append(results.measured(settings, work, console, f"{name}, seed {seed}"))
    for table in rich_tables(runs):
        console.print(table)
    return runs


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="8,000 training images, 4 epochs, one seed, 6 programs: at most three minutes.")
@click.option("--data", "data_name", type=click.Choice(list(LOADERS)), default="mnist", show_default=True, help="digits: tiny.")
@click.option("--only", type=Choices(*SECTIONS), help=f"Sections, of {','.join(SECTIONS)}.")
@click.option("--methods", type=Choices(*METHODS), help="By name, as in the tables.")
@click.option("--epochs", type=click.IntRange(min=4), help="Of a method in all.")
@click.option("--samples", type=click.IntRange(min=100), help="Training images.")
@click.option("--seeds", type=click.IntRange(min=1), help="How many.")
@click.option("--programs", type=click.IntRange(min=1), help="Of the oracle.")
@click.option("--threads", type=click.IntRange(min=1), help="Of torch and numpy; the machine's default if not given.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=DEFAULT_OUT, show_default=True)
@click.option("--into", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Run nothing: put the file's tables into this page.")
def main(
    quick: bool, data_name: str, only: tuple[str, ...] | None, threads: int | None, out: Path, into: Path | None, **chosen: Any
) -> None:
    """Run the methods around Net-Trim, each alone and followed by nettrim.prune, and the ℓ0 oracle beside our supports.

    Every run is written to the results file as soon as it is done, and is not repeated by the next call. Exits with 1 if a run failed.
    """
    console = open_console()
    results = Results(out, "neighbours")
    if into is not None:
        put_into(into, results)
        console.print(f"written: {into}", highlight=False, soft_wrap=True)
        return
    protocol = DIGITS if data_name == "digits" else QUICK if quick else FULL
    protocol = replace(protocol, **{name: value for name, value in chosen.items() if value is not None})
    sections = only or SECTIONS
    runs: list[Run] = []
    with limited_threads(threads):
        if "methods" in sections:
            runs += run_methods(protocol, results, console)
        if "oracle" in sections:
            programs = oracle_runs(protocol.programs, results, console)
            console.print(oracle_table(programs))
            runs += programs
    console.print(results.describe(runs), highlight=False)
    for path in [out, *draw(runs, out.with_name(f"{out.stem}-accuracy.png"))]:
        console.print(f"written: {path}", highlight=False, soft_wrap=True)
    broken = [run for run in runs if "error" in run]
    if broken:
        raise click.ClickException(f"{len(broken)} of {len(runs)} runs failed; see {out}.")


if __name__ == "__main__":
    main()
