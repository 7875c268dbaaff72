"""`compile`: prepares a model for fast inference, with compiled layers and, on a GPU, CUDA graphs.

Compiled layers take any batch size and any number of latents, so that a level is not another compilation. CUDA graphs
(:mod:`elit.models.graphs`) then take away what it costs to launch their kernels one by one.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from elit.errors import ElitError, first_line
from elit.layers import FinalLayer
from elit.models.base import Model
from elit.models.graphs import GraphedForward
from elit.models.transformer import Transformer

logger = logging.getLogger("elit")
BATCH_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
RECOMPILE_LIMIT = 32  # PyTorch's own is 8, beyond which it goes on uncompiled; see compile_layers
GRAPHS_OF_THEIR_OWN = ("reduce-overhead", "max-autotune")  # modes of torch.compile that capture too
AnyModel = TypeVar("AnyModel", bound=Model)


def compile(  # as torch.compile
    model: AnyModel, *, graphs: bool | None = None, batch_sizes: Sequence[int] = BATCH_SIZES, **options: Any
) -> AnyModel:
    """Prepares a model in place for fast inference, and returns it.

    Its layers are compiled (`torch.compile`) when they first run, which takes from seconds to a minute; every batch
    size and every level then share what was compiled. On a GPU, forwards without gradients are also captured in CUDA
    graphs, one for each level and batch size, when they first run; a batch is padded to the next captured size. Where
    layers cannot be compiled, or a forward cannot be captured, it runs as it is, and a line of the log says why.

    Move and convert the model before, for graphs keep the addresses of its weights, and let one thread at a time run
    it. Results differ from those of the uncompiled model by rounding.

    Args:
        graphs: whether to capture CUDA graphs; by default on a GPU.
        batch_sizes: the sizes to capture. Larger batches run without a graph, and so do those that would be padded by
            more than two samples and a quarter.
        options: for :func:`torch.compile`, such as ``mode="max-autotune-no-cudagraphs"``.

    Raises:
        ElitError: no model of :func:`elit.load` or :func:`elit.create`, graphs without a GPU, batch sizes that are not
            positive numbers, or options that :func:`torch.compile` refuses.
    """
    if not isinstance(model, Transformer):
        raise ElitError(f"a {type(model).__name__} cannot be compiled; give a model of elit.load or elit.create")
    wrong = isinstance(batch_sizes, int) or not batch_sizes
    if wrong or any(type(size) is not int or size < 1 for size in batch_sizes):
        raise ElitError(f"batch_sizes is {batch_sizes!r}; give a list of positive whole numbers")
    if (mode := options.get("mode")) in GRAPHS_OF_THEIR_OWN:
        raise ElitError(f"mode {mode!r} captures graphs of its own; take 'max-autotune-no-cudagraphs'")
    on_gpu = model.device.type == "cuda"
    if graphs and not on_gpu:
        raise ElitError(f"CUDA graphs need a GPU, and the model is on {model.device}")
    if why := missing_compiler(model.device):
        logger.warning("the model runs uncompiled: %s", why)
    else:
        try:
            compile_layers(model, **options)
        except (RuntimeError, TypeError) as error:
            raise ElitError(f"torch.compile refuses {options}: {first_line(error)}") from error
        model.is_compiled = True
    if on_gpu if graphs is None else graphs:
        GraphedForward(model, sorted(batch_sizes)).install()
    return model


def compile_layers(model: nn.Module, **options: Any) -> None:
    """Compiles the layers that take nearly all of a model's time: blocks, Read, Write and the projection.

    Layers of one kind share a compilation, whose batch size and number of tokens are dynamic. PyTorch makes another one
    for a batch of 1, and of Read and Write also for a single latent and for all of them: in all at most 2 for blocks
    and for the projection, and 6 for Read and for Write. With and without inference mode have their own.
    """
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, RECOMPILE_LIMIT)
    for layer in layers_to_compile(model):
        layer.compile(**{"dynamic": True} | options)


def layers_to_compile(model: nn.Module) -> Iterator[nn.Module]:
    """Yields the layers that :func:`compile_layers` compiles, in the order in which tokens pass them."""
    assert isinstance(model, Transformer)
    yield from model.blocks
    if model.interface is not None:
        yield model.interface.read_layer
        yield from model.interface.write_layers
    yield from (layer for layer in model.modules() if isinstance(layer, FinalLayer))


def missing_compiler(device: torch.device) -> str | None:
    """Says why layers cannot be compiled for a device; None where they can."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "Triton, which compiles for this GPU, is not installed"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "there is no C++ compiler here (g++ or clang++)"
    return None
