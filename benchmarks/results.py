"""A benchmark's results file: JSON, rewritten after every run, that a second call resumes from."""

import json
import os
import platform
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

from nettrim.errors import NetTrimError

SCHEMA = 1  # of the file; raised when what is written today would be misread by an older reader
_ROOT = Path(__file__).resolve().parent.parent


def _git(*arguments: str) -> str | None:
    """What git answers in the checkout, or None where there is no git or no checkout."""
    try:
        done = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _processor() -> str:
    """The processor's own name where the system tells it; its architecture otherwise."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """What a figure depends on besides the settings: the commit, the hardware and the versions.

    Returns
    -------
    dict
        ``commit`` (None outside a git checkout; with ``+changes`` when the checkout was modified), ``system``,
        ``processor``, ``cpus`` (those this process may use), ``threads`` (torch's), ``python``, ``torch``, ``nettrim``.
    """
    commit = _git("rev-parse", "HEAD")
    if commit and _git("status", "--porcelain"):
        commit += "+changes"
    affinity = getattr(os, "sched_getaffinity", None)
    try:
        nettrim_version = version("nettrim")
    except PackageNotFoundError:
        nettrim_version = "checkout"
    return {
        "commit": commit,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cpus": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "nettrim": nettrim_version,
    }


class Results:
    """The runs of one benchmark, kept in a JSON file.

    The file holds ``benchmark``, ``environments`` and ``runs``; every run holds its ``settings`` (which identify it),
    the index of its ``environment``, and what was measured or, where it failed, an ``error``.

    Parameters
    ----------
    path : Path
        The file; it need not exist.
    benchmark : str
        Name of the benchmark; a file of another one is refused.

    Raises
    ------
    click.ClickException
        If the file exists and is no results file of this benchmark.
    """

    def __init__(self, path: Path, benchmark: str) -> None:
        self.path = path
        self._benchmark = benchmark
        self._environments: list[dict[str, Any]] = []
        self.runs: list[dict[str, Any]] = []
        if path.exists():
            try:
                content = json.loads(path.read_text())
                found = (content["benchmark"], content["schema"])
                self._environments, self.runs = list(content["environments"]), list(content["runs"])
            except (OSError, ValueError, TypeError, KeyError) as error:
                raise click.ClickException(
                    f"{path} cannot be read as results ({error!r}); move it away or name another file."
                ) from error
            if found != (benchmark, SCHEMA):
                raise click.ClickException(
                    f"{path} holds results of {found[0]!r}, schema {found[1]}; expected {benchmark!r}, schema "
                    f"{SCHEMA}. Move it away or name another file."
                )

    def find(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The run with these settings that did not fail, or None: failed runs are tried again."""
        return next((run for run in self.runs if run["settings"] == settings and "error" not in run), None)

    def measured(self, settings: dict[str, Any], work: Callable[[], dict[str, Any]], console: Console, label: str) -> dict[str, Any]:
        """The run with these settings: from the file, or done now; one that fails is recorded with its error.

        Parameters
        ----------
        settings : dict
        work : callable
            Gives what is measured. A `NetTrimError` of it is told and recorded, and the benchmark goes on; others end it.
        console : Console
        label : str
            Of the run, for the terminal.
        """
        done = self.find(settings)
        if done is not None:
            return done
        try:
            with console.status(label):
                return self.append(settings, work())
        except NetTrimError as error:
            console.print(f"[red]failed[/red] {label}: {error}")
            return self.append(settings, {"error": f"{type(error).__name__}: {error}"})

    def append(self, settings: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
        """Add a run, in place of a failed one with the same settings, and write the file at once."""
        here = environment()
        if here not in self._environments:
            self._environments.append(here)
        run = {"settings": settings, "environment": self._environments.index(here), **measured}
        self.runs = [other for other in self.runs if other["settings"] != settings] + [run]
        content = {
            "schema": SCHEMA,
            "benchmark": self._benchmark,
            "environments": self._environments,
            "runs": self.runs,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f"{self.path.name}.part")
        partial.write_text(json.dumps(content, indent=1) + "\n")
        # Replaced in one step: a run that is interrupted while it writes loses nothing that was measured before.
        partial.replace(self.path)
        return run

    def describe(self, runs: list[dict[str, Any]]) -> str:
        """One Markdown line an environment that the given runs were measured in."""
        lines = []
        for index in sorted({run["environment"] for run in runs}):
            found = self._environments[index]
            lines.append(
                f"{found['processor']}, {found['cpus']} CPUs, {found['threads']} threads, {found['system']}, Python "
                f"{found['python']}, torch {found['torch']}; commit {found['commit'] or 'unknown'}."
            )
        return "\n".join(lines)
