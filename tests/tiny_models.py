"""Hugging Face folders of a few kilobytes, made here: random weights, and a tokenizer of the words of one sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

TEXT = "call me ishmael . some years ago , never mind how long , i thought i would sail about a little and see the watery part of the world . " * 30


def quiet_transformers():
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def tokenizer(folder: Path):
    transformers = quiet_transformers()
    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator([TEXT], trainers.WordLevelTrainer(special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False))
    words.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    made.save_pretrained(folder)
    return made


def _sizes(words: int) -> dict[str, int]:
    return {"vocab_size": words, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def bert(folder: Path) -> None:
    transformers = quiet_transformers()
    words = len(tokenizer(folder))
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**_sizes(words), max_position_embeddings=24)).save_pretrained(folder)


def llama(folder: Path) -> None:
    """In bfloat16, with one matrix for the first and the last layer."""
    transformers = quiet_transformers()
    words = len(tokenizer(folder))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**_sizes(words), num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def vit(folder: Path) -> None:
    transformers = quiet_transformers()
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.ViTModel(transformers.ViTConfig(**sizes)).save_pretrained(folder)


def images(folder: Path, count: int = 12) -> Path:
    from PIL import Image

    folder.mkdir()
    draws = np.random.default_rng(0)
    for index in range(count):
        Image.fromarray(draws.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(folder / f"{index:02}.png")
    return folder
