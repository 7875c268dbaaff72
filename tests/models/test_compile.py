"""Compiled layers and captured graphs give what the plain model gives, and levels share what was compiled.

Graphs need a GPU. Here their place is taken by a stand-in that runs its function again, on the same tensors in the same
places, so that grouping, padding, copying and every key are tested; test_compile_on_cuda.py captures.
"""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import elit
from elit import Cache, ElitError, Guidance
from elit.conditions import Text
from elit.models import Transformer, compile_layers
from elit.models.graphs import GraphedForward
from tests.helpers.models import inputs, tiny
from tests.helpers.stacks import KINDS

every_kind = pytest.mark.parametrize("kind", KINDS)


class Again:
    """A graph that runs its function again."""

    captured = 0

    def __init__(self, function: Callable[[], Any], device: torch.device, pool: Any) -> None:
        type(self).captured += 1
        self.function, self.outputs = function, function()

    def replay(self) -> None:
        for place, value in zip(leaves(self.outputs), leaves(self.function()), strict=True):
            place.copy_(value)  # into the same memory, as a graph does


def leaves(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    Again.captured = 0
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def graphed(model: Any, *batch_sizes: int) -> Any:
    GraphedForward(model, batch_sizes, Again).install()
    return model


def conditions(model: Any, y: Any) -> Any:
    if not model.conditional:
        return None
    return y._replace(mask=torch.ones_like(y.mask)) if isinstance(y, Text) else y.clamp(max=9)


def assert_near(found: Any, wanted: Any) -> None:
    """Equal but for the rounding of float64 in batches of another size."""
    for one, other in zip(leaves(found), leaves(wanted), strict=True):
        assert other.isfinite().all()
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6 * other.abs().max().item())


# ------------------------------------------------------------------------------------------------ graphs


@every_kind
def test_a_graphed_model_samples_what_the_plain_one_does(kind: str) -> None:
    """At several levels, with every kind of guidance, and in batches that graphs have to be padded for."""
    model, twin = KINDS[kind]().double(), graphed(KINDS[kind]().double(), 2, 4)
    y = conditions(model, inputs(model, 5, dtype=torch.float64)[2])
    guidance: list[Any] = [None, Guidance("ag", 2.0, 0.25), None, Guidance("ag", 1.5, 0.5), None]
    if y is not None:
        guidance[2:4] = [Guidance("cfg", 2.0), Guidance("ccfg", 1.5, 0.25)]
    budget = torch.tensor([1.0, 0.5, 0.25, 1.0, 0.5])
    told: dict[str, Any] = {"seeds": [4, 8, 15, 16, 23], "steps": [3, 3, 2, 3, 3], "budget": budget}
    for cache in (None, Cache(0.5), Cache(0.5, order=1)):
        expected = elit.sample(model, y, guidance=guidance, cache=cache, **told)
        assert_near(elit.sample(twin, y, guidance=guidance, cache=cache, **told), expected)
    assert Again.captured


def test_a_plain_transformer_is_graphed_as_well() -> None:
    model, twin = tiny(interface=None), graphed(tiny(interface=None), 4)
    assert_near(elit.sample(twin, [1, 2, 3], steps=2), elit.sample(model, [1, 2, 3], steps=2))
    assert Again.captured == 1


def test_one_graph_serves_a_level_at_every_step_and_in_every_smaller_batch() -> None:
    model = graphed(tiny(), 2, 4)
    for count in (3, 4, 3):
        elit.sample(model, list(range(count)), steps=3, budget=0.5)
    assert Again.captured == 1
    elit.sample(model, [1, 2], steps=3, budget=0.5)  # a batch of two has one of its own
    assert Again.captured == 2
    elit.sample(model, [1, 2, 3], steps=4, budget=[1.0, 0.5, 0.5, 1.0])  # and so has another level
    assert Again.captured == 3
    elit.sample(model, [1, 2, 3, 4, 5], steps=2)  # more than the largest: no graph
    assert Again.captured == 3


def test_what_a_caller_holds_is_not_overwritten() -> None:
    model = graphed(tiny(), 2)
    x, t, y = inputs(model, 2)
    with torch.no_grad():
        first = model(x, t, y, budget=0.5)
        kept = first.clone()
        assert not torch.equal(model(x + 1, t, y, budget=0.5), kept)
    assert torch.equal(first, kept)


def test_a_forward_with_gradients_uses_no_graph() -> None:
    model = graphed(tiny(), 2)
    x, t, y = inputs(model, 2)
    model(x, t, y).square().sum().backward()
    assert not Again.captured
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_wrong_inputs_are_told_before_anything_is_captured() -> None:
    model = graphed(tiny(), 2)
    x, t, y = inputs(model, 2)
    with torch.no_grad(), pytest.raises(ElitError, match="conditions for 2 samples"):
        model(x, t, y[:1])
    assert not Again.captured


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("no"), "no memory is left for a graph of batch size 4: such batches run without one"),
        (RuntimeError("a\nb"), "batches of 4 run without a graph, for they could not be captured: a"),
    ],
)
def test_a_graph_that_cannot_be_captured_is_done_without(
    error: Exception, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(function: Any, device: Any, pool: Any) -> Any:
        raise error

    model, twin = tiny(), tiny()
    GraphedForward(twin, [4], refuse).install()
    with caplog.at_level(logging.WARNING, "elit"):
        assert_near(elit.sample(twin, [1, 2], steps=3), elit.sample(model, [1, 2], steps=3))
    assert [r.message for r in caplog.records] == [told]


def test_much_padding_and_too_many_graphs_are_avoided(monkeypatch: pytest.MonkeyPatch) -> None:
    model = graphed(tiny(), 8)
    elit.sample(model, [1, 2, 3, 4, 5], steps=1)  # three of padding
    assert Again.captured == 0
    elit.sample(model, [1, 2, 3, 4, 5, 6], steps=1)
    assert Again.captured == 1
    monkeypatch.setattr("elit.models.graphs.MAX_GRAPHS", 1)
    assert elit.sample(model, [1, 2, 3, 4, 5, 6], steps=1, budget=0.5).isfinite().all()
    assert Again.captured == 1


def test_autocast_uses_no_graph_and_a_second_preparation_changes_nothing() -> None:
    model = graphed(graphed(tiny(), 2), 2)
    x, t, y = inputs(model, 2)
    with torch.no_grad():
        exact = model(x, t, y)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(x, t, y)
    assert Again.captured == 1
    assert not torch.equal(rough, exact)
    assert_near(exact, tiny()(x, t, y).detach())


# ------------------------------------------------------------------------------------------------ compiled layers


class Counter:
    """A compiler that changes nothing and counts what it is asked to compile."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, example: Any) -> Callable[..., Any]:
        self.count += 1
        return graph.forward


def test_levels_and_batch_sizes_share_compilations() -> None:
    """Blocks and the projection are compiled once, and again for a batch of 1. Read and Write may be compiled for a
    single latent, for all of them and for any number in between, each likewise twice."""
    model, counter = tiny(), Counter()
    compile_layers(model, backend=counter)

    def compilations(levels: tuple[int, ...], batches: tuple[int, ...]) -> int:
        for level in levels:
            for batch in batches:
                x, t, y = inputs(model, batch)
                model(x, t, y, num_latents=level)
        return counter.count

    with torch.no_grad(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):  # else it goes on uncompiled
        assert compilations((4,), (2, 3)) == 1 + 1 + 1 + 1
        assert compilations((2, 3, 4), (2, 5)) == 1 + 1 + 2 + 2
        assert compilations((1, 2, 3, 4), (1, 2, 7)) <= 2 * (1 + 1 + 3 + 3)


@pytest.mark.slow
@every_kind
def test_compiled_layers_answer_as_plain_ones(kind: str) -> None:
    model, twin = KINDS[kind](), KINDS[kind]()
    assert isinstance(twin, Transformer)
    counter = Counter()
    compile_layers(twin, backend=counter)
    x, t, y = inputs(model, 3)
    y = y if model.conditional else None
    levels = [16, 4, 8]
    with torch.no_grad():
        expected, found = model(x, t, y, num_latents=levels), twin(x, t, y, num_latents=levels)
    assert counter.count
    for one, other in zip(leaves(found), leaves(expected), strict=True):
        assert torch.equal(one, other)  # the compiler changed nothing


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_the_real_compiler_makes_is_near(dtype: torch.dtype) -> None:
    """Fused sums are rounded elsewhere: some 1e-7 in float32, 2^-9 in bfloat16."""
    model, twin = tiny().to(dtype), elit.compile(tiny().to(dtype))
    x, t, y = inputs(model, 3, dtype=dtype)
    with torch.no_grad():
        for level in (4, 3, 1):
            expected, found = model(x, t, y, num_latents=level), twin(x, t, y, num_latents=level)
            tolerance = 1e-5 if dtype == torch.float32 else 0.05
            assert (found - expected).norm() < tolerance * expected.norm()


def test_without_a_compiler_a_line_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny()
    no_compiler = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    with caplog.at_level(logging.WARNING, "elit"), no_compiler:
        assert elit.compile(model) is model
    assert [r.message for r in caplog.records] == [
        "the model runs uncompiled: there is no C++ compiler here (g++ or clang++)"
    ]
    assert elit.sample(model, [1], steps=1).isfinite().all()


def test_wrong_arguments() -> None:
    with pytest.raises(ElitError, match="CUDA graphs need a GPU, and the model is on cpu"):
        elit.compile(tiny(), graphs=True)
    for sizes in ([], [0], [2.0], 8):
        with pytest.raises(ElitError, match="batch_sizes is"):
            elit.compile(tiny(), batch_sizes=sizes)  # type: ignore[arg-type]
    for options, told in (({"mode": "fast"}, "refuses"), ({"mode": "reduce-overhead"}, "captures graphs of its own")):
        with pytest.raises(ElitError, match=told):
            elit.compile(tiny(), **options)
    with pytest.raises(ElitError, match="a str cannot be compiled; give a model"):
        elit.compile("runs/digits")  # type: ignore[type-var]
