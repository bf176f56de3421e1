"""A Hugging Face folder: ``config.json`` says which class of transformers the network is, and a tokenizer beside it reads text."""

from __future__ import annotations

import dataclasses
import inspect
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nettrim.errors import ArgumentError, CalibrationError, NetTrimError
from nettrim.files import inside
from nettrim.sources.base import Reading, Source

_LONGEST = 512  # tokens of a sample, where the network would take more and nothing is asked for
# weights in any form: the pruned folder has its own, and others beside them would be the dense ones
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json", ".pt2", ".tflite", ".ot")


class HuggingFace(Source):
    """A folder that ``from_pretrained`` reads; no code that it might hold is run."""

    def __init__(self, place: Path) -> None:
        self.place = place.resolve()
        kind = _kind(self.place)
        try:
            self.model = kind.from_pretrained(self.place, local_files_only=True, dtype="auto").eval()
        except Exception as error:  # transformers raises OSError, ValueError, RuntimeError and more for a folder that it cannot read
            raise ArgumentError(f"{place} cannot be read by transformers ({type(error).__name__}: {error})") from error
        self.forward_fn = forward
        self.files = sorted(path for path in self.place.iterdir() if path.is_file() and path.name.endswith((".json", *_WEIGHTS)))

    def from_arrays(self, arrays: dict[str, Tensor]) -> Any:
        found = super().from_arrays(arrays)
        named = {self.model.main_input_name: found} if isinstance(found, Tensor) else found
        known = inspect.signature(self.model.forward).parameters
        unknown = [name for name in named if name not in known]
        if unknown:
            raise CalibrationError(f"{type(self.model).__name__} takes no {unknown[0]!r}; expected arrays named as its arguments, or one with --key")
        return {name: value if value.is_floating_point() else value.long() for name, value in named.items()}

    def completed(self, reading: Reading) -> Reading:
        tokens = reading.sequence_length
        if tokens is None:
            tokens = min(_LONGEST, getattr(self.model.config, "max_position_embeddings", None) or _LONGEST)
        processor = self.place / "preprocessor_config.json"
        says = _json(processor) if processor.is_file() else {}
        size = reading.image_size
        if size is None:
            crops = says.get("crop_size") if says.get("do_center_crop") is not False else None  # what the network sees is what is left
            given = crops or says.get("size") or getattr(self.model.config, "image_size", None)
            if isinstance(given, dict):
                given = (given.get("height"), given.get("width")) if "height" in given else given.get("shortest_edge")
            size = (given, given) if isinstance(given, int) else tuple(given) if given else None
        mean, std = (
            asked if asked is not None else tuple(says[name]) if says.get(name) and says.get("do_normalize") is not False else None
            for asked, name in ((reading.image_mean, "image_mean"), (reading.image_std, "image_std"))
        )
        return dataclasses.replace(reading, sequence_length=tokens, image_size=size, image_mean=mean, image_std=std)

    def from_texts(self, texts: Sequence[str], reading: Reading) -> list[Any]:
        """Batches of ``sequence_length`` tokens, special ones among them: the texts joined by an empty line and cut, the short rest left out."""
        transformers, length = _transformers(), reading.sequence_length
        assert length is not None
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.place, local_files_only=True)
        except Exception as error:
            raise CalibrationError(f"{self.place} has no tokenizer that transformers reads ({type(error).__name__}: {error})") from error
        if not tokenizer.is_fast:
            raise CalibrationError(f"the tokenizer in {self.place} is a slow one; expected a tokenizer.json, as tokenizer.save_pretrained writes")
        pieces = tokenizer("\n\n".join(texts), truncation=True, max_length=length, return_overflowing_tokens=True)["input_ids"]
        whole = [piece for piece in pieces if len(piece) == length][: reading.samples]
        if not whole:
            raise CalibrationError(f"the text has {sum(map(len, pieces))} tokens; expected at least one sample of {length}: lower --sequence-length")
        ids = torch.tensor(whole)
        return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(reading.batch_size)]

    def from_images(self, images: Tensor, reading: Reading) -> list[Any]:
        return [{self.model.main_input_name: part} for part in images.split(reading.batch_size)]

    def write(self, pruned: nn.Module, place: Path) -> None:
        super().write(pruned, place)
        for path in sorted(self.place.rglob("*")):
            name = path.relative_to(self.place)
            hidden = any(part.startswith(".") for part in name.parts)
            copy = inside(place, str(name))
            if path.is_file() and not path.is_symlink() and not hidden and not path.name.endswith(_WEIGHTS) and not copy.exists():
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)

    def read_pruned(self, place: Path) -> nn.Module:
        return HuggingFace(place).model


def _kind(place: Path) -> Any:
    """The class of transformers that a folder's ``config.json`` names."""
    transformers = _transformers()
    config = _json(place / "config.json")
    architectures = config.get("architectures")
    if not (isinstance(architectures, list) and architectures and isinstance(architectures[0], str)):
        raise ArgumentError(f"{place / 'config.json'} names no architectures; expected what model.save_pretrained writes")
    kind: Any = getattr(transformers, architectures[0], None)
    if not hasattr(kind, "from_pretrained") or not issubclass(kind, transformers.PreTrainedModel):
        raise ArgumentError(
            f"{place / 'config.json'}: transformers {transformers.__version__} has no model {architectures[0]!r}; code in the folder is not run: "
            "give package.module:factory for a model of your own"
        )
    return kind


def unmade(place: Path) -> Callable[[], nn.Module]:
    """A function that makes the folder's network, without its weights.

    Raises
    ------
    ArgumentError
        The folder names none that transformers has.
    """
    kind = _kind(place)
    config = kind.config_class.from_pretrained(place, local_files_only=True)
    return lambda: kind(config)


def forward(model: Any, batch: Any) -> Any:
    """All that the network returns (logits, hidden states, what a pooler makes of them); nothing is cached from one call to the next."""
    named: dict[str, Any] = dict(batch) if isinstance(batch, Mapping) else {model.main_input_name: batch}
    placed = {name: value.to(model.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value for name, value in named.items()}
    if "use_cache" in inspect.signature(model.forward).parameters:
        placed["use_cache"] = False
    return model(**placed, return_dict=True)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise NetTrimError("Hugging Face folders need transformers, which is not installed; run: pip install 'nettrim[hf]'") from error
    transformers.utils.logging.set_verbosity_error()  # the command says what there is to say
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArgumentError(f"{path.parent} has no {path.name}; expected a Hugging Face folder, as model.save_pretrained writes") from error
    except (OSError, ValueError) as error:
        raise ArgumentError(f"{path} cannot be read ({error}); expected JSON, as save_pretrained writes") from error
    if not isinstance(found, dict):
        raise ArgumentError(f"{path} holds a {type(found).__name__}; expected an object")
    return found
