"""``nettrim demo``."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
import safetensors.torch
import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from torch import Tensor

from nettrim import demo as work
from nettrim.commands.common import finite, one_line_errors
from nettrim.rendering import number, percent


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), default="nettrim-demo", show_default=True, help="Folder to write to."
)
@click.option(
    "--epsilon",
    type=click.FloatRange(min=0.0, min_open=True),
    default=0.1,
    callback=finite,
    show_default=True,
    help="Budget of a layer, as a share of the norm of its output.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of training and pruning.")
@click.option("--quiet", is_flag=True, help="No progress and no table: only the files and the exit code.")
@one_line_errors
def demo(out: Path, epsilon: float, seed: int, quiet: bool) -> None:
    """Train a small network on handwritten digits and prune it in both modes and with both sets.

    Prints one table, and writes the default run (cascade, relaxed set) to the --out folder, over what an earlier run
    wrote there: model.safetensors, masks.safetensors and report.json. Exits with 0 when every certificate holds, with 1
    when one does not or something failed, with 2 when an option is wrong.
    """
    try:
        _check_writable(out)  # before the work, not after it
        complaint = _demo(out, epsilon, seed, quiet)
    except OSError as error:
        raise click.ClickException(f"cannot write to {out}: {error.strerror or error}; give another --out") from error
    if complaint:
        raise click.ClickException(complaint)


def _demo(out: Path, epsilon: float, seed: int, quiet: bool) -> str | None:
    """Run the demo; return what to complain about, if a certificate does not hold."""
    digits = work.load_digits()
    # on stderr, so that `nettrim demo > table.txt` holds the table alone
    with work.one_thread(), Progress(console=Console(stderr=True), disable=quiet, transient=True) as progress:
        task = progress.add_task("training", total=work.EPOCHS)
        model = work.train(digits, seed, work.EPOCHS, lambda: progress.advance(task))
        dense_accuracy = work.accuracy(model, digits)
        task = progress.add_task("pruning", total=len(work.RUNS))

        def on_layer(line: str, completed: float) -> None:
            progress.update(task, description=line, completed=completed)

        done = list(work.runs(model, digits, epsilon, seed, on_layer))
    result = done[-1].result
    safetensors.torch.save_file(_tensors(result.model.state_dict()), out / "model.safetensors")
    safetensors.torch.save_file(_tensors(result.masks), out / "masks.safetensors")
    result.report.to_json(out / "report.json")
    if not quiet:
        _show(done, dense_accuracy, len(digits.test_labels), out)
    broken = [f"{run.mode}/{run.consistency}" for run in done if not run.result.report.certificate.holds]
    return f"the certificate does not hold: {'; '.join(broken)}" if broken else None


def _check_writable(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out):
        pass


def _tensors(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what safetensors can write: contiguous tensors that share no memory."""
    return {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in named.items()}


def _show(runs: Sequence[work.Run], dense_accuracy: float, samples: int, out: Path) -> None:
    """Print the table, what was left dense, the verdict on the default run, and where the files are."""
    console = Console(highlight=False)
    table = _table(runs, dense_accuracy, console.encoding)
    # a terminal too narrow for the table breaks its lines: better than digits cut off
    needed = Console(width=1000).measure(table).maximum
    Console(highlight=False, width=max(console.width, needed)).print(table)
    console.print()
    for run in runs:
        for name, reason in run.result.report.skipped.items():
            console.print(Text(f"{run.mode}/{run.consistency}: left dense: {name}: {reason}"), soft_wrap=True)
    notes = (
        f"accuracy: on {samples} test images, without retraining",
        "promised, measured: output discrepancy, Frobenius norm; holdout: relative, on samples kept out",
        f"{runs[-1].mode}/{runs[-1].consistency}: {runs[-1].result.report.certificate}",
        f"wrote its model.safetensors, masks.safetensors and report.json to {out}",
    )
    for note in notes:
        console.print(Text(note), soft_wrap=True)


def _table(runs: Sequence[work.Run], dense_accuracy: float, encoding: str) -> Table:
    """Return one section a run: a row for the network, then one for each layer. It fits 80 columns."""
    ruled = box.SIMPLE_HEAD if encoding.lower().replace("-", "") == "utf8" else box.ASCII
    table = Table(box=ruled, show_edge=False, pad_edge=False, padding=0)
    table.add_column("network", no_wrap=True)
    for header in ("density", "accuracy", "promised", "measured", "holdout", "gap"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("sec.", justify="right", no_wrap=True)
    table.add_row("dense", _share(1.0), _share(dense_accuracy), end_section=True)
    for run in runs:
        report, certificate = run.result.report, run.result.report.certificate
        table.add_row(
            f"{run.mode}/{run.consistency}",
            _share(report.density),
            _share(run.accuracy),
            number(certificate.guaranteed),
            number(certificate.measured),
            _share(certificate.holdout),
            "",
            "holds" if certificate.holds else "BROKEN",
            _seconds(report.seconds),
            style="bold" if certificate.holds else "bold red",
        )
        for layer in report.layers:
            figures = (number(layer.epsilon), number(layer.discrepancy), "", _share(layer.gap))
            table.add_row(
                Text(f"  {layer.name}"), _share(layer.density), "", *figures, layer.status, _seconds(layer.seconds)
            )
        for name in report.skipped:
            table.add_row(Text(f"  {name}"), *[""] * 6, "dense")
        table.add_section()
    return table


def _share(value: float | None) -> str:
    return percent(value).replace(" ", "")


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"
