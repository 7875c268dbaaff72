"""A batch may mix levels, and what they share is computed once; levels are those of training, on disk and off it."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import elit
from elit import ElitError, Guidance
from elit.flow import weak_level
from elit.interface import InterfaceConfig
from elit.models import Model
from elit.models.files import CONFIG
from tests.helpers.models import inputs, of, tiny
from tests.helpers.stacks import ELASTIC, KINDS, multi_scale
from tests.helpers.stacks import tiny as backbone

every_kind = pytest.mark.parametrize("kind", KINDS)
LEVELS = [16, 4, 12, 4, 8]


def prepared(kind: str, batch: int = 5) -> tuple[Any, Any, Tensor, Any]:
    """A model in float64, where the order of sums shows at 1e-14 and what is wrong shows at 1e-6; and x, t, y."""
    model = KINDS[kind]().double()
    x, t, y = inputs(model, batch, dtype=torch.float64)
    return model, x, t, y if model.conditional else None


def some(given: Any, samples: list[int]) -> Any:
    return None if given is None else of(given, samples)


def flat(velocity: Any) -> Tensor:
    """(B, values): of a multi-scale model, of all stages."""
    return torch.cat([stage.flatten(1) for stage in velocity], dim=1) if isinstance(velocity, list) else velocity


def assert_near(found: Any, wanted: Any) -> None:
    """Equal within 1e-6 of the largest value."""
    found, wanted = flat(found), flat(wanted)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6 * wanted.abs().max().item())


# ------------------------------------------------------------------------------------------------ mixed levels


@every_kind
def test_a_batch_of_mixed_levels_is_each_sample_alone(kind: str) -> None:
    model, x, t, y = prepared(kind)
    together = model(x, t, y, num_latents=LEVELS)
    for i, level in enumerate(LEVELS):
        alone = model(of(x, [i]), t[[i]], some(y, [i]), num_latents=level)
        assert_near(of(together, [i]), alone)
        assert (flat(of(together, [i])) - flat(model(x, t, y, num_latents=16))[[i]]).abs().max() > 1e-4 or level == 16


@every_kind
def test_budgets_of_samples_are_their_levels(kind: str) -> None:
    model, x, t, y = prepared(kind)
    expected, budgets = flat(model(x, t, y, num_latents=LEVELS)), [level / 16 for level in LEVELS]
    assert torch.equal(flat(model(x, t, y, budget=budgets)), expected)
    assert torch.equal(flat(model(x, t, y, budget=torch.tensor(budgets))), expected)
    assert torch.equal(flat(model(x, t, y, num_latents=[8] * 5)), flat(model(x, t, y, budget=0.5)))


@every_kind
def test_gradients_of_mixed_levels_are_those_of_each_sample_alone(kind: str) -> None:
    model, x, t, y = prepared(kind)
    flat(model(x, t, y, num_latents=LEVELS)).square().sum().backward()
    together = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    for i, level in enumerate(LEVELS):
        flat(model(of(x, [i]), t[[i]], some(y, [i]), num_latents=level)).square().sum().backward()
    alone = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert together.keys() == alone.keys()
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, alone[name], rtol=0, atol=1e-6 * alone[name].abs().max().item(), msg=name)


@every_kind
@pytest.mark.parametrize(
    ("rows", "levels"),
    [([0, 1, 1, 2, 0], [16, 4, 8, 16, 4]), ([2, 0], [4, 4]), ([1, 2], [8, 16]), ([1, 1], [8, 8]), ([2, 1, 0], 12)],
)
def test_samples_that_go_on_several_times_are_separate_calls(kind: str, rows: list[int], levels: Any) -> None:
    model, x, t, y = prepared(kind, 3)
    together = model.at_levels(model.encode(x, t, y), levels, rows)
    each = levels if isinstance(levels, list) else [levels] * len(rows)
    separate = [flat(model(of(x, [i]), t[[i]], some(y, [i]), num_latents=n)) for i, n in zip(rows, each, strict=True)]
    assert_near(together, torch.cat(separate))
    gradients = []
    for loss in (flat(together).square().sum(), torch.cat(separate).square().sum()):
        model.zero_grad()
        loss.backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]))
    assert_near(*gradients)


def test_what_a_batch_cannot_be_given_is_named() -> None:
    model = tiny()
    x, t, y = inputs(model, 3)
    with pytest.raises(ElitError, match="2 budgets for 3 samples; give one for each, or one for all"):
        model(x, t, y, budget=[0.5, 1.0])
    with pytest.raises(ElitError, match="4 budgets for 3 samples"):
        model(x, t, y, budget=torch.ones(4))
    with pytest.raises(ElitError, match=r"budget is 1\.5"):
        model(x, t, y, budget=[0.5, 1.5, 1.0])
    with pytest.raises(ElitError, match="give a budget or num_latents, not both"):
        model(x, t, y, budget=0.5, num_latents=2)


# ------------------------------------------------------------------------------------------------ computed once


def batches_seen(part: torch.nn.Module, seen: list[tuple[int, ...]]) -> None:
    """Writes down the shape of the tokens at each call of a part of a model."""
    part.register_forward_hook(lambda module, given, _: seen.append(tuple(given[0].shape)))


@every_kind
@pytest.mark.parametrize(("budget", "weak"), [(1.0, 0.25), (0.5, 0.25), (0.25, 0.75)])
def test_autoguidance_encodes_and_reads_once_for_both_terms(kind: str, budget: float, weak: float) -> None:
    model, x, _, y = prepared(kind, 3)
    if kind == "ELIT-DFM":  # of one stage, all of which one step can move
        model = multi_scale(stages=1).double()
        x, _, y = inputs(model, 3, dtype=torch.float64)
    labels = y.clamp(max=9) if isinstance(y, Tensor) else y  # without the null class
    noise, t = flat(x), torch.ones(3, 1) if isinstance(x, list) else torch.ones(3)
    strong, other = (flat(model(x, t, labels, b)) for b in (budget, weak))
    expected = (noise - (other + 3 * (strong - other))).view(3, *model.input_shape())
    heads: list[tuple[int, ...]] = []
    reads: list[tuple[int, ...]] = []
    batches_seen(model.blocks[0], heads)
    batches_seen(model.interface.read_layer, reads)
    guidance = Guidance("ag", 3.0, weak)
    found = elit.sample(model, labels, seeds=[0, 1, 2], noise=noise, steps=1, budget=budget, guidance=guidance)
    assert_near(found, expected.detach().float())
    filled = 16 if model.config.interface.tail_visible else round(16 * max(budget, weak))
    assert [shape[0] for shape in heads] == [3]
    assert [shape[::2] for shape in reads] == [(3, filled)]  # three samples, and the larger of both levels


@pytest.mark.parametrize(("kind", "encoded"), [("cfg", [6]), ("ccfg", [3, 3]), ("ag", [3])])
def test_a_weak_term_without_its_condition_is_encoded_for_itself(kind: Any, encoded: list[int]) -> None:
    model = tiny()
    heads: list[tuple[int, ...]] = []
    batches_seen(model.blocks[0], heads)
    elit.sample(model, [1, 2, 3], steps=2, guidance=Guidance(kind, 2.0))
    assert [shape[0] for shape in heads] == encoded * 2


# ------------------------------------------------------------------------------------------------ trained levels


def trained_at(*levels: int) -> Model:
    return tiny(input_size=16, interface=InterfaceConfig(4, levels=levels))


def test_a_budget_below_the_lowest_trained_level_is_refused_wherever_it_is_given() -> None:
    model = trained_at(4, 16)
    x, t, y = inputs(model, 2)
    refusals = (
        lambda: model.level(1 / 16),
        lambda: model(x, t, y, budget=1 / 16),
        lambda: model(x, t, y, budget=[1.0, 1 / 16]),
        lambda: elit.sample(model, [1, 2], steps=2, budget=1 / 16),
        lambda: elit.sample(model, [1, 2], steps=2, budget=[1.0, 1 / 16]),
        lambda: elit.sample(model, [1, 2], steps=2, budget=torch.tensor([1.0, 1 / 16])),
        lambda: elit.sample(model, [1, 2], steps=2, guidance=Guidance("ag", budget=1 / 16)),
        lambda: elit.trajectories(model, [1, 2], steps=2, budget=1 / 16),
    )
    for refused in refusals:
        with pytest.raises(ElitError, match=r"of 16 latents, and the model was trained with 4 and 16: take at least"):
            refused()


def test_a_budget_between_trained_levels_goes_to_the_nearest() -> None:
    model = trained_at(4, 16)
    x, t, y = inputs(model, 2)
    for budget, level in ((None, 16), (1.0, 16), (0.7, 16), (0.6, 4), (0.5, 4), (0.25, 4), (0.22, 4)):
        assert torch.equal(model(x, t, y, budget), model(x, t, y, num_latents=level))
    assert not torch.equal(model(x, t, y, num_latents=4), model(x, t, y, num_latents=16))


def test_less_than_one_latent_means_one() -> None:
    assert [tiny().level(budget) for budget in (1e-9, 0.01, 0.2)] == [1, 1, 1]


@pytest.mark.parametrize("kind", ["ag", "ccfg"])
def test_a_weak_term_has_the_lowest_trained_level_by_default(kind: Any) -> None:
    assert weak_level(trained_at(4, 16), Guidance(kind)) == 4
    assert weak_level(tiny(), Guidance(kind)) == 1
    told = {"steps": 2, "seeds": [3, 4]}
    by_default = elit.sample(trained_at(4, 16), [1, 2], guidance=Guidance(kind), **told)
    assert torch.equal(by_default, elit.sample(trained_at(4, 16), [1, 2], guidance=Guidance(kind, budget=0.25), **told))


def test_a_saved_model_keeps_its_levels_and_its_card_says_them(tmp_path: Path) -> None:
    model = trained_at(4, 16)
    model.save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model" / CONFIG).read_text())["interface"]["levels"] == [4, 16]
    assert "trained with 4 and 16 of 16 latents a window" in (tmp_path / "model" / "README.md").read_text()
    loaded = elit.load(tmp_path / "model")
    assert loaded.levels == (4, 16)
    assert loaded.config == model.config
    with pytest.raises(ElitError, match="trained with 4 and 16"):
        loaded.level(1 / 16)


def test_the_curious_may_run_what_was_not_trained(tmp_path: Path) -> None:
    model = trained_at(4, 16)
    model.save_pretrained(tmp_path / "model")
    curious = elit.load(tmp_path / "model", untrained_levels=True)
    assert curious.levels == tuple(range(1, 17))
    x, t, y = inputs(model, 2)
    assert torch.equal(curious(x, t, y, 1 / 16), model(x, t, y, num_latents=1))
    assert curious.config == model.config  # what was trained is still known, and what stands for "no budget given"
    assert weak_level(curious, Guidance("ag")) == 4
    curious.save_pretrained(tmp_path / "again")
    assert "trained with 4 and 16 of 16" in (tmp_path / "again" / "README.md").read_text()
    some_trained = trained_at(4, 8).allow_untrained_levels()
    assert (some_trained.level(None), some_trained.level(1.0)) == (8, 16)
    merged = backbone("ELIT-HDiT", input_size=16, interface=InterfaceConfig(4, levels=(8, 16)))
    assert merged.allow_untrained_levels().levels == (4, 8, 12, 16)  # what is possible at all
    assert tiny(interface=None).allow_untrained_levels().levels == ()


@pytest.mark.parametrize("name", ELASTIC)
def test_a_model_that_was_saved_before_it_said_levels_still_loads(name: str, tmp_path: Path) -> None:
    model = backbone(name, input_size=16, interface=InterfaceConfig(4, min_latents=8))
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / CONFIG
    described = json.loads(path.read_text())
    del described["interface"]["levels"]
    path.write_text(json.dumps(described))
    loaded = elit.load(tmp_path / "model")
    assert loaded.levels == model.levels
    assert loaded.levels[0] == 8
    x, t, y = inputs(model, 2)
    assert torch.equal(loaded(x, t, y, 0.75), model(x, t, y, 0.75))


@pytest.mark.parametrize(
    ("args", "levels"),
    [
        ({}, tuple(range(1, 17))),
        ({"elit_max_mask_prob": 0.75}, tuple(range(4, 17))),
        ({"elit_max_mask_prob": 0.75, "elit_min_mask_prob": 0.0}, tuple(range(4, 17))),
        ({"elit_max_mask_prob": 0.75, "elit_min_mask_prob": 0.5}, tuple(range(4, 9))),
        ({"elit_max_mask_prob": 0.5, "elit_min_mask_prob": 0.5}, (8,)),
        ({"elit_max_mask_prob": 0.99}, tuple(range(1, 17))),
    ],
)
def test_the_args_of_a_published_file_tell_its_levels(args: dict[str, float], levels: Any, tmp_path: Path) -> None:
    file = Path(__file__).parents[1] / "data" / "published" / "elit_sit_tiny.pt"
    with torch.serialization.safe_globals([Namespace]):
        told = torch.load(file, weights_only=True)
    for name in ("elit_max_mask_prob", "elit_min_mask_prob"):
        vars(told["args"]).pop(name, None)
    vars(told["args"]).update(args)
    torch.save(told, tmp_path / "file.pt")
    model = elit.load(tmp_path / "file.pt", num_heads=4, tail_depth=2)
    assert model.levels == levels
    assert model.level(None) == levels[-1]
    curious = elit.load(tmp_path / "file.pt", num_heads=4, tail_depth=2, untrained_levels=True)
    assert curious.levels == tuple(range(1, 17))


# ------------------------------------------------------------------------------------------------ shapes


@pytest.mark.parametrize("name", ELASTIC)
@pytest.mark.parametrize("elastic", [True, False])
def test_images_and_clips_of_one_frame_keep_the_shape_of_x(name: str, elastic: bool) -> None:
    """A model of images and one of video, given either; also where a batch mixes levels."""
    plain: dict[str, Any] = {} if elastic else {"interface": None}
    images = backbone(name, **plain)
    window = InterfaceConfig((1, 4, 4))
    clips = backbone(name, **({"input_size": (2, 8, 8), "patch_size": (1, 2, 2), "interface": window} | plain))
    image, _, y = inputs(images, 2)
    t = torch.tensor([0.2, 0.7])
    for model in (images, clips):
        levels = [model.levels[0], model.levels[-1]] if elastic else 0
        for x in (image, image[:, :, None], image[:1], image[:1, :, None]):
            few = levels[: len(x)] if isinstance(levels, list) else levels
            assert model(x, t[: len(x)], of(y, range(len(x))), num_latents=few).shape == x.shape
        as_clip, as_image = (model(x, t, y, num_latents=levels) for x in (image[:, :, None], image))
        assert torch.equal(as_clip[:, :, 0], as_image)
