"""``python -m benchmarks.llm``: a language model pruned by ours and by one-shot pruners of others, judged by its perplexity on another text.

Every method keeps as many weights of each linear layer, sees the same tokens, and prunes block by block, each layer on the inputs that the network
pruned so far gives it. Nothing is retrained; figures are taken from the weights. What is compared is in ``benchmarks/README.md``.
"""

import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from torch import Tensor, nn

import nettrim
from benchmarks.llm_data import LOADERS, Subject
from benchmarks.memory import PeakMemory
from benchmarks.method_tables import print_table
from benchmarks.options import Choices, open_console
from benchmarks.peers_by_block import PEERS, kept_of, prune_blocks
from benchmarks.pruners import parse_pattern
from benchmarks.results import Results
from benchmarks.solver_session import in_a_process, limited_threads
from benchmarks.sparsity_minilm import keeps
from nettrim.errors import NetTrimError

DEFAULT_OUT = Path(__file__).resolve().parent / "results" / "llm.json"
# Ours by the name in the table: what each adds to the same call of `nettrim.prune`.
OURS: dict[str, dict[str, Any]] = {
    "nettrim": {"repair": 0.6, "damping": 0.15, "fidelity": "diagonal"},
    "nettrim-layer": {"repair": 0.6, "damping": 0.15, "fidelity": "layer"},
    "nettrim-undamped": {"repair": 0.6, "fidelity": "diagonal"},
    "nettrim-full-repair": {"repair": 1.0, "fidelity": "diagonal"},
}
METHODS = (*PEERS, "nettrim")
LEVELS = ("0.5", "0.3", "2:4")  # kept
BATCH = 4  # sequences through the network at a time
# told under every table, because it is to ours' advantage
CHOSEN = "nettrim's repair=0.6, damping=0.15 and fidelity='diagonal' were chosen with this network at 70 % zeros (benchmarks/README.md says how)"
Run = dict[str, Any]


def hidden_states(model: nn.Module, tokens: Tensor) -> Tensor:
    """The network up to its head, which has the embedding's weights and stays as it is."""
    inner: Any = model.model
    return inner(input_ids=tokens, use_cache=False).last_hidden_state  # type: ignore[no-any-return]


@torch.no_grad()
def perplexity(model: nn.Module, rows: Tensor) -> float:
    """``exp`` of the mean negative log-likelihood of each token of the rows (sequences, tokens) but the first, given those before it."""
    total = 0.0
    for row in rows:
        logits = model(input_ids=row[None], use_cache=False).logits[0, :-1]
        total += float(nn.functional.cross_entropy(logits.float(), row[1:], reduction="sum"))
    return math.exp(total / (rows.shape[0] * (rows.shape[1] - 1)))


def blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks, whose linear layers are pruned."""
    inner: Any = model.model
    return list(inner.layers)


def prune_by_peer(model: nn.Module, tokens: Tensor, level: str, method: str) -> nn.Module:
    """A copy of the network, pruned block by block by one of `PEERS`."""
    return prune_blocks(model, blocks, hidden_states, tokens.split(BATCH), level, method)


def prune_by_ours(model: nn.Module, tokens: Tensor, level: str, method: str, seed: int) -> nn.Module:
    """The same by the public call."""
    asked: dict[str, Any] = {"pattern": level} if ":" in level else {"sparsity": 1 - float(level), "allocation": "uniform"}
    result = nettrim.prune(
        model, list(tokens.split(BATCH)), **asked, **OURS[method], holdout=0.0, seed=seed, forward_fn=hidden_states
    )
    if not result.report.certificate.holds:
        raise NetTrimError(f"the certificate does not hold: {result.report.certificate.explanation}")
    return result.model


def measure(subject: Subject, settings: Run) -> Run:
    """Prune once and measure what the table shows; ``dense`` is the network as it is.

    Seconds are of this process's processors, so that a busy machine does not decide; memory is what is taken beyond the dense network.

    Raises
    ------
    NetTrimError
        If the network could not be pruned, or a promise of ours is not kept.
    """
    method, level = settings["method"], settings["kept"]
    if method == "dense":
        return {"perplexity": perplexity(subject.model, subject.judged)}
    start, wall = time.process_time(), time.perf_counter()
    with PeakMemory() as memory:
        if method in OURS:
            pruned = prune_by_ours(subject.model, subject.calibration, level, method, settings["seed"])
        else:
            pruned = prune_by_peer(subject.model, subject.calibration, level, method)
    seconds, wall = time.process_time() - start, time.perf_counter() - wall
    weights = [layer for block in blocks(pruned) for layer in block.modules() if isinstance(layer, nn.Linear)]
    return {
        "perplexity": perplexity(pruned, subject.judged),
        "seconds": seconds,
        "wall_seconds": wall,
        "extra_bytes": memory.extra,
        "model_bytes": sum(p.numel() * p.element_size() for p in subject.model.parameters()),
        "density": sum(int(layer.weight.count_nonzero()) for layer in weights) / sum(layer.weight.numel() for layer in weights),
        "within": all(keeps(layer.weight.detach(), kept_of(layer, level)) for layer in weights),
    }


def measure_apart(data: str, sizes: dict[str, int | None], settings: Run, threads: int | None) -> Run:
    """`measure` with network and texts read anew: for a process of its own, where nothing that ran before is in its memory."""
    with limited_threads(threads):
        return measure(LOADERS[data](**sizes), settings)


def _cell(run: Run) -> str:
    if "error" in run:
        return "failed"
    memory = "" if run["extra_bytes"] is None else f", {run['extra_bytes'] / 2**30:.2f} GiB"
    return f"{run['perplexity']:.1f} ({run['seconds']:.0f} s{memory})" + ("" if run["within"] else " keeps too many")


def draw(runs: list[Run], console: Console) -> None:
    """The table: methods down, levels across."""
    dense = next((run["perplexity"] for run in runs if run["settings"]["method"] == "dense" and "error" not in run), math.nan)
    found = {(run["settings"]["method"], run["settings"]["kept"]): _cell(run) for run in runs if run["settings"]["method"] != "dense"}
    levels = list(dict.fromkeys(level for _, level in found))
    print_table(
        console,
        f"Perplexity (dense {dense:.1f}), processor seconds, memory beyond the network",
        ("method", *(f"{level} kept" if ":" in level else f"{1 - float(level):.0%} zeros" for level in levels)),
        [(method, *(found.get((method, level), "") for level in levels)) for method in dict.fromkeys(method for method, _ in found)],
        CHOSEN,
    )


def levels_of(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:
    """The option ``--kept``: shares and patterns with commas between them, each once, as they were given."""
    levels = tuple(dict.fromkeys(word.strip() for word in value.split(",")))
    for level in levels:
        try:
            good = bool(parse_pattern(level)) if ":" in level else 0 < float(level) < 1
        except ValueError:
            good = False
        if not good:
            raise click.BadParameter(f"{level!r}; expected shares between 0 and 1, or patterns such as 2:4.", ctx, param)
    return levels


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--data", type=click.Choice(list(LOADERS)), default="smollm2", show_default=True, help="The network and its texts.")
@click.option("--methods", type=Choices(*PEERS, *OURS), default=",".join(METHODS), show_default=True, help=f"Of {','.join((*PEERS, *OURS))}.")
@click.option("--kept", default=",".join(LEVELS), show_default=True, callback=levels_of, help="Shares of each layer's weights, or patterns.")
@click.option("--sequences", type=int, default=32, show_default=True, help="To calibrate on.")
@click.option("--judged", type=int, default=32, show_default=True, help="To judge by.")
@click.option("--length", type=int, default=512, show_default=True, help="Tokens of each.")
@click.option("--blocks", type=int, default=None, help="Only the first so many blocks.")
@click.option("--quick", is_flag=True, help="Two blocks, four sequences of 128 tokens: to see that it works.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--threads", type=int, default=None, help="Of torch; all by default.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=DEFAULT_OUT, help="Results; a second call resumes.")
def main(data: str, methods: tuple[str, ...], kept: tuple[str, ...], quick: bool, threads: int | None, out: Path, **sizes: int | None) -> None:
    """Prune a language model by every method at every level, and compare perplexities.

    Every run has a process of its own, so that its peak memory is its own, and is written to the results file as soon as it is done; the next
    call does not repeat it. Exits with 1 if a run failed, or a method kept more weights than it was allowed.
    """
    console = open_console()
    if quick:
        sizes |= {"sequences": 4, "judged": 4, "length": 128, "blocks": 2}
    results = Results(out, "llm")
    runs: list[Run] = []
    with limited_threads(threads):
        for method, level in [("dense", "1"), *((method, level) for level in kept for method in methods)]:
            settings: Run = {"data": data, **sizes, "method": method, "kept": level, "arguments": OURS.get(method, {})}
            work = partial(measure_apart, data, sizes, settings, threads)
            # the tests' network is too small for its memory to mean anything
            runs.append(results.measured(settings, work if data == "tiny" else partial(in_a_process, work), console, f"{method}, {level}"))
    draw(runs, console)
    console.print(results.describe(runs), highlight=False)
    console.print(f"written: {out}", highlight=False, soft_wrap=True)
    broken = [run for run in runs if "error" in run or not run.get("within", True)]
    if broken:
        raise click.ClickException(f"{len(broken)} of {len(runs)} runs failed or kept too many weights; see {out}.")


if __name__ == "__main__":
    main()
