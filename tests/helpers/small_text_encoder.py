"""A small text encoder in the real format."""

from pathlib import Path

import pytest
import torch

WORDS = ["<pad>", "<unk>", "</s>", "a", "handwritten", "three", "four"]


def save_tokenizer(folder: Path) -> None:
    """Words apart by spaces, </s> at the end."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(folder)


def save_text_encoder(folder: Path) -> None:
    """A T5 of width 16 with random weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    transformers.T5Model(config).save_pretrained(folder)
    save_tokenizer(folder)
