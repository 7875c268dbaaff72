"""Captions in place of labels, and a model of text that trains on them."""

from pathlib import Path
from typing import Any

import torch

from elit.conditions import Text
from elit.data import open_data
from elit.data.captions import CAPTIONS, Captioned, WordVectors
from elit.data.digits import digits8
from elit.models import MMDiT
from elit.training import ModelChoice, OptimizerConfig, TrainConfig, Trainer


def test_captions_stand_where_labels_were() -> None:
    data, plain = open_data("captioned-digits"), open_data("digits")
    indices = torch.tensor([5, 700, 12932])
    x, text = data.batch(indices)
    images, labels = plain.batch(indices)
    assert torch.equal(x, images)
    assert (len(data), data.shape, data.num_classes) == (len(plain), plain.shape, 0)
    expected = WordVectors()([CAPTIONS[label] for label in labels])
    assert torch.equal(text.tokens, expected.tokens)
    assert text.mask.all()


def test_words_are_vectors() -> None:
    text = WordVectors(8)(["a three", "three", ""])
    assert text.tokens.shape == (3, 2, 8)
    assert text.mask.tolist() == [[True, True], [True, False], [True, False]]
    assert torch.equal(text.tokens[0, 1], text.tokens[1, 0])
    assert not torch.equal(text.tokens[0, 0], text.tokens[0, 1])
    assert not text.tokens[~text.mask].any()
    assert not text.tokens[2].any()  # what a model takes for no text


def test_a_model_of_text_trains(tmp_path: Path) -> None:
    """Through the trainer, with prompts dropped, at drawn budgets; and its checkpoint loads."""
    fields: dict[str, Any] = {"width": 16, "depth": 3, "num_heads": 2, "head_depth": 1, "tail_depth": 1,
                              "group_size": 2, "text_width": 8}  # fmt: skip
    config = TrainConfig(
        out=str(tmp_path / "run"), model=ModelChoice("ELIT-MMDiT-S/2", fields), steps=3, batch_size=8,
        label_dropout=0.5, optimizer=OptimizerConfig(warmup_steps=1), precision="fp32",
    )  # fmt: skip
    data = digits8()
    trainer = Trainer(config, Captioned(data, [CAPTIONS[label] for label in data.labels], WordVectors(8)))
    losses = [report.loss for report in trainer]
    assert len(losses) == 3
    loaded = MMDiT.from_pretrained(tmp_path / "run")
    text = WordVectors(8)(["a handwritten three"])
    assert isinstance(text, Text)
    assert loaded(torch.randn(1, 1, 8, 8), torch.rand(1), text).isfinite().all()
