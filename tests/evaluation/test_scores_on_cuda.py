"""Scores on a GPU, where features and neighbours are computed."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from elit.evaluation import CachedFeatures, Extractor, ImageSet, score
from elit.evaluation.scores import Reference

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def scores(device: str) -> dict[str, float]:
    def images(seed: int) -> ImageSet:
        pixels = torch.randint(256, (600, 4, 4, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        return ImageSet(str(seed), len(pixels), str(seed), lambda start, stop: pixels[start:stop])

    def network(pixels: Tensor) -> dict[str, Tensor]:
        values = pixels.to(device).flatten(1).float() / 255
        return {"x": values, "logits": values[:, :5]}

    extractor = Extractor("x", "0", device, "none", {"fx": "x"}, "x", "logits", network)
    ours, theirs = (CachedFeatures(images(seed), extractor) for seed in (0, 1))
    for features in (ours, theirs):
        features.compute()
        assert features.read("x").device.type == torch.device(device).type
    found: dict[str, float] = score(ours, Reference("1", "1", {}, theirs.images), theirs)["scores"]
    return found


def test_scores_are_those_of_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELIT_CACHE", str(tmp_path))
    assert scores("cuda") == pytest.approx(scores("cpu"), rel=1e-9)  # float64 sums in another order
