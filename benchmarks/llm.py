"""``python -m benchmarks.llm``: a language model pruned by ours and by one-shot pruners of others, judged by its perplexity on another text.

Every method keeps as many weights of each linear layer, sees the same tokens, and prunes block by block, each layer on the inputs that the network
pruned so far gives it. Nothing is retrained; figures are taken from the weights. What is compared is in ``benchmarks/README.md``.
"""

import copy
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import nettrim
from benchmarks.data import DataError
from benchmarks.llm_data import LOADERS, Subject
from benchmarks.memory import PeakMemory
from benchmarks.pruners import PRUNERS, parse_pattern
from benchmarks.results import Results
from benchmarks.solver_session import limited_threads
from benchmarks.sparsity_minilm import keeps

DEFAULT_OUT = Path(__file__).resolve().parent / "results" / "llm.json"
PEERS = ("magnitude", "wanda", "sparsegpt", "alps")
OURS: dict[str, dict[str, Any]] = {"nettrim": {"repair": 0.5}, "nettrim-full-repair": {"repair": 1.0}}
METHODS = (*PEERS, "nettrim")
LEVELS = ("0.5", "0.3", "2:4")  # kept
BATCH = 4  # sequences through the network at a time
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


def kept_of(layer: nn.Linear, level: str) -> int | str:
    """What a layer may keep: a number of weights, or the pattern."""
    return level if ":" in level else round(float(level) * layer.weight.numel())


def _linear(block: nn.Module) -> list[list[nn.Linear]]:
    """A block's linear layers, those with one input together, in the order in which they run."""
    found = dict(block.named_modules())
    groups = ("self_attn.q_proj self_attn.k_proj self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj mlp.up_proj", "mlp.down_proj")
    return [[found[name] for name in group.split()] for group in groups]  # type: ignore[misc]


class _Reached(Exception):
    """The layer has been given its input."""


def _inputs(block: nn.Module, calls: list[tuple[Any, Any]], layer: nn.Linear) -> Iterator[Tensor]:
    """What the layer is given in a block, as rows, batch by batch."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0].flatten(0, -2))
        raise _Reached

    handle = layer.register_forward_pre_hook(hook)
    try:
        for args, kwargs in calls:
            try:
                block(*args, **kwargs)
            except _Reached:
                yield seen.pop()
    finally:
        handle.remove()


def _calls(model: nn.Module, batches: list[Tensor], block: nn.Module) -> list[tuple[Any, Any]]:
    seen: list[tuple[Any, Any]] = []

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append((args, kwargs))
        raise _Reached

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        for batch in batches:
            try:
                hidden_states(model, batch)
            except _Reached:
                continue
    finally:
        handle.remove()
    return seen


@torch.no_grad()
def prune_by_peer(model: nn.Module, tokens: Tensor, level: str, method: str) -> nn.Module:
    """A copy of the network, pruned block by block by one of `PEERS`; the layers that are given the same input share its Gram matrix."""
    pruned = copy.deepcopy(model)
    inner: Any = pruned.model
    calls = _calls(pruned, list(tokens.split(BATCH)), inner.layers[0])
    for block in inner.layers:
        for group in _linear(block):
            G = torch.zeros((group[0].in_features,) * 2, dtype=torch.float64)
            if method != "magnitude":
                for A in _inputs(block, calls, group[0]):
                    exact = A.double()
                    G.addmm_(exact.T, exact)
            for layer in group:
                layer.weight.copy_(PRUNERS[method](layer.weight.detach().clone(), G, kept_of(layer, level)))
        for index, (args, kwargs) in enumerate(calls):
            calls[index] = ((block(*args, **kwargs), *args[1:]), kwargs)
    return pruned


def prune_by_ours(model: nn.Module, tokens: Tensor, level: str, method: str, seed: int) -> nn.Module:
    """The same by the public call."""
    asked: dict[str, Any] = {"pattern": level} if ":" in level else {"sparsity": 1 - float(level), "allocation": "uniform"}
    result = nettrim.prune(
        model, list(tokens.split(BATCH)), **asked, **OURS[method], fidelity="layer", holdout=0.0, seed=seed, forward_fn=hidden_states
    )
    if not result.report.certificate.holds:
        raise click.ClickException(f"the certificate does not hold: {result.report.certificate.explanation}")
    return result.model


def measure(subject: Subject, settings: Run) -> Run:
    """Prune once and measure what the table shows; ``dense`` is the network as it is.

    Seconds are of this process's processors, so that a busy machine does not decide; memory is what is taken beyond the dense network.
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
    inner: Any = pruned.model
    weights = [layer for block in inner.layers for group in _linear(block) for layer in group]
    return {
        "perplexity": perplexity(pruned, subject.judged),
        "seconds": seconds,
        "wall_seconds": wall,
        "extra_bytes": memory.extra,
        "model_bytes": sum(p.numel() * p.element_size() for p in subject.model.parameters()),
        "density": sum(int(layer.weight.count_nonzero()) for layer in weights) / sum(layer.weight.numel() for layer in weights),
        "within": all(keeps(layer.weight.detach(), kept_of(layer, level)) for layer in weights),
    }


def draw(runs: list[Run], console: Console) -> None:
    """The table: methods down, levels across."""
    levels = list(dict.fromkeys(run["settings"]["kept"] for run in runs if run["settings"]["method"] != "dense"))
    dense = next((run["perplexity"] for run in runs if run["settings"]["method"] == "dense"), math.nan)
    table = Table(title=f"Perplexity (dense {dense:.1f}), processor seconds, memory beyond the network")
    table.add_column("method")
    for level in levels:
        table.add_column(f"{level} kept" if ":" in level else f"{1 - float(level):.0%} zeros", justify="right")
    for method in dict.fromkeys(run["settings"]["method"] for run in runs if run["settings"]["method"] != "dense"):
        cells = []
        for level in levels:
            run = next((r for r in runs if (r["settings"]["method"], r["settings"]["kept"]) == (method, level)), None)
            memory = "" if run is None or run["extra_bytes"] is None else f", {run['extra_bytes'] / 2**30:.2f} GiB"
            cells.append("" if run is None else f"{run['perplexity']:.1f} ({run['seconds']:.0f} s{memory})")
        table.add_row(method, *cells)
    console.print(table)


@click.command()
@click.option("--data", type=click.Choice(list(LOADERS)), default="smollm2", show_default=True, help="The network and its texts.")
@click.option("--methods", default=",".join(METHODS), show_default=True, help="Which, with commas between them.")
@click.option("--kept", default=",".join(LEVELS), show_default=True, help="Shares of each layer's weights, or patterns.")
@click.option("--sequences", type=int, default=32, show_default=True, help="To calibrate on.")
@click.option("--judged", type=int, default=32, show_default=True, help="To judge by.")
@click.option("--length", type=int, default=512, show_default=True, help="Tokens of each.")
@click.option("--blocks", type=int, default=None, help="Only the first so many blocks.")
@click.option("--quick", is_flag=True, help="Two blocks, four sequences of 128 tokens: to see that it works.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--threads", type=int, default=None, help="Of torch; all by default.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=DEFAULT_OUT, help="Results; a second call resumes.")
def main(data: str, methods: str, kept: str, quick: bool, threads: int | None, out: Path, **sizes: int | None) -> None:
    """Prune a language model by every method at every level, and compare perplexities."""
    console = Console(width=140)
    if quick:
        sizes |= {"sequences": 4, "judged": 4, "length": 128, "blocks": 2}
    wanted, levels = methods.split(","), kept.split(",")
    unknown = [name for name in wanted if name not in (*PEERS, *OURS)]
    if unknown:
        raise click.ClickException(f"--methods {unknown[0]!r}; expected some of {', '.join((*PEERS, *OURS))}")
    for level in levels:
        try:
            good = bool(parse_pattern(level)) if ":" in level else 0 < float(level) < 1
        except ValueError:
            good = False
        if not good:
            raise click.ClickException(f"--kept {level!r}; expected shares between 0 and 1, or patterns such as 2:4")
    results = Results(out, "llm")
    common: Run = {"data": data, **sizes}
    runs: list[Run] = []
    with limited_threads(threads):
        subject: Subject | None = None
        for settings in [{**common, "method": "dense", "kept": "1"}, *({**common, "method": m, "kept": k} for k in levels for m in wanted)]:
            run = results.find(settings)
            if run is None:
                subject = subject or LOADERS[data](**sizes)
                with console.status(f"{settings['method']}, {settings['kept']}"):
                    run = results.append(settings, measure(subject, settings))
                if not run.get("within", True):
                    raise DataError(f"{settings['method']} kept more than {settings['kept']}: no fair comparison.")
            runs.append(run)
    draw(runs, console)
    console.print(results.describe(runs))


if __name__ == "__main__":
    main()
