"""Sparse layers and files against dense ones, on this machine: ``python -m benchmarks.speed``.

Every figure is a ratio of times taken in turns (:mod:`nettrim.timing`), the median of ``TURNS`` turns: on a machine that others use too, the
times go up and down together, and the ratio much less. With one thread, time is the thread's processor time; with more, it is that on the clock,
and wants a machine with nothing else on it.
"""

import itertools
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import nettrim
from benchmarks.options import Numbers, open_console
from benchmarks.results import Results
from nettrim import timing
from nettrim.sparse_linear import SparseLinear

Run = dict[str, Any]

DEFAULT_OUT = Path(__file__).parent / "results" / "speed.json"
TURNS = 25
WANTED = {0.1: 1.5, 0.05: 2.5}  # share kept: times as fast, of 1024 x 1024 at batch 1
WANTED_WIDTH = 1024


@dataclass(frozen=True)
class Protocol:
    """What is measured.

    Attributes
    ----------
    widths : tuple of int
        Of square layers.
    kept : tuple of float
        Shares of the weights, kept at random places.
    batches, threads : tuple of int
    blocks : tuple of int
        Sides of the blocks in which a tenth of the weights is kept.
    turns : int
    """

    widths: tuple[int, ...]
    kept: tuple[float, ...]
    batches: tuple[int, ...]
    threads: tuple[int, ...]
    blocks: tuple[int, ...]
    turns: int


FULL = Protocol((1024, 4096), (0.2, 0.1, 0.05, 0.02), (1, 8, 64), (1, 2), (4, 8, 16), TURNS)
TINY = Protocol((32,), (0.1, 0.05), (1, 4), (1,), (4,), 3)


def layer(width: int, kept: float, side: int, seed: int) -> nn.Linear:
    """A square layer with a share of its weights, at random places or in blocks of a side."""
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(width, width)
    blocks = torch.rand(width // side, width // side, generator=generator) < kept
    with torch.no_grad():
        linear.weight.copy_(torch.randn(width, width, generator=generator) / width**0.5)
        linear.weight.masked_fill_(~blocks.repeat_interleave(side, 0).repeat_interleave(side, 1), 0)
    return linear


def race(settings: Run, turns: int) -> Run:
    """One layer dense, in CSR and, where it has blocks, in BSR: microseconds, and times as fast as dense."""
    linear = layer(settings["width"], settings["kept"], settings["side"], settings["seed"])
    x = torch.randn(settings["batch"], settings["width"], generator=torch.Generator().manual_seed(1))
    calls = {"dense": linear, "csr": SparseLinear.from_linear(linear)}
    if settings["side"] > 1:
        calls["bsr"] = SparseLinear.from_linear(linear, settings["side"])
    found = timing.compare({form: _call(module, x) for form, module in calls.items()}, cpu=True, threads=settings["threads"], turns=turns)
    return {form: {"microseconds": 1e6 * one.seconds, "speedup": one.speedup} for form, one in found.items()}


def _call(module: nn.Module, x: Tensor) -> Any:
    return lambda: module(x)


def measure_file(settings: Run) -> Run:
    """The bytes of one layer in memory, dense and in CSR, and in a file; loaded again and compared bit for bit."""
    linear = layer(settings["width"], settings["kept"], settings["side"], settings["seed"])
    with tempfile.TemporaryDirectory() as folder:
        size = nettrim.save_compressed(linear, None, Path(folder) / "layer")
        loaded = nettrim.load_compressed(Path(folder) / "layer")
    if not all(torch.equal(loaded[name], value) for name, value in linear.state_dict().items()):
        raise click.ClickException(f"the file of {settings} does not hold what was written")
    sparse = SparseLinear.from_linear(linear).state_dict().values()
    return {"dense": size.dense_bytes, "csr": sum(value.numel() * value.element_size() for value in sparse), "file": size.bytes}


def _measured(results: Results, settings: Run, protocol: Protocol, console: Console) -> Run:
    done = results.find(settings)
    if done is not None:
        return done
    with console.status(", ".join(f"{key} {value}" for key, value in settings.items())):
        return results.append(settings, measure_file(settings) if settings["section"] == "files" else race(settings, protocol.turns))


def run_all(protocol: Protocol, results: Results, seed: int, console: Console) -> list[Run]:
    """Every section; what the results file holds is not measured again."""
    threads, batches = protocol.threads, protocol.batches
    settings = [
        {"section": "layers", "width": width, "kept": kept, "side": 1, "batch": batch, "threads": count, "seed": seed}
        for count, width, kept, batch in itertools.product(threads, protocol.widths, protocol.kept, batches)
    ]
    settings += [
        {"section": "blocks", "width": protocol.widths[0], "kept": 0.1, "side": side, "batch": batch, "threads": threads[0], "seed": seed}
        for side, batch in itertools.product(protocol.blocks, (*batches, 4 * batches[-1]))
    ]
    settings += [{"section": "files", "width": protocol.widths[0], "kept": kept, "side": 1, "seed": seed} for kept in protocol.kept]
    return [_measured(results, each, protocol, console) for each in settings]


def tables(runs: list[Run]) -> list[Table]:
    """A table a section: times as fast as dense, and bytes."""
    found = []
    for section, keys in (("layers", ("threads", "width", "kept")), ("blocks", ("width", "side"))):
        chosen = [run for run in runs if run["settings"]["section"] == section]
        batches = list(dict.fromkeys(run["settings"]["batch"] for run in chosen))
        forms = [form for form in ("csr", "bsr") if chosen and form in chosen[0]]
        headers = (*keys, *(f"{form}, batch {batch}" for batch in batches for form in forms), f"dense µs, batch {batches[0]}")
        rows: dict[tuple[Any, ...], list[str]] = {}
        for run in chosen:
            cells = rows.setdefault(tuple(run["settings"][key] for key in keys), [])
            cells += [f"{run[form]['speedup']:.2f}" for form in forms]
        for run in chosen:
            if run["settings"]["batch"] == batches[0]:
                rows[tuple(run["settings"][key] for key in keys)].append(f"{run['dense']['microseconds']:.0f}")
        found.append(_table(f"{section}: times as fast as dense", headers, [(*map(str, key), *cells) for key, cells in rows.items()]))
    files = [run for run in runs if run["settings"]["section"] == "files"]
    rows_of_files = [
        (f"{run['settings']['width']}", f"{run['settings']['kept']}", f"{run['dense']:,}", f"{run['csr']:,}", f"{run['file']:,}") for run in files
    ]
    found.append(_table("files: bytes", ("width", "kept", "dense", "CSR in memory", "compressed file"), rows_of_files))
    return found


def _table(title: str, headers: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    table = Table(title=title, box=box.MARKDOWN, title_justify="left")
    for header in headers:
        table.add_column(header, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def verdicts(runs: list[Run]) -> list[tuple[str, bool]]:
    """What is wanted of a 1024 x 1024 layer at batch 1 with one thread, and whether it was reached."""
    found = []
    for run in runs:
        settings = run["settings"]
        asked = (settings["section"], settings["width"], settings.get("batch"), settings.get("threads")) == ("layers", WANTED_WIDTH, 1, 1)
        if asked and settings["kept"] in WANTED:
            wanted, speedup = WANTED[settings["kept"]], run["csr"]["speedup"]
            found.append((f"{settings['kept']:.0%} kept: {speedup:.2f} times as fast, wanted {wanted}", speedup >= wanted))
    return found


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--tiny", is_flag=True, help="Layers of 32 x 32, three turns: that it runs, not what it says.")
@click.option("--widths", type=Numbers(int), help="Of square layers.")
@click.option("--kept", type=Numbers(float), help="Shares of the weights kept, for example .1,.05.")
@click.option("--batches", type=Numbers(int), help="Rows of inputs.")
@click.option("--threads", type=Numbers(int), help="Of torch.")
@click.option("--turns", type=click.IntRange(min=1), help="Of which the median is taken.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the weights.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=DEFAULT_OUT, show_default=True)
def main(tiny: bool, seed: int, out: Path, **chosen: Any) -> None:
    """Time sparse layers beside dense ones, and weigh compressed files.

    Every figure is written to the results file as soon as it is there, and is not measured again by the next call. Exits with 1 where a layer of
    1024 x 1024 at batch 1 with one thread is not as fast as wanted: 1.5 times at 10 % kept, 2.5 times at 5 %.
    """
    console = open_console()
    protocol = replace(TINY if tiny else FULL, **{name: value for name, value in chosen.items() if value is not None})
    if any(share > 1 for share in protocol.kept):
        raise click.BadParameter("a share of the weights is at most 1.", param_hint="--kept")
    if any(width % side for width in protocol.widths for side in protocol.blocks):
        raise click.BadParameter(f"a width is to be a multiple of {', '.join(map(str, protocol.blocks))}, the blocks.", param_hint="--widths")
    results = Results(out, "speed")
    runs = run_all(protocol, results, seed, console)
    for table in tables(runs):
        console.print(table)
    missed = 0
    for line, reached in verdicts(runs):
        console.print(f"{'reached' if reached else 'MISSED'}: {line}", highlight=False)
        missed += not reached
    console.print(results.describe(runs), highlight=False)
    console.print(f"written: {out}", highlight=False, soft_wrap=True)
    if missed:
        raise click.ClickException(f"{missed} of the speeds wanted were not reached; on a busy machine, measure again with another --out.")


if __name__ == "__main__":
    main()
