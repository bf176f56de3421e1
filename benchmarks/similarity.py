"""``python -m benchmarks.similarity``: a sentence encoder pruned by ours and by one-shot pruners of others, judged by the similarities it gives.

How similar two sentences are is the cosine of their embeddings, the normalised mean over the last block's tokens. Every method keeps as many weights
of each linear layer and sees the same tokens; nothing is retrained. What is compared is in ``benchmarks/README.md``.
"""

import time
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from scipy.stats import spearmanr
from torch import Tensor, nn

import nettrim
from benchmarks.llm import levels_of
from benchmarks.method_tables import print_table
from benchmarks.options import Choices, open_console
from benchmarks.peers_by_block import PEERS, kept_of, prune_blocks
from benchmarks.results import Results
from benchmarks.similarity_data import LOADERS, Subject
from benchmarks.solver_session import limited_threads
from benchmarks.sparsity_minilm import keeps
from nettrim.errors import NetTrimError

DEFAULT_OUT = Path(__file__).resolve().parent / "results" / "similarity.json"
OURS: dict[str, dict[str, Any]] = {
    "nettrim": {},
    "nettrim-half-repair": {"repair": 0.5},
    "nettrim-layer": {"repair": 0.5, "fidelity": "layer"},
    "nettrim-damped": {"repair": 0.6, "damping": 0.15, "fidelity": "layer"},
}
METHODS = (*PEERS, *OURS)
BATCH = 16  # sequences through the network at a time
Run = dict[str, Any]


def embed(model: nn.Module, batch: Any) -> Tensor:
    """Embeddings (sentences, width) of unit norm: the mean over a sentence's tokens; of a tensor, all tokens count."""
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch, "attention_mask": torch.ones_like(batch)}
    states = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(states)
    return nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)


@torch.no_grad()
def similarities(model: nn.Module, subject: Subject) -> tuple[Tensor, Tensor]:
    """Embeddings (sentences, width) of all sentences, and the cosine of every pair's, (pairs,)."""
    embeddings = torch.cat([embed(model, batch) for batch in subject.sentences])
    left, right = (embeddings[subject.pairs[:, side]] for side in (0, 1))
    return embeddings, (left * right).sum(1)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks, whose linear layers are pruned."""
    encoder: Any = model.encoder
    return list(encoder.layer)


def prune_by_ours(model: nn.Module, tokens: Tensor, level: str, method: str, seed: int) -> nn.Module:
    """By the public call, the embeddings as the network's output."""
    asked: dict[str, Any] = {"pattern": level} if ":" in level else {"sparsity": 1 - float(level), "allocation": "uniform"}
    result = nettrim.prune(model, list(tokens.split(BATCH)), **asked, **OURS[method], holdout=0.0, seed=seed, forward_fn=embed)
    if not result.report.certificate.holds:
        raise NetTrimError(f"the certificate does not hold: {result.report.certificate.explanation}")
    return result.model


def measure(subject: Subject, settings: Run) -> Run:
    """Prune once and measure what the table shows.

    Returns
    -------
    dict
        ``spearman``, the rank correlation of the pairs' similarities with the dense network's; ``same``, the mean cosine of a sentence's embedding
        with its dense one; ``seconds`` of this process's processors, pruning alone; ``density`` and ``within``.

    Raises
    ------
    NetTrimError
        If the network could not be pruned, or a promise of ours is not kept.
    """
    method, level = settings["method"], settings["kept"]
    start = time.process_time()
    if method in OURS:
        pruned = prune_by_ours(subject.model, subject.calibration, level, method, settings["seed"])
    else:
        pruned = prune_blocks(subject.model, blocks, embed, subject.calibration.split(BATCH), level, method)
    seconds = time.process_time() - start
    (dense, wanted), (embeddings, found) = (similarities(model, subject) for model in (subject.model, pruned))
    weights = [layer.weight.detach() for block in blocks(pruned) for layer in block.modules() if isinstance(layer, nn.Linear)]
    allowed = [kept_of(layer, level) for block in blocks(pruned) for layer in block.modules() if isinstance(layer, nn.Linear)]
    return {
        "spearman": float(spearmanr(wanted, found).statistic),
        "same": float((dense * embeddings).sum(1).mean()),
        "seconds": seconds,
        "density": sum(int(W.count_nonzero()) for W in weights) / sum(W.numel() for W in weights),
        "within": all(keeps(W, kept) for W, kept in zip(weights, allowed, strict=True)),
    }


def _cell(run: Run) -> str:
    if "error" in run:
        return "failed"
    return f"{run['spearman']:.4f} / {run['same']:.4f} / {run['seconds']:.0f}" + ("" if run["within"] else " keeps too many")


def draw(runs: list[Run], console: Console) -> None:
    """The table: methods down, levels across."""
    found = {(run["settings"]["method"], run["settings"]["kept"]): _cell(run) for run in runs}
    levels = list(dict.fromkeys(level for _, level in found))
    print_table(
        console,
        "all-MiniLM-L6-v2: Spearman correlation of similarities / cosine of embeddings, with the dense network's / processor seconds",
        ("method", *(f"{level} kept" if ":" in level else f"{1 - float(level):.0%} zeros" for level in levels)),
        [(method, *(found.get((method, level), "") for level in levels)) for method in dict.fromkeys(method for method, _ in found)],
        f"{runs[0]['settings']['pairs']:,} pairs of sentences, of another text than the calibration; not retrained",
    )


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--data", type=click.Choice(list(LOADERS)), default="minilm", show_default=True, help="The network and its texts.")
@click.option("--methods", type=Choices(*METHODS), default=",".join(METHODS), show_default=True)
@click.option("--kept", default="0.5,2:4", show_default=True, callback=levels_of, help="Shares of each layer's weights, or patterns.")
@click.option("--sequences", type=click.IntRange(min=1), default=64, show_default=True, help="To calibrate on.")
@click.option("--length", type=click.IntRange(min=4), default=128, show_default=True, help="Tokens of each.")
@click.option("--pairs", type=click.IntRange(min=3), default=1000, show_default=True, help="Of sentences, to judge by.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="Of torch and numpy; the machine's default if not given.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=DEFAULT_OUT, help="Results; a second call resumes.")
def main(data: str, methods: tuple[str, ...], kept: tuple[str, ...], threads: int | None, out: Path, **sizes: int) -> None:
    """Prune a sentence encoder by every method at every level, and compare which sentences it finds similar.

    Every run is written to the results file as soon as it is done, and is not repeated by the next call. Exits with 1 if a run failed, or a
    method kept more weights than it was allowed.
    """
    console = open_console()
    results = Results(out, "similarity")
    runs: list[Run] = []
    with limited_threads(threads):
        subject = LOADERS[data](**sizes)
        for level in kept:
            for method in methods:
                settings: Run = {"data": data, **sizes, "method": method, "kept": level, "arguments": OURS.get(method, {})}
                runs.append(results.measured(settings, partial(measure, subject, settings), console, f"{method}, {level}"))
    draw(runs, console)
    console.print(results.describe(runs), highlight=False)
    console.print(f"written: {out}", highlight=False, soft_wrap=True)
    broken = [run for run in runs if "error" in run or not run["within"]]
    if broken:
        raise click.ClickException(f"{len(broken)} of {len(runs)} runs failed or kept too many weights; see {out}.")


if __name__ == "__main__":
    main()
