"""``python -m benchmarks.mnist``: the Net-Trim papers' experiments on MNIST.

Fully connected networks, trained plainly and with ℓ1 + dropout, pruned from P unlabelled training samples at a range of
budgets, in parallel and in cascade, with both sets; never retrained. Each run is set against one-shot magnitude pruning
with the same number of nonzeros in every layer. What each column means is in ``benchmarks/README.md``.
"""

import copy
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

import nettrim
from benchmarks.data import LOADERS, Dataset, load
from benchmarks.figures import draw
from benchmarks.networks import NETWORKS, RECIPES, Trained, accuracy, load_or_train
from benchmarks.options import Choices, Numbers, open_console
from benchmarks.results import Results
from benchmarks.tables import markdown_table, rich_table
from nettrim.errors import NetTrimError

DEFAULT_OUT = Path(__file__).resolve().parent / "results" / "mnist.json"


@dataclass(frozen=True)
class Protocol:
    """What is run: every combination of these."""

    networks: tuple[str, ...] = ("lenet", "fc")
    trainings: tuple[str, ...] = ("plain",)
    samples: tuple[int, ...] = (1_000,)
    modes: tuple[str, ...] = ("parallel", "cascade")
    sets: tuple[str, ...] = ("relaxed", "paper")
    epsilons: tuple[float, ...] = (0.02, 0.06, 0.1, 0.2)
    epochs: int | None = None

    def settings(self, network: str, training: str) -> Iterator[dict[str, Any]]:
        """The combinations for one trained network, the quick ones first."""
        for samples, consistency, mode, epsilon in itertools.product(
            sorted(self.samples), self.sets, self.modes, sorted(self.epsilons, reverse=True)
        ):
            yield {
                "network": network,
                "training": training,
                "samples": samples,
                "mode": mode,
                "consistency": consistency,
                "epsilon": epsilon,
            }

    def __len__(self) -> int:
        parts = (self.networks, self.trainings, self.samples, self.modes, self.sets, self.epsilons)
        return math.prod(len(part) for part in parts)


DEFAULT = Protocol()
FULL = Protocol(
    trainings=("plain", "l1-dropout"),
    samples=(1_000, 10_000),
    epsilons=(0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.2, 0.3),
)
QUICK = Protocol(networks=("lenet",), samples=(200,), epsilons=(0.1, 0.2), epochs=3)
DIGITS_EPOCHS = 100  # 7 steps each: 1,397 samples in batches of 200


def calibration_samples(data: Dataset, samples: int, seed: int) -> Tensor:
    """``samples`` rows of the training images, drawn without replacement; labels are not used.

    Raises
    ------
    click.ClickException
        If the data set has fewer.
    """
    available = len(data.train_inputs)
    if samples > available:
        raise click.ClickException(f"{samples} samples were asked for; {data.name} has {available} to train on.")
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    return data.train_inputs[order[:samples]]


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers by name, in the order in which they run."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@torch.no_grad()
def prune_by_magnitude(model: nn.Module, nonzeros: dict[str, int]) -> nn.Module:
    """The one-shot baseline: a copy that keeps the given number of largest weights in each layer, biases untouched."""
    pruned = copy.deepcopy(model)
    for name, layer in linear_layers(pruned).items():
        kept = torch.zeros(layer.weight.numel(), dtype=torch.bool)
        kept[layer.weight.abs().flatten().topk(nonzeros[name]).indices] = True
        layer.weight.mul_(kept.view_as(layer.weight))
    return pruned


@torch.no_grad()
def relative_discrepancy(model: nn.Module, dense: nn.Module, inputs: Tensor) -> float:
    """Frobenius norm of the difference of the outputs, as a share of the norm of the dense network's output."""
    reference = dense(inputs)
    return float((model(inputs) - reference).norm() / reference.norm())


def measure(trained: Trained, data: Dataset, settings: dict[str, Any]) -> dict[str, Any]:
    """Prune once and measure everything that the tables show.

    Parameters
    ----------
    trained : Trained
        The dense network; it is left as it is.
    data : Dataset
        Calibration samples come from its training images, accuracies and ``test_discrepancy`` from its test images.
    settings : dict
        One of `Protocol.settings`, with ``gamma``, ``solver`` and ``seed``.

    Returns
    -------
    dict
        For the results file. Discrepancies are relative to the norm of the dense network's output.

    Raises
    ------
    NetTrimError
        If the network could not be pruned.
    """
    calibration = calibration_samples(data, settings["samples"], settings["seed"])
    start = time.perf_counter()
    result = nettrim.prune(
        trained.model,
        calibration,
        epsilon=settings["epsilon"],
        mode=settings["mode"],
        gamma=settings["gamma"],
        consistency=settings["consistency"],
        penalty="l1",
        solver=settings["solver"],
        # The papers solve on all P samples; what the network does on others is measured on the test images.
        holdout=0.0,
        seed=settings["seed"],
        # A layer that could not be solved stays dense and counts as such: one failure must not hide the other layers.
        on_failure="keep_dense",
    )
    seconds = time.perf_counter() - start
    report = result.report
    # Counted on the stored weights, not taken from the report: the judge does not ask the judged.
    layers = linear_layers(result.model)
    nonzeros = {name: int(layer.weight.count_nonzero()) for name, layer in layers.items()}
    sizes = {name: layer.weight.numel() for name, layer in layers.items()}
    magnitude = prune_by_magnitude(trained.model, nonzeros)
    with torch.no_grad():
        norm = float(trained.model(calibration).norm())
    guaranteed = report.certificate.guaranteed
    return {
        "dense_accuracy": trained.accuracy,
        "accuracy": accuracy(result.model, data.test_inputs, data.test_labels),
        "nonzeros": nonzeros,
        "sizes": sizes,
        "density": sum(nonzeros.values()) / sum(sizes.values()),
        "guaranteed": None if guaranteed is None else guaranteed / norm,
        "measured": relative_discrepancy(result.model, trained.model, calibration),
        "test_discrepancy": relative_discrepancy(result.model, trained.model, data.test_inputs),
        "holds": report.certificate.holds,
        "seconds": seconds,
        "layers": report.to_dict()["layers"],
        "skipped": report.skipped,
        "magnitude": {
            "accuracy": accuracy(magnitude, data.test_inputs, data.test_labels),
            "measured": relative_discrepancy(magnitude, trained.model, calibration),
            "test_discrepancy": relative_discrepancy(magnitude, trained.model, data.test_inputs),
        },
    }


def run(
    protocol: Protocol, data: Dataset, results: Results, *, gamma: float, solver: str, seed: int, console: Console
) -> list[dict[str, Any]]:
    """Do what the protocol asks and the results file does not hold yet.

    Returns
    -------
    list of dict
        The protocol's runs, in its order, those of earlier calls with them; failed ones carry ``error``.
    """
    runs: list[dict[str, Any]] = []
    with Progress(console=console, transient=True) as progress:
        whole = progress.add_task("pruning", total=len(protocol))
        for network, training in itertools.product(protocol.networks, protocol.trainings):
            recipe = RECIPES[training]
            if protocol.epochs is not None:
                recipe = replace(recipe, epochs=protocol.epochs)
            epochs = progress.add_task(f"training {network}, {training}", total=recipe.epochs)

            def advance(epoch: int, task: Any = epochs) -> None:
                progress.update(task, completed=epoch)

            trained = load_or_train(data, network, recipe, seed=seed, progress=advance)
            progress.remove_task(epochs)
            console.print(
                f"{network}, {training}: {100 * trained.accuracy:.2f} % on the test images, trained in "
                f"{trained.seconds:.1f} s ({trained.path.name})",
                highlight=False,
            )
            for chosen in protocol.settings(network, training):
                # The name of the cached weights ends in a hash of how they came about: other weights, another run.
                settings = {
                    "data": data.name,
                    **chosen,
                    "gamma": gamma,
                    "solver": solver,
                    "seed": seed,
                    "weights": trained.path.stem,
                }
                progress.update(whole, description=_label(chosen))
                done = results.find(settings)
                if done is None:
                    try:
                        done = results.append(settings, measure(trained, data, settings))
                    except NetTrimError as error:
                        done = results.append(settings, {"error": f"{type(error).__name__}: {error}"})
                        console.print(f"[red]failed[/red] {_label(chosen)}: {error}")
                runs.append(done)
                progress.advance(whole)
    return runs


def _label(settings: dict[str, Any]) -> str:
    return (
        f"{settings['network']}, {settings['training']}, P = {settings['samples']}, {settings['mode']}, "
        f"{settings['consistency']} set, epsilon {settings['epsilon']}"
    )


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="LeNet-300-100 trained briefly, 200 samples, two budgets; under a minute.")
@click.option("--full", is_flag=True, help=f"The papers' whole protocol: {len(FULL)} prunes.")
@click.option("--data", "data_name", type=click.Choice(list(LOADERS)), default="mnist", show_default=True)
@click.option("--networks", type=Choices(*NETWORKS), help=f"Of {','.join(NETWORKS)}.")
@click.option("--trainings", type=Choices(*RECIPES), help=f"Of {','.join(RECIPES)}.")
@click.option("--samples", type=Numbers(int), help="Numbers of calibration samples P, for example 1000,10000.")
@click.option("--modes", type=Choices("parallel", "cascade"), help="Of parallel,cascade.")
@click.option("--sets", type=Choices("relaxed", "paper"), help="Of relaxed,paper.")
@click.option("--epsilons", type=Numbers(float), help="Relative budgets, for example .02,.1.")
@click.option("--epochs", type=click.IntRange(min=1), help="Passes over the training images.")
@click.option("--gamma", type=click.FloatRange(min=1.0), default=1.1, show_default=True, help="Cascade inflation.")
@click.option("--solver", default="auto", show_default=True, help="As for nettrim.prune.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of training and of samples.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=DEFAULT_OUT, show_default=True)
@click.option(
    "--table", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Print this file as Markdown; no run."
)
def main(
    quick: bool,
    full: bool,
    data_name: str,
    gamma: float,
    solver: str,
    seed: int,
    out: Path,
    table: Path | None,
    **chosen: Any,
) -> None:
    """Prune fully connected networks on MNIST as the Net-Trim papers do, and set them against magnitude pruning.

    Without --quick or --full: both networks, trained plainly, 1,000 samples, four budgets. The lists narrow or widen
    what is run. Every run is written to the results file as soon as it is done, and is not repeated by the next call.
    Exits with 1 if a run failed or a certificate did not hold.
    """
    console = open_console()
    if table is not None:
        click.echo(markdown_table(Results(table, "mnist")))
        return
    if quick and full:
        raise click.UsageError("--quick and --full exclude each other.")
    protocol = QUICK if quick else FULL if full else DEFAULT
    if data_name == "digits":
        protocol = replace(protocol, networks=("tiny",), epochs=DIGITS_EPOCHS)
    protocol = replace(protocol, **{name: value for name, value in chosen.items() if value is not None})
    results = Results(out, "mnist")
    runs = run(protocol, load(data_name), results, gamma=gamma, solver=solver, seed=seed, console=console)
    console.print(rich_table(runs))
    for path in [out, *draw(runs, out)]:
        console.print(f"written: {path}", highlight=False, soft_wrap=True)
    broken = [run for run in runs if "error" in run or not run["holds"]]
    if broken:
        raise click.ClickException(f"{len(broken)} of {len(runs)} runs failed or broke their promise; see {out}.")


if __name__ == "__main__":
    main()
