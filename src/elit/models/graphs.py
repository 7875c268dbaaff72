"""CUDA graphs of forwards: what the CPU would launch kernel by kernel is captured once and replayed as a whole.

At small batches and low levels a GPU works faster than a CPU can launch kernels. There is one graph for each batch
size, each level (or pair of levels that share their head, in autoguidance) and each choice of skipping the core; all of
them share one pool of memory. A batch that mixes levels becomes one replay per level.

A graph captures a forward as a whole, so ``encode`` only keeps its arguments here, and ``at_levels`` runs everything.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from elit.errors import first_line
from elit.launch import to_device
from elit.models.base import Levels
from elit.models.transformer import Effect, Transformer, in_order, stack_effects, unbind

logger = logging.getLogger("elit")
Computed = Callable[[], dict[int, Effect]]


class Inputs(NamedTuple):
    """Holds the arguments of a forward until its levels are known, for a graph captures the forward as a whole."""

    x: Any
    t: Tensor
    y: Any

    def take(self, rows: Sequence[int]) -> "Inputs":
        """Returns those of some samples."""
        if list(rows) == list(range(len(self.t))):
            return self
        index = to_device(rows, self.t.device)
        return tree_map(lambda value: value[index] if isinstance(value, Tensor) else value, self)


MAX_GRAPHS = 512  # of one model; forwards beyond them run kernel by kernel


class Want(NamedTuple):
    """One velocity that is wanted of a sample.

    Attributes:
        level: J~.
        skips: whether an earlier effect takes the place of the core.
    """

    level: int
    skips: bool


class Graph(Protocol):
    """A function of tensors that always has the same shapes and addresses."""

    outputs: Any

    def replay(self) -> None: ...


class CudaGraph:
    """Captures a function on a GPU.

    Args:
        function: it reads its inputs where they lie now.
        device: the current device.
        pool: memory that graphs share; they are never replayed at the same time.
    """

    WARM_UPS = 2  # compilation, and what libraries set up at their first call, must not be captured

    def __init__(self, function: Callable[[], Any], device: torch.device, pool: Any) -> None:
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(self.WARM_UPS):
                function()
        torch.cuda.current_stream(device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self.outputs = function()

    def replay(self) -> None:
        self.graph.replay()


class Captured(NamedTuple):
    """A graph with the tensors that it reads."""

    graph: Graph
    inputs: list[Tensor]


class GraphedForward:
    """Runs the forwards of a model by replaying graphs, which it captures when they are first needed.

    Args:
        model: on its device, with its final weights.
        batch_sizes: ascending; larger batches run without a graph.
        capture: makes a graph.
    """

    def __init__(
        self, model: Transformer, batch_sizes: Sequence[int], capture: Callable[..., Graph] = CudaGraph
    ) -> None:
        self.model, self.batch_sizes, self.capture = model, tuple(batch_sizes), capture
        kind = type(model)  # its own methods, also where a model is prepared a second time
        self.encode_now, self.at_levels_now = partial(kind.encode, model), partial(kind.at_levels_with_effects, model)
        self.pool = torch.cuda.graph_pool_handle() if capture is CudaGraph else None
        self.captured: dict[Any, Captured | None] = {}  # None: it could not be captured

    def install(self) -> None:
        """Makes the model run its forwards here."""
        for name in ("encode", "at_levels", "at_levels_with_effects"):
            setattr(self.model, name, getattr(self, name))
        self.model.is_captured = True

    # -------------------------------------------------------------------------------- in place of the model's methods

    def encode(self, x: Any, t: Tensor, y: Any = None) -> Any:
        with_gradients = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        if with_gradients or torch.is_autocast_enabled(t.device.type):  # whose copies of weights do not outlive it
            return self.encode_now(x, t, y)
        self.model.check_input(x, t, y)
        return Inputs(x, t, y)

    def at_levels(self, encoded: Any, num_latents: Levels, rows: Sequence[int] | None = None) -> Any:
        if not isinstance(encoded, Inputs):
            return type(self.model).at_levels(self.model, encoded, num_latents, rows)
        rows = range(len(encoded.t)) if rows is None else rows
        levels = [num_latents] * len(rows) if isinstance(num_latents, int) else num_latents
        return self._run(encoded, levels, rows, [None] * len(rows), keep=False)[0]

    def at_levels_with_effects(
        self, encoded: Any, levels: Sequence[int], rows: Sequence[int], effects: Sequence[Effect | None]
    ) -> tuple[Any, Computed]:
        if not isinstance(encoded, Inputs):
            return self.at_levels_now(encoded, levels, rows, effects)
        return self._run(encoded, levels, rows, effects, keep=True)

    # -------------------------------------------------------------------------------- groups of samples

    def _run(
        self, inputs: Inputs, levels: Sequence[int], rows: Sequence[int], effects: Sequence[Effect | None], keep: bool
    ) -> tuple[Any, Computed]:
        """Runs together the samples of which the same is wanted."""
        places_of: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            places_of.setdefault(row, []).append(place)
        groups: dict[tuple[Want, ...], list[list[int]]] = {}
        for places in places_of.values():
            wants = tuple(Want(levels[place], effects[place] is not None) for place in places)
            groups.setdefault(wants, []).append(places)
        parts: list[Any] = []
        order: list[int] = []
        kept: dict[int, Effect] = {}
        for wants, group in groups.items():
            given = [
                stack_effects([e for places in group if (e := effects[places[i]]) is not None], want.level)
                for i, want in enumerate(wants)
            ]
            of_group = inputs.take([rows[places[0]] for places in group])
            velocities, changes = self._forward(of_group, wants, given, keep)
            for i, velocity in enumerate(velocities):
                places = [places[i] for places in group]
                parts.append(velocity)
                order += places
                if (change := changes[i]) is not None:
                    kept.update(zip(places, unbind(change), strict=True))
        return in_order(parts, order), lambda: kept

    def _forward(
        self, inputs: Inputs, wants: tuple[Want, ...], given: list[Effect | None], keep: bool
    ) -> tuple[list[Any], list[Effect | None]]:
        """Runs one group, in a graph where there is one of its size."""
        count = len(inputs.t)
        size = next((size for size in self.batch_sizes if size >= count), None)
        if size is not None and size - count > max(2, count // 4):  # padding would cost more than launching
            size = None
        tensors, spec = tree_flatten((inputs, given))
        key = size, wants, keep, tuple((leaf.shape[1:], leaf.dtype) for leaf in tensors if isinstance(leaf, Tensor))
        if size is None or (key in self.captured and self.captured[key] is None):
            return self._forward_now(inputs, wants, given, keep)
        with torch.inference_mode(False), torch.no_grad(), on_device(self.model.device):
            if key not in self.captured:
                self.captured[key] = self._capture(tensors, spec, size, wants, keep)
            captured = self.captured[key]
            if captured is not None:
                of_batch = [leaf for leaf in tensors if isinstance(leaf, Tensor)]
                for place, value in zip(captured.inputs, of_batch, strict=True):
                    place[:count].copy_(value)
                captured.graph.replay()
        if captured is None:
            return self._forward_now(inputs, wants, given, keep)
        # Copies, for the next replay writes to the same place.
        return tree_map(lambda out: out[:count].clone() if isinstance(out, Tensor) else out, captured.graph.outputs)

    def _capture(
        self, tensors: list[Any], spec: Any, size: int, wants: tuple[Want, ...], keep: bool
    ) -> Captured | None:
        """Captures the forward of a group at a batch size. Padding begins as copies of the first sample."""
        static = [
            leaf[:1].expand(size, *leaf.shape[1:]).clone() if isinstance(leaf, Tensor) else leaf for leaf in tensors
        ]
        inputs, given = tree_unflatten(static, spec)
        if len(self.captured) >= MAX_GRAPHS:
            logger.warning("there are %d graphs already: other batch sizes and shapes run without one", MAX_GRAPHS)
            return None
        try:
            graph = self.capture(lambda: self._forward_now(inputs, wants, given, keep), self.model.device, self.pool)
        except torch.OutOfMemoryError:
            logger.warning("no memory is left for a graph of batch size %d: such batches run without one", size)
            return None
        except RuntimeError as error:
            reason = first_line(error)
            logger.warning("batches of %d run without a graph, for they could not be captured: %s", size, reason)
            return None
        return Captured(graph, [leaf for leaf in static if isinstance(leaf, Tensor)])

    def _forward_now(
        self, inputs: Inputs, wants: tuple[Want, ...], given: list[Effect | None], keep: bool
    ) -> tuple[list[Any], list[Effect | None]]:
        """Runs one group kernel by kernel: velocities for each of what is wanted, and where asked what the core did."""
        model = self.model
        encoded = self.encode_now(*inputs)
        latents = model.read(encoded, max(want.level for want in wants)) if len(wants) > 1 else None
        cores = [
            model.core(encoded, want.level, None, latents, effect) for want, effect in zip(wants, given, strict=True)
        ]
        changes = [core.effect() if keep and not want.skips else None for core, want in zip(cores, wants, strict=True)]
        return [model.decode(encoded, core) for core in cores], changes


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the current one: graphs are captured and replayed there."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
