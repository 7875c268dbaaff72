"""`elit.sample`: the same seed gives the same sample, whatever else is sampled."""

from typing import Any

import pytest
import torch
from torch import Tensor

import elit
from elit import ElitError, Guidance
from elit.flow import SOLVERS, StepInfo, time_grid
from elit.flow.solvers import Moment, Solver, Step, StepGenerator
from elit.interface import InterfaceConfig
from elit.seeding import generator, normal
from tests.helpers.models import Recorder, tiny

SEEDS = [5, 0, 123456789012, 7, 2, 3, 11]
LABELS = [1, 9, 0, 4, 4, 2, 7]
OPTIONS: dict[str, dict[str, Any]] = {
    "euler": {},
    "heun": {"solver": "heun"},
    "sde": {"solver": "sde"},
    "cfg": {"guidance": Guidance("cfg", 2.0)},
    "ccfg": {"guidance": Guidance("ccfg", 2.0), "budget": 0.5},
    "ag": {"guidance": Guidance("ag", 2.0)},
    "sde, ccfg": {"solver": "sde", "guidance": Guidance("ccfg", 2.0)},
    "schedule": {"budget": [0.25, 0.5, 0.5, 1.0]},
    "cosine": {"path": "cosine"},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())

# A batch changes how the float32 kernels order their sums: 6e-8 a rounding, of velocities of about 5, over 4 steps.
# Measured on a CPU: up to 1.5e-6 on samples of about 5, equal bits in some sizes only.
ROUNDING = 2e-5


def sample(labels: list[int], seeds: list[int], **options: Any) -> Tensor:
    return elit.sample(tiny(), labels, seeds=seeds, **({"steps": 4} | options))


@every_option
def test_a_call_repeated_gives_the_same_bits(options: dict[str, Any]) -> None:
    first = sample(LABELS, SEEDS, **options)
    assert (first.dtype, first.shape) == (torch.float32, (7, 3, 8, 8))
    assert first.isfinite().all()
    torch.manual_seed(99)  # nothing depends on the global generator
    assert torch.equal(sample(LABELS, SEEDS, **options), first)


@every_option
def test_a_sample_does_not_depend_on_batch_size_order_or_company(options: dict[str, Any]) -> None:
    together = sample(LABELS, SEEDS, **options)
    for batch_size in (1, 2, 3, 5):
        apart = sample(LABELS, SEEDS, batch_size=batch_size, **options)
        torch.testing.assert_close(apart, together, rtol=0, atol=ROUNDING)
    order = [3, 1, 6, 0, 5, 2, 4]
    moved = sample([LABELS[i] for i in order], [SEEDS[i] for i in order], **options)
    torch.testing.assert_close(moved, together[order], rtol=0, atol=ROUNDING)
    alone = sample(LABELS[2:3], SEEDS[2:3], **options)
    torch.testing.assert_close(alone, together[2:3], rtol=0, atol=ROUNDING)


@every_option
def test_batches_of_one_size_agree_to_the_bit(options: dict[str, Any]) -> None:
    """The same kernels on other company: order changes nothing at all."""
    one_by_one = sample(LABELS, SEEDS, batch_size=1, **options)
    order = [3, 1, 6, 0, 5, 2, 4]
    moved = sample([LABELS[i] for i in order], [SEEDS[i] for i in order], batch_size=1, **options)
    assert torch.equal(moved, one_by_one[order])


def test_seeds_and_labels_change_the_sample() -> None:
    base = sample([1, 1, 2], [0, 1, 0])
    assert (base[0] - base[1]).abs().max() > 0.1
    assert (base[0] - base[2]).abs().max() > 1e-3
    assert torch.equal(sample([1, 1], [4, 4])[0], sample([1, 1], [4, 4])[1])


def test_seeds_are_counted_where_none_are_given() -> None:
    model = tiny()
    assert torch.equal(elit.sample(model, [1, 2, 3], steps=2), elit.sample(model, [1, 2, 3], seeds=[0, 1, 2], steps=2))


def test_labels_and_seeds_may_be_tensors() -> None:
    model = tiny()
    given = elit.sample(model, torch.tensor(LABELS), seeds=torch.tensor(SEEDS), steps=2)
    assert torch.equal(given, elit.sample(model, LABELS, seeds=SEEDS, steps=2))


def test_the_start_is_the_noise_of_each_seed() -> None:
    """Also what a user can make: normal numbers of the generator of (seed, "start")."""
    model = Recorder(lambda x, t, y, budget: x * 0)
    start = torch.stack([normal(generator(seed, "start"), model.input_shape()) for seed in SEEDS])
    assert torch.equal(elit.sample(model, LABELS, seeds=SEEDS, steps=3), start)
    noise = torch.randn(7, *model.input_shape())
    assert torch.equal(elit.sample(model, LABELS, noise=noise, steps=3), noise)
    assert torch.equal(elit.sample(model, LABELS, noise=noise, seeds=SEEDS, steps=3), noise)


def test_noise_takes_the_place_of_that_of_the_seeds() -> None:
    model = tiny()
    start = torch.stack([normal(generator(seed, "start"), model.input_shape()) for seed in SEEDS])
    for solver in ("euler", "sde"):
        by_noise = elit.sample(model, LABELS, seeds=SEEDS, noise=start, steps=3, solver=solver)
        assert torch.equal(by_noise, elit.sample(model, LABELS, seeds=SEEDS, steps=3, solver=solver))


def test_the_draws_of_the_sde_are_those_of_the_seeds() -> None:
    model, noise = tiny(), torch.randn(2, 3, 8, 8)
    noise[1] = noise[0]

    def ends(seeds: list[int], solver: str) -> Tensor:
        return elit.sample(model, [1, 1], seeds=seeds, noise=noise, steps=4, solver=solver)

    same, apart = ends([3, 3], "sde"), ends([3, 4], "sde")
    assert torch.equal(same[0], same[1])
    assert (apart[0] - apart[1]).abs().max() > 0.1
    torch.testing.assert_close(apart[0], same[0], rtol=0, atol=ROUNDING)
    assert torch.equal(*ends([3, 4], "euler"))


def test_every_step_of_the_sde_has_a_draw_of_its_own() -> None:
    """With a velocity of zero the state is its noise: generators of (seed, "start") and (seed, "step i")."""
    model = Recorder(lambda x, t, y, budget: x * 0)
    end = elit.sample(model, [0, 0], seeds=[4, 9], steps=3, solver="sde")
    times = [1.0, 0.52, 0.04, 0.0]
    for sample, seed in zip(end, (4, 9), strict=True):
        draws = [normal(generator(seed, f"step {i}"), (2, 4, 4)).double() for i in range(2)]
        x = normal(generator(seed, "start"), (2, 4, 4)).double()
        for step, (t, t_next) in enumerate(zip(times, times[1:], strict=False)):
            x = x + (t_next - t) * x  # drift -t * score, and the score is -x / t
            if step < 2:
                x = x + (2 * t * (t - t_next)) ** 0.5 * draws[step]
        torch.testing.assert_close(sample, x.float(), rtol=0, atol=1e-6)
        assert (draws[0] - draws[1]).abs().max() > 0.1


def test_a_model_without_classes_takes_no_labels() -> None:
    model = tiny(num_classes=0)
    by_seed = elit.sample(model, seeds=[1, 2, 3], steps=2)
    assert by_seed.shape == (3, 3, 8, 8)
    assert torch.equal(elit.sample(model, noise=by_seed, steps=2), elit.sample(model, noise=by_seed, steps=2))
    guided = elit.sample(model, seeds=[1, 2, 3], steps=2, guidance=Guidance("ag", 2.0))
    assert (guided - by_seed).abs().max() > 1e-3


def test_other_shapes_of_models() -> None:
    video = tiny(input_size=(2, 8, 8), patch_size=(1, 2, 2), interface=InterfaceConfig((2, 2, 2)))
    assert elit.sample(video, [1, 2], steps=2, solver="sde", budget=0.5).shape == (2, 3, 2, 8, 8)
    wide = tiny(input_size=(4, 8))
    assert elit.sample(wide, [1], steps=2).shape == (1, 3, 4, 8)
    plain = tiny(interface=None)
    assert elit.sample(plain, [1], steps=2, budget=1.0, guidance=Guidance("cfg", 2.0)).shape == (1, 3, 8, 8)


def test_half_precision_models_are_integrated_in_float64() -> None:
    model, seen = tiny().bfloat16(), []
    end = elit.sample(model, [1], steps=3, callback=seen.append)
    assert end.dtype == torch.float32
    assert all(info.x.dtype == torch.float64 for info in seen)
    assert (end - sample([1], [0], steps=3)).norm() < 0.1 * end.norm()  # bfloat16 velocities, 2^-9 a rounding


def test_the_callback_is_told_every_step_of_every_batch() -> None:
    seen: list[StepInfo] = []
    elit.sample(tiny(), LABELS, steps=3, batch_size=4, callback=seen.append)
    assert [(info.step, info.steps, len(info.x)) for info in seen] == [
        (0, 3, 4), (1, 3, 4), (2, 3, 4), (0, 3, 3), (1, 3, 3), (2, 3, 3),
    ]  # fmt: skip
    assert [info.samples for info in seen] == [[0, 1, 2, 3]] * 3 + [[4, 5, 6]] * 3
    for info, t in zip(seen[:3], (2 / 3, 1 / 3, 0.0), strict=True):
        torch.testing.assert_close(info.t, torch.full((4,), t, dtype=torch.float64), rtol=0, atol=1e-15)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_the_callback_is_told_the_state_at_the_end_of_each_step(solver: str, steps: int) -> None:
    """In float64, also where a step has two evaluations; and to be told changes nothing."""
    seen: list[StepInfo] = []
    model = Recorder(lambda x, t, y, budget: 0.3 * x)
    end = elit.sample(model, [0, 0], steps=steps, solver=solver, callback=seen.append)
    assert [(info.step, info.steps) for info in seen] == [(i, steps) for i in range(steps)]
    assert all(info.x.dtype == torch.float64 for info in seen)
    assert [info.t.tolist() for info in seen] == [[t, t] for t in time_grid(solver, steps)[1:].tolist()]
    assert torch.equal(seen[-1].x.float(), end)
    assert torch.equal(elit.sample(model, [0, 0], steps=steps, solver=solver), end)


def test_a_bar_is_shown_on_request_only(capsys: pytest.CaptureFixture[str]) -> None:
    elit.sample(tiny(), [1, 2, 3], steps=2, batch_size=2)
    assert capsys.readouterr().err == ""
    elit.sample(tiny(), [1, 2, 3], steps=2, batch_size=2, progress=True)
    assert "4/4" in capsys.readouterr().err


def test_nothing_is_kept_for_gradients() -> None:
    model = tiny()
    assert not elit.sample(model, [1], steps=2).requires_grad
    assert all(weight.grad is None for weight in model.parameters())


def test_samples_are_ordinary_tensors() -> None:
    """One may change them in place and learn through them."""
    x = elit.sample(tiny(), [1, 2], steps=2)
    assert not x.is_inference()
    x += 1
    x.requires_grad_()
    weight = torch.ones(3, 1, 1, requires_grad=True)
    (x * weight).square().mean().backward()
    assert x.grad is not None and x.grad.any()
    assert weight.grad is not None and weight.grad.any()
    model = tiny()
    (state,) = elit.trajectories(model, [1], steps=2)
    elit.advance(model, [state])
    state.x += 1  # a state too
    assert not state.x.is_inference()


def test_a_solver_that_a_user_adds_works_as_the_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def midpoint(x: Tensor, step: Step) -> StepGenerator:
        v = yield x, step.start
        middle = Moment(*((a + b) / 2 for a, b in zip(step.start, step.end, strict=True)))
        v = yield x + step.dt / 2 * v, middle
        return x + step.dt * v

    monkeypatch.setitem(SOLVERS, "midpoint", Solver(midpoint, evaluations=2))
    model = Recorder(lambda x, t, y, budget: x * t.view(-1, 1, 1, 1))
    noise = torch.randn(2, *model.input_shape())
    end = elit.sample(model, [0, 1], noise=noise, steps=2, solver="midpoint")
    factor = 1.0
    for t in (1.0, 0.5):  # a step of -1/2: half of it by the slope t, then all of it by that of the middle
        factor *= 1 - 0.5 * (t - 0.25) * (1 - 0.25 * t)
    torch.testing.assert_close(end, noise * factor, rtol=1e-6, atol=0)  # float32 velocities
    assert [call.t.tolist() for call in model.calls] == [[t, t] for t in (1.0, 0.75, 0.5, 0.25)]
    options = {"solver": "midpoint", "guidance": Guidance("ccfg", 2.0), "budget": torch.tensor([0.5] * 3 + [1.0] * 4)}
    together = sample(LABELS, SEEDS, **options)
    assert (together - sample(LABELS, SEEDS, **(options | {"solver": "heun"}))).abs().max() > 1e-3
    alone = sample(LABELS[2:3], SEEDS[2:3], **(options | {"budget": 0.5}))
    torch.testing.assert_close(alone, together[2:3], rtol=0, atol=ROUNDING)
    with pytest.raises(ElitError, match="there are euler, heun, sde, midpoint"):
        sample([1], [1], solver="rk4")


def test_every_level_is_sampled_at_its_budget() -> None:
    ends = [sample(LABELS, SEEDS, budget=level / 4) for level in (1, 2, 3, 4)]
    for a, b in zip(ends, ends[1:], strict=False):
        assert (a - b).abs().max() > 1e-3
    assert torch.equal(ends[-1], sample(LABELS, SEEDS))


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"labels": [3, 10]}, r"label 10 does not exist; the model knows 0\.\.9"),
        ({"labels": [-1]}, r"label -1 does not exist; the model knows 0\.\.9"),
        ({"labels": torch.tensor([3, 11])}, "label 11 does not exist"),
        ({"labels": [0.5, 1.0]}, "labels must be whole numbers, one per sample, not torch.float32"),
        ({"labels": torch.zeros(2, 2, dtype=torch.long)}, r"labels must be whole numbers.* shape \(2, 2\)"),
        ({"labels": ["cat"]}, "labels must be whole numbers, one per sample"),
        ({"labels": None, "seeds": [1]}, "the model has 10 classes: give labels"),
        ({"labels": [1, 2], "seeds": [1]}, "one of each per sample, not 2 labels, 1 seeds"),
        ({"labels": [1], "noise": torch.zeros(2, 3, 8, 8)}, "one of each per sample, not 1 labels, 2 noise"),
        ({"labels": [1], "noise": torch.zeros(1, 4, 8, 8)},
         r"noise has shape \(1, 4, 8, 8\); the model takes \(1, 3, 8, 8\)"),
        ({"labels": []}, "nothing to sample: give labels, seeds or noise"),
        ({"labels": None}, "nothing to sample"),
        ({"steps": 0}, "steps is 0; it must be a whole number"),
        ({"steps": 1.5}, "steps is 1.5"),
        ({"solver": "dpm"}, "no solver is named 'dpm'; there are euler, heun, sde"),
        ({"path": "spiral"}, "no path is named 'spiral'; there are linear, cosine"),
        ({"batch_size": 0}, "batch_size is 0; it must be a whole number, at least 1"),
        ({"batch_size": -2}, "batch_size is -2"),
        ({"budget": 0}, r"budget is 0; it must be a number in \(0, 1\]"),
        ({"budget": 1.5}, "budget is 1.5"),
        ({"budget": "abc"}, "budget is 'abc'"),
        ({"budget": True}, "budget is True"),
        ({"budget": float("nan")}, "budget is nan"),
        ({"budget": [0.5] * 3}, "budget lists 3 values for 40 sampling steps"),
        ({"budget": lambda t: t - 1}, "budget is 0.0"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named_before_anything_runs(arguments: dict[str, Any], why: str) -> None:
    model = Recorder(lambda *_: pytest.fail("the model must not run"))
    model.config.in_channels, model.config.input_size = 3, 8
    with pytest.raises(ElitError, match=why) as caught:
        elit.sample(model, **({"labels": [1]} | arguments))
    assert "\n" not in str(caught.value)


def test_labels_without_classes_and_budgets_without_an_interface_are_named() -> None:
    with pytest.raises(ElitError, match="the model has no classes: give no labels"):
        elit.sample(tiny(num_classes=0), [1])
    with pytest.raises(ElitError, match=r"budget is 0.5, but this model has no latent interface"):
        elit.sample(tiny(interface=None), [1], budget=0.5)
