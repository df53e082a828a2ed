"""How many tokens a Whisper has, told apart from the padding of a fine-tune's vocabulary."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from whisper_at_cli.extract.backbones.huggingface import read_value
from whisper_at_cli.extract.backbones.sizes import ENGLISH_END_OF_TEXT, VOCABULARIES

LANGUAGES = slice(50260, 50350)  # tokens of languages, in English models as in the others, whose numbers are one more


def without_padding(
    source: Path, state: dict[str, Tensor], dims: dict[str, int]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The same without rows of the token embedding for which Whisper has no token.

    The vocabulary of a fine-tune is often padded, to a multiple of 8 or 64 for example; openai-whisper derives its
    languages and special tokens from the size.
    """
    embedding = state.get("decoder.token_embedding.weight")
    if embedding is None or embedding.ndim != 2 or len(embedding) != dims["n_vocab"]:
        return state, dims
    tokens = _true_vocabulary(source, dims, embedding)
    if tokens == len(embedding):
        return state, dims
    return state | {"decoder.token_embedding.weight": embedding[:tokens]}, dims | {"n_vocab": tokens}


def _true_vocabulary(source: Path, dims: dict[str, int], embedding: Tensor) -> int:
    """How many tokens a model's embedding has without its padding: those of the published model it was tuned from."""
    tokens, published = dims["n_vocab"], VOCABULARIES.get(dims["n_mels"])
    if not published or tokens <= published[0]:
        return tokens
    multilingual = read_value(source / "generation_config.json", "is_multilingual")
    if isinstance(multilingual, bool):
        english = not multilingual
    elif tokens in published:
        return tokens
    elif _languages_are_alike(embedding):
        english = True
    elif source.is_dir():
        begins = [read_value(source / "config.json", key) for key in ("begin_suppress_tokens", "suppress_ids_begin")]
        english = any(isinstance(ids, list) and ENGLISH_END_OF_TEXT in ids for ids in begins)
    else:
        english = ".en" in source.name
    return published[0] if english else published[-1]


def _languages_are_alike(embedding: Tensor) -> bool:
    """Whether all tokens of languages have the same row, as in English models, which were never shown one: of tiny.en
    each two have a cosine of 1.0."""
    rows = torch.nn.functional.normalize(embedding[LANGUAGES].float(), dim=1)
    return bool((rows @ rows.mean(dim=0) > 0.99).all())
