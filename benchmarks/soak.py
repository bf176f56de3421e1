"""The long form of the tests of trust, in one table: ``python -m benchmarks.soak`` (``make soak``), at most 30 minutes on 2 cores.

Crashes, exceptions, malformed files, certificates, calls at once, and calls in a row: how many there were, and in how many the outcome was wrong. The
last line is ``wrong: 0``, and the exit code 0, where none was.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Iterator

import click
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import soak_faults, soak_load, soak_resume

LEAST_SLOPE = 50_000  # bytes a call that count as a leak: below it is what the allocator keeps of a few hundred calls


@dataclasses.dataclass(frozen=True)
class Figure:
    """One row: what was done and how often, what came of it, and how often that was wrong."""

    what: str
    done: int
    outcome: str
    wrong: int
    complaints: tuple[str, ...] = ()


def crashes(scale: float, seed: int) -> Iterator[Figure]:
    found = soak_resume.crashes(max(4, round(60 * scale)), seed)
    for scenario in ("cascade", "exact zeros"):
        found.add(soak_resume.crashes_at_files(scenario, seed, every=max(1, round(1 / scale))))
    outcome = f"in {found.runs} runs, {found.damaged} files damaged; {found.resumed} layers resumed, {found.repeated} repeated; {found.lost} lost"
    yield Figure("crashes injected", found.injected, outcome, found.lost + found.repeated, tuple(found.complaints))


def faults(scale: float, seed: int) -> Iterator[Figure]:
    found = soak_faults.faults(per_line=3 if scale >= 1 else 2, seed=seed, share=min(1.0, scale))
    yield Figure("exceptions injected", found.injected, f"at {found.places} lines; {found.wrong} left a trace", found.wrong, tuple(found.complaints))


def files(scale: float, seed: int) -> Iterator[Figure]:
    from benchmarks import soak_files  # here, with the checker that it needs: the other parts do without

    found = soak_files.soak(max(50, round(10_000 * scale)), seed)
    outcome = f"{found['refused']} refused, {found['read']} read all the same; slowest {found['seconds']:.2f} s"
    yield Figure("files fuzzed", found["cases"], f"{outcome}; {len(found['wrong'])} wrong outcomes", len(found["wrong"]), tuple(found["wrong"]))


def certificates(scale: float, seed: int) -> Iterator[Figure]:
    from benchmarks import soak_certificates

    found = soak_certificates.soak(max(20, round(1000 * scale)), seed)
    undecided = f"{len(found['agreed'])} agreed, {len(found['open'])} open"
    outcome = f"{found['optimal']} called optimal, {found['true']} proven exactly, {undecided}; {len(found['false'])} false"
    yield Figure("programs certified", found["programs"], outcome, len(found["false"]), (*found["false"], *found["open"]))


def load(scale: float, seed: int) -> Iterator[Figure]:
    loads = [*soak_load.at_once(max(1, round(3 * scale))), soak_load.workers()]
    different = sum(one.differences for one in loads)
    complaints = tuple(complaint for one in loads for complaint in one.complaints)
    outcome = f"{soak_load.AT_ONCE} at once, in threads, processes and on one model; {different} differences"
    yield Figure("concurrent runs", sum(one.runs for one in loads), outcome, different, complaints)
    for name, asked in soak_load.ON_ONE_AND_TWO.items():
        found = soak_load.thread_counts(asked)
        outcome = f"{name}: weights differ by {found.weights:.1e}, {found.masks} of {found.entries} mask entries, the output by {found.output:.1e}"
        yield Figure("one thread against two", 2, outcome, int(not found.within(asked)))


def leaks(scale: float, seed: int) -> Iterator[Figure]:
    found = soak_load.leak(max(9, round(200 * scale)))
    wrong = int(found.files_per_run > 0.01) + int(found.threads_per_run > 0.01) + int(scale >= 1 and found.bytes_per_run > LEAST_SLOPE)
    outcome = f"{found.bytes_per_run / 1000:+.1f} kB, {found.files_per_run:+.3f} files, {found.threads_per_run:+.3f} threads a run"
    yield Figure("runs in one process", found.runs, outcome, wrong)


PARTS: dict[str, Callable[[float, int], Iterator[Figure]]] = {
    "crashes": crashes,  # first: it forks, and threads of later parts would not come along
    "faults": faults,
    "files": files,
    "certificates": certificates,
    "leaks": leaks,
    "load": load,
}


@click.command()
@click.option("--scale", type=click.FloatRange(min=0.001), default=1.0, show_default=True, help="How much of it: 1 takes up to half an hour.")
@click.option("--seed", type=int, default=None, help="Of what is drawn; another one each time where none is given.")
@click.option("--part", "parts", type=click.Choice(list(PARTS)), multiple=True, help="Only these parts.")
def main(scale: float, seed: int | None, parts: tuple[str, ...]) -> None:
    """Inject faults, fuzz files, judge certificates and run calls at once; print the figures, exit with 1 where an outcome was wrong."""
    seed = int.from_bytes(os.urandom(4)) if seed is None else seed
    table = Table(title=f"nettrim under faults and load, seed {seed}, scale {scale:g}")
    for header, justify in (("what", "left"), ("number", "right"), ("outcome", "left"), ("wrong", "right"), ("seconds", "right")):
        table.add_column(header, justify=justify, overflow="fold")  # type: ignore[arg-type]
    wrong = 0
    torch.set_num_threads(1)
    for name in parts or PARTS:
        start = time.perf_counter()
        for figure in PARTS[name](scale, seed):
            seconds, start = time.perf_counter() - start, time.perf_counter()
            table.add_row(figure.what, f"{figure.done:,}", figure.outcome, str(figure.wrong), f"{seconds:.0f}")
            wrong += figure.wrong
            for complaint in figure.complaints:
                click.echo(f"{figure.what}: {complaint}")
    Console(width=150, highlight=False).print(table)
    click.echo(f"wrong: {wrong}")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
