"""A sentence encoder, the text that it is calibrated on and pairs of sentences of another one, for ``python -m benchmarks.similarity``.

The model is all-MiniLM-L6-v2, calibrated on Moby Dick; the sentences are of addresses of American presidents. The tests use a small BERT of random
weights.
"""

import importlib
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.data import DataError
from benchmarks.llm_data import addresses
from benchmarks.sparsity_minilm import load_encoder, stretches

WORDS = range(6, 41)  # of a sentence
BATCH = 50  # sentences through the network at a time
_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'])")


@dataclass(frozen=True)
class Subject:
    """What is pruned and judged.

    Attributes
    ----------
    model : nn.Module
        An encoder of transformers whose blocks are ``model.encoder.layer``.
    calibration : Tensor, (sequences, tokens)
    sentences : list of dict of str to Tensor
        Batches of other text, as the model takes them: ``input_ids`` and ``attention_mask``, (sentences, tokens).
    pairs : Tensor, (pairs, 2)
        Which two of the sentences, counted through the batches, are compared.
    """

    model: nn.Module
    calibration: Tensor
    sentences: list[dict[str, Tensor]]
    pairs: Tensor


def draw_pairs(text: str, pairs: int, seed: int) -> tuple[list[str], Tensor]:
    """Sentences of a text and which two of them (pairs, 2) are compared: half are neighbours in the text, half are drawn at random.

    Of 6 to 40 words. Neighbours are mostly about one thing, others mostly not, so that there are high and low similarities to keep apart.

    Raises
    ------
    DataError
        If the text has too few sentences.
    """
    sentences = [" ".join(one.split()) for one in _END.split(text)]
    fits = [len(one.split()) in WORDS for one in sentences]
    firsts = [index for index in range(len(sentences) - 1) if fits[index] and fits[index + 1]]
    wanted = (pairs + 1) // 2
    if wanted > len(firsts):
        raise DataError(f"{pairs} pairs of sentences were asked for; the text has {2 * len(firsts)}.")
    generator = torch.Generator().manual_seed(seed)
    drawn = [firsts[index] for index in torch.randperm(len(firsts), generator=generator)[:wanted].tolist()]
    # a sentence, the one behind it, and the one behind another of those drawn
    chosen = [sentence for first in drawn for sentence in (sentences[first], sentences[first + 1])]
    left = torch.arange(0, 2 * wanted, 2)
    others = left.roll(-1) + 1
    return chosen, torch.cat([torch.stack([left, left + 1], 1), torch.stack([left, others], 1)])[:pairs]


def load(sequences: int, length: int, pairs: int, seed: int) -> Subject:
    """all-MiniLM-L6-v2, stretches of Moby Dick of ``length`` tokens with the model's first and last token, and pairs of the addresses.

    Raises
    ------
    DataError
        Something cannot be fetched or read, or the texts are too short.
    """
    model, tokenizer, novel = load_encoder()
    rows = stretches(tokenizer, novel, length - 2, sequences, seed)
    first, last = (torch.full((len(rows), 1), token) for token in (tokenizer.cls_token_id, tokenizer.sep_token_id))
    sentences, which = draw_pairs(addresses(), pairs, seed)
    batches = [
        dict(tokenizer(sentences[start : start + BATCH], padding=True, truncation=True, max_length=128, return_tensors="pt"))
        for start in range(0, len(sentences), BATCH)
    ]
    kept = [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches]
    return Subject(model, torch.cat([first, rows, last], 1), kept, which)


def tiny(sequences: int, length: int, pairs: int, seed: int) -> Subject:
    """A BERT of random weights, for the tests; its tokens are random too, and half of its sentences are shorter than the others."""
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise DataError(f"benchmarks.similarity needs transformers: pip install transformers ({error}).") from error
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "initializer_range": 0.5}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=50, max_position_embeddings=64, **sizes), add_pooling_layer=False)
    tokens, mask = torch.randint(0, 50, (2 * pairs, 12)), torch.ones(2 * pairs, 12, dtype=torch.int64)
    mask[::2, 7:] = 0
    sentences = [{"input_ids": ids, "attention_mask": ones} for ids, ones in zip(tokens.split(BATCH), mask.split(BATCH), strict=True)]
    return Subject(model.eval(), torch.randint(0, 50, (sequences, length)), sentences, torch.arange(2 * pairs).view(-1, 2))


LOADERS = {"minilm": load, "tiny": tiny}
