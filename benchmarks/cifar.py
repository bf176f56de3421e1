"""``python -m benchmarks.cifar``: networks with convolutions on CIFAR-10, pruned by ours and by one-shot pruners of others, not retrained.

The papers' ConvNet and a small ResNet with BatchNorm, at four shares of zeros, every method in one run. What is compared and measured is in
``benchmarks/README.md``.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

from benchmarks.cifar_data import LOADERS
from benchmarks.cifar_judge import METHODS, OURS, PEERS, measure, measure_apart
from benchmarks.cifar_networks import NETWORKS, RECIPES, TITLES, load_or_train
from benchmarks.cifar_tables import checks, tables
from benchmarks.method_tables import draw, print_checks
from benchmarks.options import Choices, Numbers, open_console
from benchmarks.results import Results
from benchmarks.solver_session import in_a_process, limited_threads

DEFAULT_OUT = Path(__file__).resolve().parent / "results" / "cifar.json"
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
    samples : dict of str to int
        Unlabelled training images that the methods see, by network: as many for a layer of 2304 inputs as it takes to say something of each, where
        the layers of the others have hundreds of patches an image.
    rows : int
        At most so many of their patches (or images) are solved on in a layer.
    zeros : tuple of float
        Shares of the weights of every layer.
    methods : tuple of str
    apart : bool
        Whether each run has a process of its own, so that its peak memory is its own.
    """

    data: str = "cifar"
    networks: tuple[str, ...] = ("convnet", "resnet")
    epochs: int | None = None
    samples: dict[str, int] = field(default_factory=lambda: {"convnet": 4000, "resnet": 1000, "tiny": 200})
    rows: int = 50_000
    zeros: tuple[float, ...] = (0.5, 0.7, 0.8, 0.9)
    methods: tuple[str, ...] = METHODS
    apart: bool = True


FULL = Protocol()
QUICK = replace(FULL, networks=("resnet",), samples={"resnet": 300}, rows=10_000, zeros=(0.5, 0.8), methods=(*PEERS, "nettrim"))
DIGITS = replace(QUICK, data="digits", networks=("tiny",), samples={"tiny": 200}, rows=2000, methods=METHODS, apart=False)


def run_networks(protocol: Protocol, results: Results, seed: int, console: Console) -> list[Run]:
    """What the results file does not hold yet is pruned and measured; a run that fails is recorded with its error, and tried again next time."""
    data = LOADERS[protocol.data]()
    runs = []
    for network in protocol.networks:
        recipe = RECIPES[network] if protocol.epochs is None else replace(RECIPES[network], epochs=protocol.epochs)
        with console.status(f"training {network}"):
            trained = load_or_train(data, network, recipe, seed)
        has_norms = any("running_mean" in name for name, _ in trained.model.named_buffers())
        for zeros in protocol.zeros:
            for method in protocol.methods:
                if OURS.get(method, {}).get("recalibrate_batchnorm") and not has_norms:
                    continue
                settings = {
                    "data": data.name,
                    "network": network,
                    "weights": trained.fingerprint,
                    "samples": protocol.samples[network],
                    "rows": protocol.rows,
                    "zeros": zeros,
                    "method": method,
                    "arguments": OURS.get(method, {}),
                    "seed": seed,
                }
                work = partial(measure, trained, data, settings)
                if protocol.apart:
                    work = partial(in_a_process, measure_apart, network, recipe, settings, torch.get_num_threads())
                runs.append(results.measured(settings, work, console, f"{network}, {100 * zeros:g} % zeros, {method}"))
    return runs


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="The ResNet alone, 300 images, two shares: a few minutes.")
@click.option("--data", "data_name", type=click.Choice(list(LOADERS)), default="cifar", show_default=True, help="digits: tiny, offline.")
@click.option("--networks", type=Choices(*NETWORKS), help=f"Of {','.join(NETWORKS)}.")
@click.option("--methods", type=Choices(*METHODS), help=f"Of {','.join(METHODS)}.")
@click.option("--zeros", type=Numbers(float), help="Shares of the weights of each layer that are to be zero, for example .5,.8.")
@click.option("--samples", type=click.IntRange(min=1), help="Calibration images.")
@click.option("--rows", type=click.IntRange(min=1), help="Rows solved on in a layer, at most.")
@click.option("--epochs", type=click.IntRange(min=1), help="Passes over the training images; trains anew where the committed weights are of others.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of training and of samples.")
@click.option("--threads", type=click.IntRange(min=1), help="Of torch and numpy; the machine's default if not given.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=DEFAULT_OUT, show_default=True)
def main(quick: bool, data_name: str, seed: int, threads: int | None, out: Path, **chosen: Any) -> None:
    """Compare pruners of networks with convolutions at the same number of weights kept: magnitude, SparseGPT, ALPS and nettrim.

    Every run is written to the results file as soon as it is done, and is not repeated by the next call. Exits with 1 if a run failed, or a
    method kept more weights than it was allowed.
    """
    console = open_console()
    protocol = DIGITS if data_name == "digits" else QUICK if quick else FULL
    if chosen["samples"] is not None:
        chosen["samples"] = dict.fromkeys(NETWORKS, chosen["samples"])
    protocol = replace(protocol, **{name: value for name, value in chosen.items() if value is not None})
    if any(share >= 1 for share in protocol.zeros):
        raise click.BadParameter("a share of zeros is below 1.", param_hint="--zeros")
    results = Results(out, "cifar")
    with limited_threads(threads):
        runs = run_networks(protocol, results, seed, console)
    tables(console, runs)
    print_checks(console, checks(runs, next(iter(OURS)), PEERS), protocol == FULL)
    console.print(results.describe(runs), highlight=False)
    plot = partial(draw, titles=TITLES, setting="zeros", across=lambda run: run["settings"]["zeros"], label="zeros (%)", logarithmic=False)
    for path in [out, *plot(runs, out.with_name(f"{out.stem}-accuracy.png"))]:
        console.print(f"written: {path}", highlight=False, soft_wrap=True)
    broken = [run for run in runs if "error" in run or not run["within"]]
    if broken:
        raise click.ClickException(f"{len(broken)} of {len(runs)} runs failed or kept too many weights; see {out}.")


if __name__ == "__main__":
    main()
