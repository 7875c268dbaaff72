"""Text encoders with random weights, in the real formats."""

import json
from pathlib import Path

import pytest
import torch

from elit import ElitError
from elit.data.text import TextEncoder
from tests.helpers.small_text_encoder import save_text_encoder, save_tokenizer

transformers = pytest.importorskip("transformers")


@pytest.fixture(params=["t5", "clip", "bert"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    if request.param == "t5":
        save_text_encoder(tmp_path)
        return tmp_path
    if request.param == "clip":
        text = size | {"vocab_size": 7, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
        vision = size | {"image_size": 8, "patch_size": 4}
        model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))
    else:
        model = transformers.BertModel(transformers.BertConfig(**size, vocab_size=7))
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    return tmp_path


def test_text_can_be_trained_on(saved: Path) -> None:
    """It is a constant, and no tensor that autograd refuses."""
    tokens = TextEncoder(saved)(["a handwritten three"]).tokens
    assert not tokens.requires_grad
    weight = torch.ones(16, requires_grad=True)
    (tokens * weight).sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, tokens.sum((0, 1)))


def test_prompts_become_text(saved: Path) -> None:
    encoder = TextEncoder(saved)
    text = encoder(["a handwritten three", "", "four"])
    assert encoder.width == 16
    assert text.tokens.shape == (3, 4, 16)
    assert text.mask.tolist() == [[True] * 4, [True, False, False, False], [True, True, False, False]]
    alone = encoder(["four"])
    assert alone.tokens.shape == (1, 2, 16)
    torch.testing.assert_close(text.tokens[2, :2], alone.tokens[0], rtol=0, atol=1e-5)  # float32, padding masked out
    assert (text.tokens[0, 2] - alone.tokens[0, 0]).abs().max() > 1e-3


def test_long_prompts_are_cut(saved: Path) -> None:
    assert TextEncoder(saved, max_length=3)(["a handwritten three"]).mask.shape == (1, 3)


def test_what_is_no_encoder_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 3}))
    with pytest.raises(ElitError, match="there is no text encoder at"):
        TextEncoder(tmp_path)
