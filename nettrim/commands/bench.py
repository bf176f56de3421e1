"""``nettrim bench``."""

from __future__ import annotations

import json
from pathlib import Path

import click

import nettrim
from nettrim import calibration as calibrations
from nettrim.commands.common import one_line_errors
from nettrim.commands.inputs import check_folder, dense_inputs
from nettrim.folder import write_page

_COUNT = click.IntRange(min=1)
_THERE = click.Path(exists=True, path_type=Path)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--batch", "batches", type=_COUNT, multiple=True, default=(1, 8, 64), show_default=True, help="Samples at a time, repeated.")
@click.option("--threads", type=_COUNT, multiple=True, help="Of torch, repeated; 1 and all processors by default.")
@click.option("--model", help="The dense network, where the recipe in DIR does not say it: as MODEL of 'nettrim prune'.")
@click.option("--weights", type=_THERE, help="Its weights, with a factory.")
@click.option("--calibration", type=_THERE, help="Samples to run it on, instead of the recipe's.")
@click.option("--json", "as_json", is_flag=True, help="Print the measurements as JSON.")
@one_line_errors
def bench(
    folder: Path,
    batches: tuple[int, ...],
    threads: tuple[int, ...],
    model: str | None,
    weights: Path | None,
    calibration: Path | None,
    as_json: bool,
) -> None:
    """Measure a pruned network beside the dense one on this machine: time and bytes of each form it can be in.

    The folder's report.html shows the fastest form from then on.

    Exits with 0 when it was measured, with 1 when it could not be.
    """
    check_folder(folder)
    source, data = dense_inputs(folder, model=model, weights=weights, calibration=calibration)
    example = calibrations.batches(data)[0]
    found = nettrim.bench(
        source.read_pruned(folder),
        source.model,
        example_inputs=example,
        batches=batches,
        threads=threads or None,
        forward_fn=source.forward_fn,
    )
    write_page(folder, found.facts)
    click.echo(json.dumps(found.to_dict(), indent=2, allow_nan=False) if as_json else str(found))
