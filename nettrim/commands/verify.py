"""``nettrim verify``."""

from __future__ import annotations

import json
from pathlib import Path

import click

import nettrim
from nettrim.commands.common import one_line_errors
from nettrim.commands.inputs import check_folder, dense_inputs
from nettrim.commands.report import read_report
from nettrim.files import load_arrays
from nettrim.folder import MASKS

_THERE = click.Path(exists=True, path_type=Path)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--model", help="The dense network, where the recipe in DIR does not say it or you do not trust it: as MODEL of 'nettrim prune'.")
@click.option("--weights", type=_THERE, help="Its weights, with a factory.")
@click.option("--calibration", type=_THERE, help="The calibration data, instead of the recipe's.")
@click.option("--bounds/--no-bounds", default=True, show_default=True, help="Prove the lower bounds too, which takes most of the time.")
@click.option("--json", "as_json", is_flag=True, help="Print every check as JSON.")
@click.option("--quiet", is_flag=True, help="Print nothing: only the exit code.")
@one_line_errors
def verify(folder: Path, model: str | None, weights: Path | None, calibration: Path | None, bounds: bool, as_json: bool, quiet: bool) -> None:
    """Compute every promise of a run again, from the dense network, the pruned one and the data.

    The dense network and the calibration data are those that the recipe in DIR names: a factory named there is run, so give --model for a folder
    that you do not trust. Exits with 0 when everything holds, with 1 when something is broken or cannot be read.
    """
    if quiet and as_json:
        raise click.UsageError("--quiet prints nothing and --json prints; give one of them")
    check_folder(folder)
    report = read_report(folder)
    masks = load_arrays(folder / MASKS)
    source, data = dense_inputs(folder, model=model, weights=weights, calibration=calibration)
    found = nettrim.verify(source.model, source.read_pruned(folder), data, report, masks=masks, forward_fn=source.forward_fn, bounds=bounds)
    if not quiet:
        click.echo(json.dumps(found.to_dict(), indent=2, allow_nan=False) if as_json else str(found))
    if not found.holds:
        raise click.exceptions.Exit(1)
