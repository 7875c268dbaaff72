"""DiT and SiT, with and without the interface, through what a user calls."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from elit import ElitError
from elit.interface import InterfaceConfig
from elit.models import DiT, DiTConfig
from elit.models.transformer import patchify, unpatchify
from tests.helpers import reference
from tests.helpers.models import PUBLISHED, TINY, inputs, randomize, tiny

SINCOS = {"positions": "sincos", "qk_norm": False}
MODELS: dict[str, dict[str, Any]] = {
    "plain DiT": {"interface": None},
    "plain SiT": {"interface": None, **SINCOS},
    "ELIT-DiT": {},
    "ELIT-SiT": {"interface": PUBLISHED, **SINCOS},
    "ELIT-SiT, tail dropped": {"interface": replace(PUBLISHED, tail_visible=False), **SINCOS},
    "not square": {"input_size": (8, 12)},
    "unconditional": {"num_classes": 0},
    "pixels": {"patch_size": 1, "input_size": 4, "in_channels": 1},
    "video": {"input_size": (2, 8, 8), "patch_size": (1, 2, 2), "interface": InterfaceConfig((2, 2, 2))},
}
every_model = pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())


def labels_for(model: DiT, y: Tensor) -> Tensor | None:
    return y if model.config.num_classes else None


# ------------------------------------------------------------------------------------------------ the reference


def plain_forward(model: DiT, x: Tensor, t: float, y: int | None, level: int) -> np.ndarray:
    """The whole model for one sample, in float64 loops: from DESIGN's picture, block by block."""
    config, weights = model.config, reference.weights_of(model)
    c_in, (gt, gh, gw) = config.in_channels, config.grid_size
    frames = x if x.dim() == 4 else x[:, None]  # (C, T, H, W)
    pt, ph, pw = frames.shape[1] // gt, frames.shape[2] // gh, frames.shape[3] // gw
    rotary = config.positions == "rotary"

    tokens, at = [], []
    for i in range(gt):
        for j in range(gh):
            for k in range(gw):
                patch = [
                    frames[c, i * pt + a, j * ph + b, k * pw + d].item()
                    for a in range(pt) for b in range(ph) for d in range(pw) for c in range(c_in)
                ]  # fmt: skip
                token = reference.linear(weights, "patch_embed", np.array(patch))
                tokens.append(token if rotary else token + weights["positions"][len(tokens)])
                at.append((i, j, k) if gt > 1 else (j, k))

    angles = np.array([t * 10_000 ** (-k / 128) for k in range(128)])
    features = np.concatenate((np.cos(angles), np.sin(angles)))
    c = reference.linear(
        weights, "time_embed.fc2", reference.silu(reference.linear(weights, "time_embed.fc1", features))
    )
    if y is not None:
        c = c + weights["label_embed.weight"][y]

    def blocks(x: list[np.ndarray], first: int, end: int, positions: list[Any]) -> list[np.ndarray]:
        for i in range(first, end):
            x = reference.block(
                reference.part(weights, f"blocks.{i}"), x, c, config.num_heads,
                positions if rotary else [None] * len(x), config.rope_theta,
            )  # fmt: skip
        return x

    if config.interface is None:
        tokens = blocks(tokens, 0, config.depth, at)
    else:
        assert model.interface is not None
        grid, published = model.interface.grid, config.interface.variant == "published"
        own = reference.part(weights, "interface")
        shared = (grid.size, grid.window, config.num_heads, config.rope_theta, published)
        core, tail = config.head_depth, config.depth - config.tail_depth
        tokens = blocks(tokens, 0, core, at)
        filled = grid.window_tokens if config.interface.tail_visible else level
        latents = reference.read(own, tokens, c, *shared, filled)
        windows = reference.places(grid.shape, grid.size[0] > 1)
        kept = [latent for window in latents for latent in window[:level]]
        kept = blocks(kept, core, tail, [(j, *place) for place in windows for j in range(level)])
        seen = [kept[g * level : (g + 1) * level] + window[level:] for g, window in enumerate(latents)]
        tokens = reference.write(own, tokens, seen, *shared, config.interface.write_depth)
        tokens = blocks(tokens, tail, config.depth, at)

    shift, scale = np.split(reference.linear(weights, "final.modulation.linear", reference.silu(c)), 2)
    out = np.zeros(tuple(frames.shape))
    for n, token in enumerate(tokens):
        values = reference.linear(weights, "final.linear", reference.layer_norm(token) * (1 + scale) + shift)
        i, j, k = n // (gh * gw), n // gw % gh, n % gw
        values = values.reshape(pt, ph, pw, c_in).transpose(3, 0, 1, 2)
        out[:, i * pt : (i + 1) * pt, j * ph : (j + 1) * ph, k * pw : (k + 1) * pw] = values
    return out.reshape(tuple(x.shape))


@every_model
def test_a_model_is_the_plain_loops(changes: dict[str, Any]) -> None:
    model = tiny(**changes).double()
    x, t, y = inputs(model, 2, dtype=torch.float64)
    t[0] = 0.0  # features of time 0 are exact; those of other times are float32, 6e-8, times a few layers
    for budget in (None, 0.5, 1 / 4) if model.interface else (None,):
        answer = model(x, t, labels_for(model, y), budget)
        for sample, tolerance in ((0, 1e-11), (1, 2e-5)):
            label = int(y[sample]) if model.config.num_classes else None
            expected = plain_forward(model, x[sample], t[sample].item(), label, model.level(budget))
            np.testing.assert_allclose(answer[sample].detach().numpy(), expected, rtol=0, atol=tolerance)


@every_model
def test_float32_is_float64_within_its_precision(changes: dict[str, Any]) -> None:
    model = tiny(**changes)
    x, t, y = inputs(model, 3)
    rough = model(x, t, labels_for(model, y))
    exact = model.double()(x.double(), t, labels_for(model, y))
    assert rough.dtype == torch.float32
    # 2^-24 a rounding, through 4 blocks of some hundred sums each, on values of about 3
    torch.testing.assert_close(rough.double(), exact, rtol=0, atol=3e-5)


@every_model
def test_bfloat16_runs_and_is_near(changes: dict[str, Any]) -> None:
    model = tiny(**changes)
    x, t, y = inputs(model, 2)
    exact = model(x, t, labels_for(model, y))
    rough = model.bfloat16()(x.bfloat16(), t, labels_for(model, y))
    assert rough.dtype == torch.bfloat16
    # 2^-9 a rounding, through the same depth: a few per cent
    assert (rough.float() - exact).norm() < 0.05 * exact.norm()


# ------------------------------------------------------------------------------------------------ shapes


def test_patches_are_undone_by_their_inverse() -> None:
    for size, patch, shape in [
        ((1, 3, 4), (1, 2, 2), (2, 5, 6, 8)),
        ((1, 2, 4), (1, 4, 2), (2, 3, 8, 8)),
        ((4, 3, 2), (1, 2, 2), (2, 3, 4, 6, 4)),
        ((2, 3, 2), (2, 2, 2), (3, 1, 4, 6, 4)),
    ]:
        x = torch.randn(shape)
        tokens = patchify(x, size, patch)
        assert tokens.shape == (shape[0], np.prod(size), np.prod(patch) * shape[1])
        assert torch.equal(unpatchify(tokens, size, patch).view(shape), x)


def test_a_patch_lists_its_pixels_row_by_row_channels_last() -> None:
    x = torch.arange(32.0).view(1, 2, 4, 4)  # channel 1 is 16 more than channel 0
    assert patchify(x, (1, 2, 2), (1, 2, 2))[0, 1].tolist() == [2, 18, 3, 19, 6, 22, 7, 23]


@every_model
@pytest.mark.parametrize("batch", [1, 3])
def test_the_velocity_has_the_shape_of_the_input(changes: dict[str, Any], batch: int) -> None:
    model = tiny(**changes)
    x, t, y = inputs(model, batch)
    assert model(x, t, labels_for(model, y)).shape == x.shape


@every_model
def test_samples_do_not_see_each_other(changes: dict[str, Any]) -> None:
    model = tiny(**changes).double()
    x, t, y = inputs(model, 5, dtype=torch.float64)
    together = model(x, t, labels_for(model, y))
    for i in range(5):
        one = slice(i, i + 1)
        alone = model(x[one], t[one], labels_for(model, y[one]))
        torch.testing.assert_close(alone, together[one], rtol=0, atol=1e-12)  # float64; sums in another order


def test_the_papers_video_runs_at_every_kind_of_budget() -> None:
    """8 x 16 x 16 tokens, windows of 2 x 4 x 4: 64 windows of 32 latents."""
    model = tiny(input_size=(8, 32, 32), patch_size=(1, 2, 2), in_channels=2, interface=InterfaceConfig((2, 4, 4)))
    x, t, y = inputs(model, 1)
    assert x.shape == (1, 2, 8, 32, 32)
    assert model.num_latents == 32
    assert model.levels == tuple(range(2, 33))
    full = model(x, t, y)
    small = model(x, t, y, budget=1 / 16)
    assert full.shape == small.shape == x.shape
    assert (full - small).abs().max() > 1e-3


@pytest.mark.parametrize("size", [(16, 16), (12, 8), (4, 20)])
def test_rotary_models_take_other_resolutions(size: tuple[int, int]) -> None:
    """The same weights, positions continued: what a model built for that size answers."""
    model = tiny()
    native = tiny(input_size=size)
    native.load_state_dict(model.state_dict())
    x, t, y = inputs(native, 2)
    for budget in (None, 0.25):
        assert torch.equal(model(x, t, y, budget), native(x, t, y, budget))


def test_a_plain_sit_takes_other_resolutions() -> None:
    model = tiny(interface=None, **SINCOS)
    native = tiny(interface=None, input_size=(12, 8), **SINCOS)
    native.load_state_dict({k: v for k, v in model.state_dict().items() if k != "positions"}, strict=False)
    x, t, y = inputs(native, 2)
    assert torch.equal(model(x, t, y), native(x, t, y))


def test_one_frame_is_the_image() -> None:
    model = tiny()
    x, t, y = inputs(model, 2)
    assert torch.equal(model(x[:, :, None], t, y).squeeze(2), model(x, t, y))


# ------------------------------------------------------------------------------------------------ what ELIT promises


@pytest.mark.parametrize("positions", ["rotary", "sincos"])
def test_a_new_elastic_model_is_its_head_and_tail(positions: str) -> None:
    """Write starts at zero, so the core does not show: a plain model of the other blocks answers the same."""
    elastic = tiny(depth=5, head_depth=2, tail_depth=1, positions=positions)
    fresh = DiT(replace(TINY, depth=5, head_depth=2, tail_depth=1))
    assert elastic.interface is not None
    assert fresh.interface is not None
    elastic.interface.write_layers.load_state_dict(fresh.interface.write_layers.state_dict())  # as in a new model
    plain = tiny(depth=3, interface=None, positions=positions)
    plain.load_state_dict(
        {
            name.replace("blocks.4.", "blocks.2."): value
            for name, value in elastic.state_dict().items()
            if not name.startswith(("interface.", "blocks.2.", "blocks.3."))
        }
    )
    x, t, y = inputs(elastic, 3)
    for budget in (None, 0.5, 0.25):
        assert torch.equal(elastic(x, t, y, budget), plain(x, t, y))


@every_model
def test_a_new_model_answers_zero(changes: dict[str, Any]) -> None:
    model = DiT(replace(TINY, **changes))
    x, t, y = inputs(model, 2)
    assert not model(x, t, labels_for(model, y)).any()


@pytest.mark.parametrize("changes", [MODELS["ELIT-DiT"], MODELS["ELIT-SiT, tail dropped"]], ids=["paper", "published"])
def test_the_answer_does_not_depend_on_dropped_latents(changes: dict[str, Any]) -> None:
    model = tiny(**changes)
    assert model.interface is not None
    x, t, y = inputs(model, 2)
    before = {level: model(x, t, y, level / 4) for level in model.levels}
    with torch.no_grad():
        model.interface.latents[2:] += 10
    for level, answer in before.items():
        assert torch.equal(model(x, t, y, level / 4), answer) == (level <= 2)


@pytest.mark.parametrize("name", ["ELIT-DiT", "ELIT-SiT", "video"])
def test_every_budget_is_another_function(name: str) -> None:
    model = tiny(**MODELS[name])
    x, t, y = inputs(model, 2)
    answers = [model(x, t, y, level / model.num_latents) for level in model.levels]
    assert torch.equal(answers[-1], model(x, t, y))
    assert torch.equal(answers[-1], model(x, t, y, budget=1))
    for i, a in enumerate(answers):
        for b in answers[:i]:
            assert (a - b).abs().max() > 1e-4


@every_model
def test_the_answer_depends_on_input_time_and_label(changes: dict[str, Any]) -> None:
    model = tiny(**changes)
    x, t, y = inputs(model, 2)
    y = (y + 1) % 5
    answer = model(x, t, labels_for(model, y))
    assert (model(x + 0.1, t, labels_for(model, y)) - answer).abs().max() > 1e-3
    assert (model(x, 1 - t, labels_for(model, y)) - answer).abs().max() > 1e-3
    if model.config.num_classes:
        assert (model(x, t, y + 1) - answer).abs().max() > 1e-3


@pytest.mark.parametrize("head_depth", [0, 1, 2])
@pytest.mark.parametrize("tail_depth", [0, 1])
def test_any_split_works(head_depth: int, tail_depth: int) -> None:
    model = tiny(head_depth=head_depth, tail_depth=tail_depth)
    x, t, y = inputs(model, 2)
    assert model.config.core_depth == 4 - head_depth - tail_depth
    assert model(x, t, y, 0.5).isfinite().all()


# ------------------------------------------------------------------------------------------------ gradients, tracing


@every_model
def test_every_weight_has_a_gradient(changes: dict[str, Any]) -> None:
    model = tiny(**changes).train()
    x, t, _ = inputs(model, 11)
    y = torch.arange(11) if model.config.num_classes else None  # every label, the null class included
    model(x, t, y).square().sum().backward()
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            assert name == "positions"  # the fixed table of SiT
            continue
        assert weight.grad is not None, name
        touched = weight.grad.abs() > 0
        if name.startswith("interface.read_layer.modulation"):
            touched = touched[: 6 * model.config.width]  # the published seventh part serves nothing
        if name == "interface.latent_positions":
            touched = touched[:16]  # the rows of this grid
        assert touched.flatten(1).any(1).all() if weight.dim() > 1 else touched.any(), name


def test_a_lower_budget_trains_the_same_weights_save_the_dropped_latents() -> None:
    model = tiny().train()
    assert model.interface is not None
    x, t, y = inputs(model, 4)
    model(x, t, y, budget=0.5).square().sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())
    assert model.interface.latents.grad is not None
    assert model.interface.latents.grad.any(1).tolist() == [True, True, False, False]


@every_model
def test_a_forward_reads_no_value(changes: dict[str, Any]) -> None:
    """On the meta device there are no values: whatever looked at one would fail."""
    model = DiT(replace(TINY, **changes)).to("meta")
    x, t, y = (value.to("meta") for value in inputs(model, 3))
    budgets = (None, 0.5) if model.interface else (None,)
    one_size_only = model.interface is not None and model.interface.published
    for each in (x,) if one_size_only else (x, torch.cat((x, x), dim=-1)):
        for budget in budgets:
            assert model(each, t, labels_for(model, y), budget).shape == each.shape


def test_a_forward_leaves_nothing_behind() -> None:
    model = tiny()
    x, t, y = inputs(model, 2)
    before = {name: dict(vars(part)) for name, part in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    first = model(x, t, y)
    model(torch.cat((x, x), dim=-1), t, y, 0.25)
    assert {name: dict(vars(part)) for name, part in model.named_modules()} == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(x, t, y), first)


# ------------------------------------------------------------------------------------------------ errors


def test_budgets_and_levels_of_a_model() -> None:
    model, plain = tiny(), tiny(interface=None)
    assert (model.levels, model.num_latents) == ((1, 2, 3, 4), 4)
    assert [model.level(b) for b in (None, 1, 0.5, 0.1)] == [4, 4, 2, 1]
    assert (plain.levels, plain.num_latents, plain.level(None), plain.level(1.0)) == ((), 0, 0, 0)
    with pytest.raises(ElitError, match=r"budget is 0.5, but this model has no latent interface"):
        plain.level(0.5)


@pytest.mark.parametrize("budget", [0, 1.5, "abc", True, float("nan"), -1])
@pytest.mark.parametrize("interface", [None, InterfaceConfig(2)])
def test_a_wrong_budget_is_named(budget: Any, interface: InterfaceConfig | None) -> None:
    model = tiny(interface=interface)
    with pytest.raises(ElitError, match=rf"^budget is {budget!r}; it must be a number in \(0, 1\]"):
        model(*inputs(model, 2), budget=budget)


def test_a_wrong_input_is_named() -> None:
    model, unconditional, sit = tiny(), tiny(num_classes=0), tiny(**MODELS["ELIT-SiT"])
    x, t, y = inputs(model, 2)
    with pytest.raises(ElitError, match=r"input of shape \(2, 2, 8, 8\); the model takes \(batch, 3, height, width\)"):
        model(x[:, :2], t, y)
    with pytest.raises(ElitError, match=r"input of shape \(3, 8, 8\)"):
        model(x[0], t, y)
    with pytest.raises(ElitError, match=r"patch size .* does not divide the input size \(1, 8, 7\)"):
        model(x[..., :7], t, y)
    with pytest.raises(ElitError, match="group size 2 does not divide the 3 tokens of the grid along width"):
        model(x[..., :6], t, y)
    with pytest.raises(ElitError, match=r"needs labels 0\.\.9"):
        model(x, t)
    with pytest.raises(ElitError, match="takes no labels"):
        unconditional(x, t, y)
    with pytest.raises(ElitError, match=r"learned latent positions are those of a \(1, 4, 4\) grid"):
        sit(torch.cat((x, x), dim=-1), t, y)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"width": 30}, "width 30 does not give 4 heads of an even size"),
        ({"width": 36}, "width 36 does not give 4 heads of an even size"),
        ({"head_depth": 3}, "head_depth 3 and tail_depth 1 leave no core in depth 4"),
        ({"head_depth": -1}, "head_depth -1 and tail_depth 1"),
        ({"patch_size": 3}, r"patch size .* does not divide the input size \(1, 8, 8\)"),
        ({"input_size": 0}, "size 0 is neither"),
        ({"interface": InterfaceConfig(3)}, "group size 3 does not divide the 4 tokens"),
        ({"interface": InterfaceConfig(2, min_latents=9)}, "min_latents is 9"),
        ({"positions": "sincos", "width": 24, "num_heads": 2, "input_size": (2, 8, 8), "patch_size": (1, 2, 2)},
         "sincos positions need"),
        ({"positions": "sincos", "width": 30, "num_heads": 3}, "sincos positions need a width divisible by 4"),
    ],
)  # fmt: skip
def test_an_impossible_model_is_named(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ElitError, match=why):
        DiT(DiTConfig(**(TINY.__dict__ | changes)))


def test_the_split_has_no_meaning_without_an_interface() -> None:
    model = tiny(depth=2, head_depth=4, tail_depth=4, interface=None)
    x, t, y = inputs(model, 2)
    assert model(x, t, y).isfinite().all()


# ------------------------------------------------------------------------------------------------ new weights


def test_new_weights_follow_the_global_generator() -> None:
    torch.manual_seed(4)
    first = DiT(TINY).state_dict()
    torch.manual_seed(4)
    again = DiT(TINY).state_dict()
    other = DiT(TINY).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["patch_embed.weight"], other["patch_embed.weight"])


def test_new_labels_are_drawn_as_the_configuration_says() -> None:
    for std in (0.02, 1.0):
        table = DiT(replace(TINY, num_classes=999, label_std=std)).label_embed
        assert table is not None
        assert table.weight.std().item() == pytest.approx(std, rel=0.02)  # 32,000 draws: 0.4 % a standard error


def test_a_new_interface_is_drawn_small_and_its_write_is_zero() -> None:
    interface = DiT(replace(TINY, width=256, interface=PUBLISHED)).interface
    assert interface is not None
    for weight in (interface.latents, interface.read_positions, interface.write_positions):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)  # 1,024 draws: 2 % a standard error
    for layer in interface.write_layers:
        assert not layer.attention.proj.weight.any()
        assert not layer.mlp.fc2.weight.any()
        assert layer.attention.q.weight.any()


def test_training_from_new_weights_moves_every_part() -> None:
    """Zero-initialized gates open one after the other; after a few steps none is left at its start."""
    model = DiT(TINY)
    x, t, y = inputs(model, 8)
    start = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    target = torch.randn_like(x)
    losses = []
    for _ in range(8):
        loss = (model(x, t, y) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    still = [name for name, value in model.named_parameters() if torch.equal(value, start[name])]
    assert still == []


def test_randomized_models_differ_by_seed() -> None:
    assert not torch.equal(tiny(1).patch_embed.weight, tiny(2).patch_embed.weight)
    assert randomize(DiT(TINY), 1).final.linear.weight.any()
