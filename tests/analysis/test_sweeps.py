import colorsys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import elit
from elit import ElitError, Guidance
from elit.analysis import (
    SamplerSettings,
    SweepConfig,
    equal_cost_settings,
    guidance_settings,
    hsl_saturation,
    pareto_front,
    sampling_flops,
    sweep,
)
from elit.conditions import Text
from elit.data import ImageData
from elit.evaluation import Classifier, Judge, classify, frechet_distance, moments
from elit.models import MMDiT, MMDiTConfig
from tests.helpers.models import tiny


def test_saturation_against_colorsys() -> None:
    images = torch.rand(3, 3, 5, 4) * 2.4 - 1.2  # a little out of range, as samples are
    images[0, :, 0, 0], images[0, :, 0, 1], images[0, :, 0, 2] = 1, -1, 0.3  # white, black, grey
    pixels = ((images.clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).flatten(1, 2).tolist()
    expected = [sum(colorsys.rgb_to_hls(*p)[2] for p in image) / len(image) for image in pixels]
    torch.testing.assert_close(hsl_saturation(images), torch.tensor(expected))
    assert hsl_saturation(torch.randn(2, 1, 4, 4).expand(-1, 3, -1, -1)).max() < 1e-6


def test_pareto_front_against_its_definition() -> None:
    points = [(float(x), float(y)) for x, y in torch.randint(0, 8, (60, 2))]
    front = pareto_front(points)

    def beaten(a: tuple[float, float]) -> bool:
        return any(b != a and b[0] <= a[0] and b[1] <= a[1] for b in points)

    assert {points[i] for i in front} == {point for point in points if not beaten(point)}
    assert len({points[i] for i in front}) == len(front)
    assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)


@pytest.mark.parametrize("guidance", [None, Guidance("ccfg", 2)])
def test_equal_cost(guidance: Guidance | None) -> None:
    model = tiny()
    for steps, group in zip((4, 30), equal_cost_settings(model, (4, 30), (0.25, 0.5, 1.0), guidance), strict=True):
        full = sampling_flops(model, steps, 1.0, guidance)
        assert group[-1] == SamplerSettings(steps, 1.0, guidance)
        for setting in group:
            off = abs(sampling_flops(model, setting.steps, setting.budget, guidance) - full)
            assert off <= full / steps / 2  # half a step of full budget, which none is dearer than
        assert group[0].steps >= group[1].steps >= steps


def test_guidance_settings_are_those_that_a_model_allows() -> None:
    def kinds(**changes: Any) -> list[str]:
        settings = guidance_settings(tiny(**changes), [2, 3], 5, None, 0.25)
        assert settings[0].guidance is None
        return [f"{s.guidance.kind} {s.guidance.scale}" for s in settings[1:] if s.guidance]

    assert kinds() == ["cfg 2", "cfg 3", "ag 2", "ag 3", "ccfg 2", "ccfg 3"]
    assert kinds(interface=None) == ["cfg 2", "cfg 3"]
    assert kinds(num_classes=0) == ["ag 2", "ag 3"]
    with pytest.raises(ElitError, match="it cannot be guided"):
        kinds(num_classes=0, interface=None)
    with pytest.raises(ElitError, match="give numbers above 1"):
        guidance_settings(tiny(), [1, 2], 5)


@pytest.fixture
def judge() -> Iterator[Judge]:
    data = ImageData(torch.randn(50, 3, 8, 8), torch.arange(50) % 10, 10)
    yield Judge(Classifier(3, 10).eval(), data)


def test_a_sweep_is_sampling_and_judging(judge: Judge) -> None:
    model, guidance = tiny(), Guidance("ag", 2)
    settings = [SamplerSettings(2, 0.5), SamplerSettings(3, None, guidance)]
    first, second = sweep(model, settings, SweepConfig(23, first_seed=7, shown=4, batch_size=10), judge)
    labels = torch.arange(23) % 10
    images = elit.sample(model, labels, seeds=range(7, 30), steps=3, guidance=guidance, batch_size=10)
    torch.testing.assert_close(second.images, images[:4])
    assert second.saturation == pytest.approx(hsl_saturation(images).mean().item())
    predicted, features = classify(judge.classifier, images.clamp(-1, 1))
    assert second.quality is not None
    assert second.quality.accuracy == pytest.approx((predicted == labels).float().mean().item())
    assert second.quality.frechet_distance == pytest.approx(frechet_distance(moments(features), judge.real))
    assert first.flops == 2 * first.flops_per_step == sampling_flops(model, 2, 0.5)
    assert first.seconds > 0


def test_a_sweep_decodes_latents() -> None:
    def decode(latents: Tensor) -> Tensor:
        return latents[:, :3].repeat(1, 1, 2, 2)

    model = tiny(in_channels=4, num_classes=0)
    (point,) = sweep(model, [SamplerSettings(2)], SweepConfig(3), decode=decode)
    images = decode(elit.sample(model, seeds=range(3), steps=2))
    torch.testing.assert_close(point.images, images)
    assert point.saturation == pytest.approx(hsl_saturation(images).mean().item())
    (undecoded,) = sweep(model, [SamplerSettings(2)], SweepConfig(3))
    assert undecoded.saturation is None


def test_prompts_come_in_turn() -> None:
    text = Text(torch.randn(2, 3, 8), torch.ones(2, 3, dtype=torch.bool))
    model = MMDiT(MMDiTConfig(4, 2, width=8, num_heads=2, depth=1, text_width=8))
    conditions = SweepConfig(5, text=text).conditions(model)
    assert isinstance(conditions, Text)
    assert torch.equal(conditions.tokens, text.tokens[[0, 1, 0, 1, 0]])
    with pytest.raises(ElitError, match="give data whose samples have captions"):
        SweepConfig(5).conditions(model)


def test_a_judge_needs_classes() -> None:
    with pytest.raises(ElitError, match="no classes"):
        Judge(Classifier(3, 10), ImageData(torch.randn(4, 3, 8, 8), torch.zeros(4).long(), 0))
