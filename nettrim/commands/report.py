"""``nettrim report``."""

from __future__ import annotations

from pathlib import Path

import click

from nettrim.commands.common import one_line_errors
from nettrim.errors import ArgumentError
from nettrim.files import load_arrays
from nettrim.folder import MASKS, REPORT
from nettrim.report import Report


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write it as one HTML page instead of printing it.")
@one_line_errors
def report(folder: Path, as_json: bool, html: Path | None) -> None:
    """Print the report of a run from its output folder.

    Exits with 0 when its certificate holds, with 1 when it does not or there is no report.
    """
    if as_json and html is not None:
        raise click.UsageError("--json prints and --html writes; give one of them")
    found = read_report(folder)
    if html is not None:
        found.to_html(html, masks=load_arrays(folder / MASKS) if (folder / MASKS).is_file() else None)
    else:
        click.echo(found.to_json() if as_json else str(found))
    if not found.certificate.holds:
        raise click.exceptions.Exit(1)


def read_report(folder: Path) -> Report:
    """The report in an output folder."""
    if not (folder / REPORT).is_file():
        raise ArgumentError(f"{folder} has no {REPORT}; expected a folder that 'nettrim prune' wrote")
    return Report.from_json(folder / REPORT)
