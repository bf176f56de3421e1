"""``python -m benchmarks.sparsity``: the same number of weights kept, by ours and by one-shot pruners of others.

Three sections: ``networks``, fully connected networks on MNIST pruned in cascade and not retrained; ``minilm``, the linear layers of a
language model one by one; and ``options``, what ours does besides. What is compared and measured is in ``benchmarks/README.md``.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks import sparsity_minilm as minilm
from benchmarks.data import LOADERS, Dataset, load
from benchmarks.method_tables import draw, print_checks
from benchmarks.networks import NETWORKS, RECIPES, TITLES, Trained, load_or_train
from benchmarks.options import Choices, Numbers, open_console
from benchmarks.results import Results
from benchmarks.solver_session import Check, limited_threads
from benchmarks.sparsity_judge import METHODS, OURS, measure
from benchmarks.sparsity_options import CASES, measure_option
from benchmarks.sparsity_tables import layer_checks, layer_tables, network_checks, network_tables, option_checks, option_table

DEFAULT_OUT = Path(__file__).resolve().parent / "results" / "sparsity.json"
SECTIONS = ("networks", "minilm", "options")
Run = dict[str, Any]


@dataclass(frozen=True)
class Protocol:
    """What is run: every method on everything.

    Attributes
    ----------
    data : str
    networks : tuple of str
    epochs : int, optional
        Of the training; the recipe's own if not given.
    samples : int
        Unlabelled training samples that the methods see.
    kept : tuple of float
        Share of the weights of every layer but the last.
    last : float
        Share of the last layer's.
    layer_kept : tuple of float or str
        Of the section ``minilm``.
    sequences, length : int
        Of the section ``minilm``: its number of tokens is their product.
    methods : tuple of str
    repeats : int
        Of the section ``networks``: how often each is pruned, of which the least time counts: what else the machine does only adds to it.
    """

    data: str = "mnist"
    networks: tuple[str, ...] = ("fc", "lenet")
    epochs: int | None = None
    samples: int = 10_000
    kept: tuple[float, ...] = (0.2, 0.1, 0.05, 0.03, 0.02)
    last: float = 0.25
    layer_kept: tuple[float | str, ...] = minilm.KEPT
    sequences: int = 128
    length: int = 128
    methods: tuple[str, ...] = METHODS
    repeats: int = 3


FULL = Protocol()
QUICK = Protocol(networks=("lenet",), epochs=3, samples=1000, kept=(0.2, 0.05), layer_kept=(0.5, "2:4"), sequences=8, repeats=1)
DIGITS = replace(QUICK, data="digits", networks=("tiny",), epochs=100, samples=400, kept=(0.5, 0.2))


def _trained(protocol: Protocol, data: Dataset, seed: int, console: Console) -> Iterator[tuple[str, Trained]]:
    """The networks by name, trained now or before."""
    recipe = RECIPES["plain"] if protocol.epochs is None else replace(RECIPES["plain"], epochs=protocol.epochs)
    for network in protocol.networks:
        with console.status(f"training {network}"):
            trained = load_or_train(data, network, recipe, seed=seed)
        yield network, trained


def run_networks(protocol: Protocol, results: Results, seed: int, console: Console) -> list[Run]:
    """Section ``networks``: what the results file does not hold yet is pruned and measured."""
    data = load(protocol.data)
    runs = []
    for network, trained in _trained(protocol, data, seed, console):
        for kept in protocol.kept:
            for method in protocol.methods:
                settings = {
                    "section": "networks",
                    "data": data.name,
                    "network": network,
                    "weights": trained.path.stem,
                    "samples": protocol.samples,
                    "kept": kept,
                    "last": protocol.last,
                    "method": method,
                    "arguments": OURS.get(method, {}),
                    "repeats": protocol.repeats,
                    "seed": seed,
                }
                runs.append(results.measured(settings, partial(measure, trained, data, settings), console, f"{network}, {method}, {kept}"))
    network_tables(console, runs)
    return runs


def run_minilm(protocol: Protocol, results: Results, seed: int, console: Console) -> list[Run]:
    """Section ``minilm``, likewise."""
    with console.status("minilm: running the dense model"):
        layers = minilm.load_layers(protocol.sequences, protocol.length, seed)
    runs = []
    methods = [method for method in protocol.methods if not OURS.get(method)]  # a single layer has no output of a network to serve
    for kept in protocol.layer_kept:
        for method in methods:
            settings = {
                "section": "minilm",
                "rows": protocol.sequences * protocol.length,
                "kept": kept,
                "method": method,
                "seed": seed,
            }
            runs.append(results.measured(settings, partial(minilm.measure_layers, layers, method, kept), console, f"minilm, {method}, {kept}"))
    layer_tables(console, runs)
    return runs


def run_options(protocol: Protocol, results: Results, seed: int, console: Console) -> list[Run]:
    """Section ``options``, likewise."""
    data = load(protocol.data)
    runs = []
    for network, trained in _trained(protocol, data, seed, console):
        settings = {"section": "options", "data": data.name, "network": network, "weights": trained.path.stem, "samples": protocol.samples}
        for case in CASES:
            each = {**settings, "case": case, "seed": seed}
            runs.append(results.measured(each, partial(measure_option, trained, data, each), console, f"{network}, {case}"))
    option_table(console, runs)
    return runs


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="LeNet-300-100 trained briefly, 1,000 samples, two shares; no minilm unless asked for.")
@click.option("--data", "data_name", type=click.Choice(list(LOADERS)), default="mnist", show_default=True, help="digits: tiny.")
@click.option("--only", type=Choices(*SECTIONS), help=f"Sections, of {','.join(SECTIONS)}.")
@click.option("--networks", type=Choices(*NETWORKS), help=f"Of {','.join(NETWORKS)}.")
@click.option("--methods", type=Choices(*METHODS), help=f"Of {','.join(METHODS)}.")
@click.option("--kept", type=Numbers(float), help="Shares of the weights that each layer keeps, for example .1,.05.")
@click.option("--samples", type=click.IntRange(min=1), help="Calibration samples.")
@click.option("--repeats", type=click.IntRange(min=1), help="Of each pruning of a network; the least time counts.")
@click.option("--epochs", type=click.IntRange(min=1), help="Passes over the training images.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of training and of samples.")
@click.option("--threads", type=click.IntRange(min=1), help="Of torch and numpy; the machine's default if not given.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=DEFAULT_OUT, show_default=True)
def main(
    quick: bool, data_name: str, only: tuple[str, ...] | None, seed: int, threads: int | None, out: Path, **chosen: Any
) -> None:
    """Compare pruners at the same number of weights kept: magnitude, Wanda, SparseGPT, ALPS, FISTAPruner and nettrim.

    Every run is written to the results file as soon as it is done, and is not repeated by the next call. Exits with 1 if a run failed, or a
    method kept more weights than it was allowed.
    """
    console = open_console()
    protocol = DIGITS if data_name == "digits" else QUICK if quick else FULL
    sections = only or (SECTIONS if protocol is FULL else ("networks",))
    protocol = replace(protocol, **{name: value for name, value in chosen.items() if value is not None})
    if any(share > 1 for share in protocol.kept):
        raise click.BadParameter("a share of the weights is at most 1.", param_hint="--kept")
    results = Results(out, "sparsity")
    runs: list[Run] = []
    checks: list[Check] = []
    ours, by_layer = OURS
    with limited_threads(threads):
        if "networks" in sections:
            networks = run_networks(protocol, results, seed, console)
            runs += networks
            checks += network_checks(networks, ours, by_layer)
        if "minilm" in sections:
            layers = run_minilm(protocol, results, seed, console)
            runs += layers
            checks += layer_checks(layers, ours)
        if "options" in sections:
            options = run_options(protocol, results, seed, console)
            runs += options
            checks += option_checks(options)
    print_checks(console, checks, protocol == FULL)
    console.print(results.describe(runs), highlight=False)
    compared = [run for run in runs if run["settings"]["section"] != "options"]
    plot = partial(draw, titles=TITLES, setting="kept", across=lambda run: run["density"], label="weights kept (%)", logarithmic=True)
    for path in [out, *plot(compared, out.with_name(f"{out.stem}-accuracy.png"))]:
        console.print(f"written: {path}", highlight=False, soft_wrap=True)
    broken = [run for run in runs if "error" in run or not run["within"]]
    if broken:
        raise click.ClickException(f"{len(broken)} of {len(runs)} runs failed or kept too many weights; see {out}.")


if __name__ == "__main__":
    main()
