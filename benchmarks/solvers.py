"""``python -m benchmarks.solvers``: how fast the solvers are, and how good what they find provably is.

Six sections, each against peers in the same process on the same problem; what the project asks of each figure is in the
last table. Times are wall clock, of one run each: they want a machine with nothing else on it.
"""

import functools
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import click

from benchmarks.data import load
from benchmarks.networks import RECIPES
from benchmarks.options import Choices, open_console
from benchmarks.results import Results
from benchmarks.solver_agreement import agreement
from benchmarks.solver_figures import draw
from benchmarks.solver_mnist import layer1, many
from benchmarks.solver_peers import cvxpy_sized, load_peer
from benchmarks.solver_scaling import growth, wide
from benchmarks.solver_session import Session, Sizes, limited_threads
from nettrim.errors import NetTrimError

DEFAULT_OUT = Path(__file__).resolve().parent / "results" / "solvers.json"

SECTIONS: dict[str, Callable[[Session], None]] = {
    "mnist-layer1": layer1,
    "mnist-60000": many,
    "cvxpy-sized": cvxpy_sized,
    "wide": wide,
    "growth": growth,
    "agreement": agreement,
}

FULL = Sizes()
QUICK = Sizes(
    network="lenet",
    recipe=replace(RECIPES["plain"], epochs=3),
    neurons=30,
    samples=500,
    many_samples=3000,
    tolerances=(1e-2, 1e-3),
    peer_iterations=(50, 100),
    caps=(20, 40, 80, 160),
    oracle=(150, 20, 4),
    wide=(192, 256),
    wide_rows=4096,
    wide_chunk=512,
    base=(500, 40, 8),
    factors={"P": (0.5, 1, 2, 4), "N": (0.5, 1, 2), "M": (0.5, 1, 2, 4)},
    repeats=1,
)
TINY = replace(
    QUICK,
    data="digits",
    network="tiny",
    recipe=replace(RECIPES["plain"], epochs=20),
    neurons=6,
    samples=100,
    many_samples=400,
    peer_iterations=(10, 20),
    caps=(20, 60),
    oracle=(40, 8, 2),
    wide=(24,),
    wide_rows=256,
    wide_chunk=100,
    base=(100, 10, 3),
    factors={"P": (1, 4), "N": (1, 2), "M": (1, 2)},
)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="Everything small: under a minute on two cores. Its ratios say little.")
@click.option("--data", type=click.Choice(["mnist", "digits"]), default="mnist", show_default=True, help="digits: tiny.")
@click.option("--only", type=Choices(*SECTIONS), help=f"Sections, of {','.join(SECTIONS)}.")
@click.option(
    "--peer",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A checkout of the authors' code (DNNToolBox/Net-Trim), to run beside ours.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of samples and random layers.")
@click.option("--threads", type=click.IntRange(min=1), help="Of torch and numpy; the machine's default if not given.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=DEFAULT_OUT, show_default=True)
def main(
    quick: bool, data: str, only: tuple[str, ...] | None, peer: Path | None, seed: int, threads: int | None, out: Path
) -> None:
    """Measure nettrim's solvers against the authors' algorithm, general conic solvers, and the machine.

    Every run is added to the results file as soon as it is done; nothing measured earlier is used again. A section that
    fails is reported, and the others still run; the exit code is then 1. A figure that is not what was asked for is shown
    as such, and is no failure: only the full size on a quiet machine can tell.
    """
    # where nobody watches, lines are as long as the tables need
    console = open_console()
    sizes = TINY if data == "digits" else QUICK if quick else FULL
    failed = []
    with limited_threads(threads) as used:
        session = Session(
            results=Results(out, "solvers"),
            console=console,
            sizes=sizes,
            seed=seed,
            threads=used,
            data=functools.cache(lambda: load(sizes.data)),
            peer=None if peer is None else load_peer(peer),
        )
        for name in only or SECTIONS:
            try:
                SECTIONS[name](session)
            except (NetTrimError, BrokenProcessPool) as error:
                failed.append(name)
                session.record(name, "failed", {}, {"error": f"{type(error).__name__}: {error}"})
                console.print(f"[red]failed[/red] {name}: {error}")
    session.table(
        "what was asked for" + ("" if sizes is FULL else " of the full size, which this is not"),
        ("section", "figure", "found", "asked", "met"),
        [(c.section, c.what, c.found, f"{c.relation} {c.asked:g}", "yes" if c.met else "NO") for c in session.checks],
    )
    console.print(session.results.describe(session.runs), highlight=False)
    for path in [out, *draw(session, out)]:
        console.print(f"written: {path}", highlight=False, soft_wrap=True)
    if failed:
        raise click.ClickException(f"{len(failed)} of {len(only or SECTIONS)} sections failed: {', '.join(failed)}; see {out}.")


if __name__ == "__main__":
    main()
