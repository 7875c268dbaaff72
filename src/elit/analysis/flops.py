"""Counts FLOPs: of the parts of a forward, of one velocity, of a whole sample. Shapes are enough; no weights are built.

One multiply-add is one MAC and two FLOPs. Matrix products and attention count, as PyTorch's counter sees them; norms,
activations, softmax and positions do not.
"""

from collections.abc import Callable
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from elit.conditions import Condition, Text
from elit.flow import Cache, Evaluation, Flow, Guidance, trajectories
from elit.flow.sampler import Steps
from elit.flow.trajectory import remembered, terms_of
from elit.interface import Budget
from elit.models import Effect, Model, Transformer, TransformerConfig
from elit.models.registry import build_on_meta

PROMPT_LENGTH = 77  # tokens of the text that a forward of a model of text is measured with


class Flops(NamedTuple):
    """The FLOPs of one forward of one sample, part by part.

    Attributes:
        encode: embedding, condition and head; all blocks of a plain transformer.
        read: Read.
        core: the core blocks.
        decode: Write, tail and projection.
    """

    encode: int
    read: int
    core: int
    decode: int

    @property
    def total(self) -> int:
        return sum(self)

    @property
    def macs(self) -> int:
        """Multiply-adds."""
        return self.total // 2


def count_flops(config: TransformerConfig, num_latents: int | None = None) -> Flops:
    """Counts the FLOPs of one forward of one sample. What was counted once is remembered.

    Args:
        config: the configuration of a model (``model.config``).
        num_latents: J~; None is the highest that the model is trained for. Without meaning for a plain transformer.
    """
    if num_latents is None:
        num_latents = _encoded(config)[0].level(None)
    return _count_at(config, num_latents)


@lru_cache(maxsize=4096)
def _count_at(config: TransformerConfig, level: int) -> Flops:
    model, encoded, encode = _encoded(config)
    if model.interface is None:
        return Flops(encode, 0, 0, _counted(lambda: model.decode(encoded, model.core(encoded, 0)))[1])
    latents, read = _counted(lambda: model.read(encoded, level))
    core, in_core = _counted(lambda: model.core(encoded, level, latents=latents))
    return Flops(encode, read, in_core, _counted(lambda: model.decode(encoded, core))[1])


@lru_cache(maxsize=8)
def _encoded(config: TransformerConfig) -> tuple[Transformer, Any, int]:
    """Returns a model without weights, an encoded sample, and the FLOPs of encoding it."""
    model = on_meta(config)
    assert isinstance(model, Transformer)
    encoded, flops = _counted(lambda: model.encode(*example_inputs(model, 1)))
    return model, encoded, flops


def _counted(run: Callable[[], Any]) -> tuple[Any, int]:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        result = run()
    return result, counter.get_total_flops()


def velocity_flops(
    config: TransformerConfig,
    level: int,
    guidance: Guidance | None = None,
    weak_level: int | None = None,
    skips_core: bool = False,
) -> int:
    """Counts the FLOPs of one velocity of one sample, with both terms where it is guided.

    The terms of autoguidance share encode and Read, which runs at the higher of their levels; those of ``cfg`` and
    ``ccfg`` have different conditions and share nothing.

    Args:
        level: J~ of the strong term.
        guidance: None where it is off at this time.
        weak_level: J~ of the weak term; None where it is that of the strong one.
        skips_core: whether a cache skips the core of both terms.
    """
    strong = count_flops(config, level)
    weak = strong if weak_level is None else count_flops(config, weak_level)
    if skips_core:
        strong, weak = strong._replace(core=0), weak._replace(core=0)
    if guidance is None:
        return strong.total
    if guidance.drops_condition:
        return strong.total + weak.total
    return strong.encode + max(strong.read, weak.read) + strong.core + strong.decode + weak.core + weak.decode


def evaluation_flops(config: TransformerConfig, wanted: Evaluation) -> int:
    """Counts the FLOPs of the velocities that a trajectory waits for, each sample as if it were alone."""
    each = zip(wanted.levels, wanted.guidance, wanted.moment.host, wanted.weak_levels, strict=True)
    return sum(
        velocity_flops(config, level, guidance if guidance and bool(guidance.active(t).any()) else None, weak_level)
        for level, guidance, t, weak_level in each
    )


def skipped_flops(config: TransformerConfig, flow: Flow, wanted: Evaluation) -> int:
    """Counts the FLOPs of the cores that a cache skips in an evaluation, and notes in its memory which of them ran."""
    times, skipped = flow.noise_level(wanted.moment.host).tolist(), 0
    for term in chain.from_iterable(terms_of(wanted)):
        t, memory = times[term.sample], wanted.memories[term.sample]
        if remembered(wanted, term, t) is not None:
            skipped += count_flops(config, term.level).core
        elif memory is not None:
            memory.keep(term.name, t, Effect(torch.empty(1, term.level, 0)))  # its level is what counts
    return skipped


def sampling_flops(
    model: Model,
    steps: Steps = 40,
    budget: Budget | None = None,
    guidance: Guidance | None = None,
    solver: str = "euler",
    cache: Cache | None = None,
) -> int:
    """Counts the FLOPs of one sample that :func:`elit.sample` draws with these settings, over all steps.

    Every evaluation of the solver counts with its own level, with the weak term of guidance where that is on, and
    without the cores that a cache skips.

    Args:
        steps, budget, guidance, solver, cache: as of :func:`elit.sample`, for one sample. Where samples differ, add
            them up. A cache looks at the weights of the time embedding: the model must not be on ``meta``.

    Raises:
        ElitError: settings that :func:`elit.sample` refuses too, or one for each of several samples.
    """
    y = [0] if model.config.num_classes else example_condition(model, 1)  # labels are looked at: none on ``meta``
    settings: dict[str, Any] = {
        "steps": steps,
        "budget": budget,
        "guidance": guidance,
        "solver": solver,
        "cache": cache,
    }
    (trajectory,) = trajectories(model, y, seeds=[0], **settings)
    flops = 0
    while trajectory.wanted is not None:
        flops += evaluation_flops(model.config, trajectory.wanted)
        if cache is not None:
            flops -= skipped_flops(model.config, trajectory.flow, trajectory.wanted)
        trajectory.answer(torch.zeros_like(trajectory.wanted.x))
    return flops


def count_parameters(model: Model) -> int:
    """Counts all parameters, a frozen position table included."""
    return sum(p.numel() for p in model.parameters())


def on_meta(config: TransformerConfig) -> Model:
    """Builds a model without memory, on the ``meta`` device: shapes only."""
    return build_on_meta(config).requires_grad_(False)


def example_inputs(model: Model, batch_size: int) -> tuple[Any, Tensor, Condition | None]:
    """Draws x, t and y of the shapes that a forward takes, on the model's device and in its dtype."""
    device, dtype, stages = model.device, model.dtype, model.stage_shapes
    y = example_condition(model, batch_size)
    if stages is None:
        x = torch.randn(batch_size, *model.input_shape(), device=device, dtype=dtype)
        return x, torch.rand(batch_size, device=device), y
    x_of_stages = [torch.randn(batch_size, *shape, device=device, dtype=dtype) for shape in stages]
    return x_of_stages, torch.rand(batch_size, len(stages), device=device), y


def example_condition(model: Model, batch_size: int) -> Condition | None:
    """Returns conditions of the shapes that a forward takes: labels, or a text of 77 tokens each."""
    if model.takes_text:
        shape = (batch_size, PROMPT_LENGTH)
        tokens = torch.zeros(*shape, model.config.text_width, device=model.device, dtype=model.dtype)
        return Text(tokens, torch.ones(shape, dtype=torch.bool, device=model.device))
    return torch.zeros(batch_size, dtype=torch.long, device=model.device) if model.conditional else None
