"""The multi-scale model: its two ends, the interface in it, and sampling and training it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import elit
from elit.analysis import count_flops
from elit.errors import ElitError
from elit.flow import StageDensity, StageSchedule, flow_of
from elit.interface import InterfaceConfig
from elit.models import DFM, DFMConfig, DiT, DiTConfig
from elit.models.transformer import Transformer
from elit.seeding import normal

SIZES: dict[str, Any] = {
    "input_size": 16, "patch_size": 4, "in_channels": 3, "num_classes": 5, "width": 24, "depth": 3, "num_heads": 2,
    "head_depth": 1, "tail_depth": 1, "positions": "sincos", "qk_norm": False,
}  # fmt: skip
ELASTIC = {"interface": InterfaceConfig(group_size=2, variant="published")}


def model_of(stages: int = 3, **changes: Any) -> DFM:
    """A model whose every weight is random."""
    model = DFM(DFMConfig(**(SIZES | changes), stages=stages))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / max(parameter.shape[-1], 4) ** 0.5)
    return model.eval()


def inputs(model: DFM, batch: int = 2) -> tuple[list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = [torch.randn(batch, *shape, generator=generator) for shape in model.stage_shapes]
    return x, torch.rand(batch, model.config.stages, generator=generator), torch.arange(batch)


def test_stages_share_their_tokens() -> None:
    model = model_of()
    assert model.stage_shapes == [(3, 4, 4), (3, 8, 8), (3, 16, 16)]
    assert model.patches == [(1, 1, 1), (1, 2, 2), (1, 4, 4)]
    x, t, y = inputs(model)
    assert [v.shape for v in model(x, t, y)] == [stage.shape for stage in x]
    assert model.input_shape() == (3, 16, 16)


def test_one_stage_is_dit() -> None:
    model, plain = model_of(stages=1), DiT(DiTConfig(**SIZES))
    state = {k.replace("embed.0.", "embed.").replace("final.0.", "final."): v for k, v in model.state_dict().items()}
    plain.load_state_dict(state)
    (x,), t, y = inputs(model)
    assert torch.equal(model([x], t, y)[0], plain(x, t[:, 0], y))
    assert isinstance(model, Transformer) and isinstance(plain, Transformer)


@pytest.mark.parametrize("elastic", [{}, ELASTIC])
def test_every_stage_and_its_time_count(elastic: dict[str, Any]) -> None:
    """Also those of a masked stage, which is given as zeros: its bias and its time are in the answer."""
    model = model_of(**elastic)
    x, t, y = inputs(model)
    masked = [x[0], torch.zeros_like(x[1]), torch.zeros_like(x[2])]
    for stages in (x, masked):
        answer = model(stages, t, y)[0]
        for k in range(3):
            other, later = list(stages), t.clone()
            other[k] = other[k] + 1
            later[:, k] += 0.5
            assert not torch.allclose(answer, model(other, t, y)[0])
            assert not torch.allclose(answer, model(stages, later, y)[0])
    before = model(masked, t, y)[0]
    with torch.no_grad():
        model.patch_embed[2].bias.add_(1)
    assert not torch.allclose(before, model(masked, t, y)[0])


def test_the_interface_works_in_it() -> None:
    model = model_of(**ELASTIC)
    x, t, y = inputs(model)
    assert model.levels == (1, 2, 3, 4)
    full, half = model(x, t, y), model(x, t, y, budget=0.5)
    assert not torch.allclose(full[0], half[0])
    assert all(torch.equal(a, b) for a, b in zip(full, model(x, t, y, budget=1.0), strict=True))


def test_other_sizes_than_that_of_training() -> None:
    model = model_of()
    _, t, y = inputs(model)
    x = [torch.randn(2, 3, 8 * 2**k, 8 * 2**k) for k in range(3)]
    assert [v.shape for v in model(x, t, y)] == [stage.shape for stage in x]


def test_a_new_model_answers_zero() -> None:
    model = DFM(DFMConfig(**SIZES, stages=2))
    assert all(not v.any() for v in model(*inputs(model)))


@pytest.mark.parametrize("active", [1, 2, 3])
def test_every_parameter_gets_a_gradient(active: int) -> None:
    """Also those of masked stages, as distributed training wants."""
    model = model_of()
    x, t, y = inputs(model)
    loss = flow_of(model).loss(lambda x, t: model(x, t, y), torch.randn(2, 3, 16, 16), t, x, active)
    assert loss.shape == (2,)
    loss.mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert [bool(final.linear.weight.grad.any()) for final in model.final] == [k < active for k in range(3)]
    assert [bool(embed.weight.grad.any()) for embed in model.patch_embed] == [k < active for k in range(3)]


def test_it_learns() -> None:
    torch.manual_seed(0)
    model, rng = model_of(stages=2), np.random.default_rng(0)
    flow = flow_of(model, stages=StageDensity([0.5, 0.5]))
    x, y = torch.randn(4, 3, 16, 16), torch.arange(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(100):
        t, active = flow.draw_times(4, rng)
        noise = [normal(rng, (4, *shape)) for shape in flow.noise_shapes]
        loss = flow.loss(lambda x, t: model(x, t, y), x, t, noise, active).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()) / active)
    assert sum(losses[-10:]) < 0.85 * sum(losses[:10])


@pytest.mark.parametrize("solver", ["euler", "heun", "sde"])
@pytest.mark.parametrize("guidance", [None, elit.Guidance("cfg", 3.0, interval=(0.2, 0.9)), elit.Guidance("ccfg", 3.0)])
def test_samples_do_not_depend_on_the_batch(solver: str, guidance: elit.Guidance | None) -> None:
    model = model_of(**ELASTIC)
    told: dict[str, Any] = {"steps": 6, "solver": solver, "guidance": guidance, "budget": 0.5}
    together = elit.sample(model, [0, 1, 2], seeds=[5, 6, 7], **told)
    alone = elit.sample(model, [1], seeds=[6], batch_size=1, **told)
    assert together.shape == (3, 3, 16, 16) and together.isfinite().all()
    assert torch.allclose(together[1:2], alone, atol=1e-4)


def test_stages_begin_one_after_the_other() -> None:
    model, states = model_of(), []
    elit.sample(model, [0], steps=StageSchedule([2, 1, 3], [0.2, 0.1]), callback=states.append)
    moved = [
        [
            not torch.equal(a, b)
            for a, b in zip(before.x.split([48, 192, 768], 1), after.x.split([48, 192, 768], 1), strict=True)
        ]
        for before, after in zip(states, states[1:], strict=False)
    ]
    assert moved == [[True, False, False], [True, True, False], *[[True, True, True]] * 3]
    assert states[-1].t.shape == (1, 3) and not states[-1].t.any()


@pytest.mark.parametrize("guidance", [None, elit.Guidance("ccfg", 2.0)])
@pytest.mark.parametrize("solver", ["euler", "heun", "sde"])
def test_a_stage_may_be_done_before_the_next_begins(solver: str, guidance: elit.Guidance | None) -> None:
    """A threshold of 0: there is no score where a stage is data, and it stays as it is from there on."""
    model, states = model_of(stages=2, **ELASTIC), []
    schedule = StageSchedule([3, 3], [0.0])
    told: dict[str, Any] = {"steps": schedule, "solver": solver, "guidance": guidance}
    images = elit.sample(model, [0, 1], callback=states.append, **told)
    assert images.isfinite().all()
    coarse = [info.x[:, : 3 * 8 * 8] for info in states]
    assert not torch.equal(coarse[1], coarse[2])
    assert torch.equal(coarse[2], coarse[3]) and torch.equal(coarse[2], coarse[5])


def test_stages_that_wait_are_given_to_the_model_as_zeros() -> None:
    model, seen = model_of(), []
    encode = model.encode

    def watched(x: list[Tensor], t: Tensor, y: Tensor | None = None) -> Any:
        seen.append([bool(stage.any()) for stage in x])
        return encode(x, t, y)

    model.encode = watched
    elit.sample(model, [0], steps=StageSchedule([2, 1, 3], [0.2, 0.1]))
    assert seen == [[True, False, False]] * 2 + [[True, True, False]] + [[True, True, True]] * 3


def test_budget_by_noise() -> None:
    model, noise = model_of(**ELASTIC), []
    elit.sample(model, [0], steps=6, budget=lambda t: noise.append(t) or 1.0)
    assert noise[0] == 1 and noise == sorted(noise, reverse=True)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m, x, t, y: m(x[:2], t, y), "2 stages"),
        (lambda m, x, t, y: m(x, t[:, 0], y), "times of shape"),
        (lambda m, x, t, y: m([x[0], x[1], x[1]], t, y), "each must be half the size"),
        (lambda m, x, t, y: m(x, t), "needs labels"),
        (lambda m, x, t, y: m(x, t, y, budget=0.5), "no latent interface"),
        (lambda m, x, t, y: elit.sample(m, y, steps=2), "too few for 3 stages"),
        (lambda m, x, t, y: elit.sample(m, y, steps=StageSchedule([2, 2], [0.1])), "the schedule has 2 stages"),
        (lambda m, x, t, y: elit.sample(m, y, noise=torch.zeros(2, 3, 16, 16)), r"the model takes \(2, 1008\)"),
        (lambda m, x, t, y: elit.sample(m, y, solver="rk4"), "no solver is named 'rk4'"),
    ],
)
def test_wrong_inputs(call: Any, said: str) -> None:
    model = model_of()
    with pytest.raises(ElitError, match=said):
        call(model, *inputs(model))


def test_a_stage_schedule_is_for_multi_scale_models() -> None:
    model = DiT(DiTConfig(**SIZES))
    with pytest.raises(ElitError, match="for multi-scale models"):
        elit.sample(model, [0], steps=StageSchedule([2, 2], [0.1]))


@pytest.mark.parametrize(
    "changes",
    [{"stages": 4}, {"stages": 0}, {"patch_size": 1}, {"patch_size": (2, 4, 4)}, {"input_size": (2, 16, 16)}],
)
def test_impossible_sizes(changes: dict[str, Any]) -> None:
    with pytest.raises(ElitError):
        DFMConfig(**(SIZES | changes))


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = model_of(**ELASTIC)
    model.save_pretrained(tmp_path / "saved")
    loaded = elit.load(tmp_path / "saved")
    assert isinstance(loaded, DFM) and loaded.config == model.config
    x, t, y = inputs(model)
    assert all(torch.equal(a, b) for a, b in zip(loaded(x, t, y), model(x, t, y), strict=True))


@pytest.mark.parametrize("name", ["DFM-SiT-S/2", "ELIT-DFM-SiT-B/4", "DFM-SiT-XL/8"])
def test_names(name: str) -> None:
    with torch.device("meta"):
        model = elit.create(name)
    assert isinstance(model, DFM) and model.config.stages == 2
    assert (model.interface is not None) == name.startswith("ELIT-")


def test_its_cost_is_counted_like_any_other() -> None:
    """The blocks do the work, and there are as many tokens as in the plain model."""
    with torch.device("meta"):
        multi_scale, plain = (count_flops(elit.models.config_for(name)).total for name in ("DFM-SiT-B/2", "SiT-B/2"))
    assert plain < multi_scale < 1.01 * plain


def test_a_patch_of_one_pixel_cannot_be_halved() -> None:
    with pytest.raises(ElitError, match="at least 2"):
        elit.create("DFM-SiT-B/1")
