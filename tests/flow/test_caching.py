"""Caching across steps: which steps run the core, and what stands in for it where it does not."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import elit
from elit.analysis import sampling_flops
from elit.flow import embedding_changes, time_grid
from elit.models import DFM, DFMConfig
from tests.helpers.models import PUBLISHED, TINY, inputs, randomize
from tests.helpers.models import tiny as tiny_dit
from tests.helpers.stacks import ELASTIC, tiny

GUIDANCE = [None, elit.Guidance("cfg", 2.0), elit.Guidance("ccfg", 2.0), elit.Guidance("ag", 2.0, 0.25)]
NAMES = [*(name for name in ELASTIC if "HDiT" not in name), "published", "DFM"]


def model_named(name: str) -> Any:
    if name == "DFM":
        sizes = TINY.__dict__ | {"input_size": 16, "patch_size": 4}
        return randomize(DFM(DFMConfig(**sizes))).eval()
    return tiny_dit(interface=PUBLISHED) if name == "published" else tiny(name)


def draw(model: Any, count: int = 3, **options: Any) -> Tensor:
    shape = (sum(torch.Size(s).numel() for s in model.stage_shapes),) if model.stage_shapes else model.input_shape()
    noise = torch.randn(count, *shape, generator=torch.Generator().manual_seed(5))
    y = inputs(tiny_dit() if model.stage_shapes else model, count, seed=3)[2]
    y = y if model.takes_text else y.clamp(max=9)
    return elit.sample(model, y, noise=noise, **({"steps": 6} | options))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.floats(0.01, 2))
def test_the_core_runs_where_changes_have_added_up(changes: list[float], threshold: float) -> None:
    runs = elit.Cache(threshold).steps_that_run(changes)
    assert len(runs) == len(changes)
    assert runs[0]
    assert runs[-1]
    last = 0
    for step in range(1, len(runs) - 1):
        assert runs[step] == (sum(changes[last:step]) >= threshold or sum(changes[last:step]) > threshold - 1e-9)
        last = step if runs[step] else last


@pytest.mark.parametrize("name", NAMES)
def test_changes_are_those_of_the_time_embedding(name: str) -> None:
    model, times = model_named(name), time_grid("euler", 4)
    grid = torch.stack((times, times.sqrt()), 1) if model.stage_shapes else times
    embedded = [model.embed_time(t[None].float())[0].detach() for t in grid]
    expected = [float((b - a).abs().sum() / a.abs().sum()) for a, b in zip(embedded, embedded[1:], strict=False)]
    assert embedding_changes(model, grid) == pytest.approx(expected, rel=1e-5)  # float32 sums


@pytest.mark.parametrize("guidance", GUIDANCE, ids=lambda g: g.kind if g else "none")
@pytest.mark.parametrize("name", NAMES)
def test_a_threshold_of_zero_changes_no_bit(name: str, guidance: elit.Guidance | None) -> None:
    model = model_named(name)
    plain = draw(model, guidance=guidance)
    assert torch.equal(draw(model, guidance=guidance, cache=elit.Cache(0)), plain)
    assert not torch.equal(draw(model, guidance=guidance, cache=elit.Cache(9)), plain)


def runs_of_the_core(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Samples that passed the first block of the core, forward by forward."""
    seen: list[int] = []
    block = model.blocks[model.config.head_depth]
    block.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    return seen


@pytest.mark.parametrize(("solver", "evaluations"), [("euler", 2), ("heun", 3), ("sde", 2)])
def test_only_the_first_and_last_step_run_under_a_high_threshold(
    solver: str, evaluations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_dit()
    seen = runs_of_the_core(model, monkeypatch)
    draw(model, solver=solver, cache=elit.Cache(1e9))
    assert seen == [3] * evaluations


class ThirdStepSkipped(elit.Cache):
    def steps_that_run(self, changes: Sequence[float]) -> list[bool]:
        return [True, True, False, True]


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("name", ["ELIT-DiT", "ELIT-UViT", "published"])
def test_a_skipped_step_is_read_plus_the_kept_effect(name: str, order: int) -> None:
    """Against the definition, by hand."""
    model = model_named(name).double()
    noise, y = torch.randn(2, *model.input_shape(), dtype=torch.float64), torch.tensor([1, 2])
    effects: list[tuple[float, Tensor]] = []
    x, level = noise.clone(), model.levels[1]
    for t, t_next, runs in ((1.0, 0.75, True), (0.75, 0.5, True), (0.5, 0.25, False), (0.25, 0.0, True)):
        encoded = model.encode(x, torch.full((2,), t), y)
        latents = model.read(encoded, level)
        core = model.core(encoded, level)
        if runs:
            effects.append((t, core.latents[:, :, :level] - latents[:, :, :level]))
        else:
            (t0, first), (t1, last) = effects[-2:]
            effect = last + order * (t - t1) / (t1 - t0) * (last - first)
            used = model.interface.with_tail(latents[:, :, :level] + effect, latents)
            core = core._replace(latents=used)
        x = x + (t_next - t) * model.decode(encoded, core)
    cache = ThirdStepSkipped(1.0, order)
    found = elit.sample(model, y, noise=noise, steps=4, budget=level / model.num_latents, cache=cache)
    torch.testing.assert_close(found.double(), x, rtol=1e-6, atol=1e-6)  # samples are float32


def test_a_lower_level_takes_a_slice_and_a_higher_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_dit()
    seen = runs_of_the_core(model, monkeypatch)
    budgets = [1.0, 0.5, 0.25, 0.5, 1.0, 1.0]
    draw(model, budget=budgets, cache=elit.Cache(1e9))
    assert len(seen) == 2  # the full level of the first step serves all others
    seen.clear()
    draw(model, budget=[0.25, 0.25, 0.5, 0.25, 1.0, 1.0], cache=elit.Cache(1e9))
    assert len(seen) == 4  # at 0.25, then at 0.5 and 1 because the level rose, and the last step


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_each_sample_alone(name: str, order: int) -> None:
    model, count = model_named(name), 3
    steps, guidance = [4, 6, 5], [None, elit.Guidance("cfg", 2.0), elit.Guidance("ag", 2.0, 0.25, (0.3, 0.9))]
    budget, cache = torch.tensor([0.25, 1.0, 0.5]), elit.Cache(0.3, order)
    shape = (sum(torch.Size(s).numel() for s in model.stage_shapes),) if model.stage_shapes else model.input_shape()
    noise = torch.randn(count, *shape)
    y = inputs(tiny_dit() if model.stage_shapes else model, count, seed=3)[2]
    y = y if model.takes_text else y.clamp(max=9)
    together = elit.sample(
        model, y, noise=noise, steps=steps, guidance=guidance, budget=budget, cache=cache, solver="heun"
    )
    for i in range(count):
        own = elit.conditions.select_condition(y, slice(i, i + 1))
        alone = elit.sample(
            model, own, noise=noise[i : i + 1], steps=steps[i], guidance=guidance[i], budget=float(budget[i]),
            cache=cache, solver="heun",
        )  # fmt: skip
        # float32 forwards in batches of another size
        torch.testing.assert_close(together[i], alone[0], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("threshold", "order", "told"), [(-1, 0, "at least 0"), ("much", 0, "a number"), (0.1, 2, "0 .reuse. or 1")]
)
def test_wrong_caches_are_told(threshold: Any, order: Any, told: str) -> None:
    with pytest.raises(elit.ElitError, match=told):
        elit.Cache(threshold, order)


def test_a_plain_model_has_no_core_to_skip() -> None:
    with pytest.raises(elit.ElitError, match="no latent interface"):
        draw(tiny_dit(interface=None), cache=elit.Cache(0.1))


@pytest.mark.parametrize("guidance", GUIDANCE, ids=lambda g: g.kind if g else "none")
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_flops_are_those_that_a_sampler_spends(solver: str, guidance: elit.Guidance | None) -> None:
    """PyTorch's counter over the sampler itself, with levels that fall and rise."""
    model = tiny_dit().requires_grad_(False)  # the counter hooks what wants gradients
    settings: dict[str, Any] = {
        "steps": 6, "solver": solver, "guidance": guidance, "budget": [1.0, 0.5, 0.25, 0.5, 1.0, 0.5],
        "cache": elit.Cache(0.2),
    }  # fmt: skip
    with FlopCounterMode(display=False) as counter:
        elit.sample(model, [1], **settings)
    pattern = 2 * (256 * 32 + 32 * 32) * 7  # the embedding of all seven times, once for any number of samples
    assert sampling_flops(model, **settings) == counter.get_total_flops() - pattern
    assert sampling_flops(model, **settings) < sampling_flops(model, **(settings | {"cache": None}))
