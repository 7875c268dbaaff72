"""Traces a model into one graph whose number of latents, like its batch, is the size of an input.

A trace burns whole numbers in, and sizes become symbols. So the graph has an input ``latent_index`` of J~ numbers whose
values say nothing: its length is the level. The graph is traced without a guard on any size, which is why one graph
serves every level from 1 on and every batch.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.overrides import TorchFunctionMode

from elit.conditions import Text
from elit.errors import ElitError
from elit.models import Model, Transformer

MAX_BATCH = 65536
MAX_WORDS = 4096  # tokens of a text
WORDS = 6  # of the text that is traced
TRACED_BATCH = 3


class Graph(nn.Module):
    """Runs the forward of a model on named tensors, each of them float32 or whole numbers.

    Its inputs are ``x`` (``x_0``, ``x_1``, ... where the model takes stages), ``t``, the condition (``y``, or
    ``tokens`` and ``mask`` of text) and ``latent_index`` (J~,). Its output is the velocity, of each stage where there
    are several. With guidance there are also ``weak_y`` (or ``weak_tokens`` and ``weak_mask``) and
    ``weak_latent_index``, and the velocities of the weak term come behind those of the strong one. What a model has no
    use for is left out.

    Args:
        model: any backbone, in any precision.
        guided: compute both terms of guidance.
    """

    def __init__(self, model: Transformer, guided: bool = False) -> None:
        super().__init__()
        self.model, self.guided = model, guided

    def forward(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        with SizeOblivious():
            return self.both_terms(inputs) if self.guided else self.one_term(inputs)

    def one_term(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        encoded = self.model.encode(self.state(inputs), inputs["t"], self.condition(inputs))
        return as_tuple(self.model.decode(encoded, self.model.core(encoded, level_of(inputs, "latent_index"))))

    def both_terms(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Encodes and decodes both terms as one batch; each passes the core at its own level."""
        batch = inputs["t"].shape[0]
        doubled = {name: torch.cat((value, value)) for name, value in inputs.items() if name == "t" or name[0] == "x"}
        strong, weak = self.condition(inputs), self.condition(inputs, "weak_")
        y = strong
        if isinstance(strong, Text) and isinstance(weak, Text):
            y = Text(torch.cat((strong.tokens, weak.tokens)), torch.cat((strong.mask, weak.mask)))
        elif strong is not None:
            y = torch.cat((strong, weak))
        encoded = self.model.encode(self.state(doubled), doubled["t"], y)
        cores = [
            self.model.core(encoded, level_of(inputs, name), rows)
            for name, rows in (
                ("latent_index", slice(0, batch)),
                ("weak_latent_index", slice(batch, 2 * batch)),
            )
        ]
        velocities = as_tuple(self.model.decode(encoded, *cores))
        return tuple(v[half] for half in (slice(0, batch), slice(batch, 2 * batch)) for v in velocities)

    def state(self, inputs: dict[str, Tensor]) -> Any:
        """Returns the state in the form and precision that the model takes."""
        dtype, stages = self.model.dtype, self.model.stage_shapes
        if stages is None:
            return inputs["x"].to(dtype)
        return [inputs[f"x_{k}"].to(dtype) for k in range(len(stages))]

    def condition(self, inputs: dict[str, Tensor], term: str = "") -> Any:
        """Returns labels or text of a term; None of an unconditional model."""
        if self.model.takes_text:
            return Text(inputs[f"{term}tokens"].to(self.model.dtype), inputs[f"{term}mask"])
        return inputs.get(f"{term}y")


def level_of(inputs: dict[str, Tensor], name: str) -> int:
    """Returns the length of an index, which is a level; 0 for a model without one."""
    return inputs[name].shape[0] if name in inputs else 0


def as_tuple(velocity: Any) -> tuple[Tensor, ...]:
    """Returns a velocity, or those of all stages, as float32."""
    return tuple(v.float() for v in (velocity if isinstance(velocity, list) else [velocity]))


class SizeOblivious(TorchFunctionMode):
    """Traces a few functions by parts that ask for no layout, because the answer would tie the graph to some sizes.

    Whether (1, 4, 1, 8) after a transpose is contiguous depends on the sizes; the functions here would ask.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.rms_norm:
            return rms_norm(args[0], **{k: v for k, v in kwargs.items() if k in ("weight", "eps")})
        if func is Tensor.contiguous:
            return args[0].clone(memory_format=torch.contiguous_format)
        if func is Tensor.flatten:
            args = (args[0].clone(memory_format=torch.contiguous_format), *args[1:])
        return func(*args, **kwargs)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalizes the last axis as :func:`torch.nn.functional.rms_norm` does: in float32, then back.

    It divides by a root, and does not multiply with its inverse, because ONNX Runtime makes one kernel of that.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * weight).to(x.dtype)


# ------------------------------------------------------------------------------------------------ its inputs


def example_inputs(model: Model, guided: bool = False, batch_size: int = TRACED_BATCH) -> dict[str, Tensor]:
    """Draws inputs of a graph, in their order, on the model's device."""
    shapes = model.stage_shapes
    device = model.device
    if shapes is None:
        inputs = {"x": torch.randn(batch_size, *model.input_shape(), device=device)}
        inputs["t"] = torch.rand(batch_size, device=device)
    else:
        inputs = {f"x_{k}": torch.randn(batch_size, *shape, device=device) for k, shape in enumerate(shapes)}
        inputs["t"] = torch.rand(batch_size, len(shapes), device=device)
    terms = ("", "weak_") if guided else ("",)
    for term in terms:
        if model.takes_text:
            shape = (batch_size, WORDS)
            inputs[f"{term}tokens"] = torch.randn(*shape, model.config.text_width, device=device)
            inputs[f"{term}mask"] = torch.ones(shape, dtype=torch.bool, device=device)
        elif model.conditional:
            inputs[f"{term}y"] = torch.zeros(batch_size, dtype=torch.long, device=device)
    for term in terms if model.interface is not None else ():
        inputs[f"{term}latent_index"] = torch.arange(traced_level(model), device=device)
    return inputs


def traced_level(model: Model) -> int:
    """Returns a level in the middle: that of a trace must not lie at the end of the range."""
    assert model.interface is not None
    step, count = model.interface.level_step, model.num_latents
    return max(step, count // 2 // step * step)


def dynamic_shapes(model: Model, inputs: dict[str, Tensor], batch: int | None) -> dict[str, Any]:
    """Says which sizes of the inputs may be any: levels, the batch unless it is fixed, and the length of text."""
    rows = {} if batch is not None else {0: Dim("batch", min=1, max=MAX_BATCH)}
    words = {1: Dim("words", min=1, max=MAX_WORDS)}
    shapes: dict[str, Any] = {}
    for name in inputs:
        if name.endswith("latent_index"):
            shapes[name] = levels_dim(model, "weak_" if name.startswith("weak_") else "")
        else:
            shapes[name] = rows | (words if name.endswith(("tokens", "mask")) else {})
    return shapes


def levels_dim(model: Model, term: str) -> dict[int, Any]:
    """Returns the sizes that an index of latents may have: the multiples of the model's step up to J."""
    assert model.interface is not None
    step = model.interface.level_step
    runs = model.num_latents // step
    if runs == 1:
        return {}
    dim = Dim(f"{term}latents" if step == 1 else f"{term}runs", min=1, max=runs)
    return {0: dim if step == 1 else step * dim}


# ------------------------------------------------------------------------------------------------ tracing


@torch.no_grad()
def trace(model: Model, guided: bool = False, batch: int | None = None) -> ExportedProgram:
    """Traces a model into a graph of ATen operators that serves every level.

    Args:
        model: any backbone; one of fake tensors (``FakeTensorMode``) gives the graph without weights.
        guided: see :class:`Graph`.
        batch: the only batch size; None is any.

    Raises:
        ElitError: the model is none of this library's backbones, or guidance does not fit it.
    """
    if not isinstance(model, Transformer):
        raise ElitError(f"a {type(model).__name__} cannot be exported; take a model of elit.load or elit.create")
    if guided and not (model.conditional or model.interface):
        raise ElitError("guidance needs a class to drop or a budget to lower, and this model has neither")
    inputs = example_inputs(model, guided, TRACED_BATCH if batch is None else batch)
    shapes = dynamic_shapes(model, inputs, batch)
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        program = torch.export.export(Graph(model, guided), (), inputs, dynamic_shapes={"inputs": shapes}, strict=False)
    strip(program)
    return program


def strip(program: ExportedProgram) -> None:
    """Takes out of a graph what a file must not hold or need not hold.

    Conditions would be evaluated; where our source files lie is nobody's business, and takes half a megabyte.
    """
    for node in program.graph.nodes:
        node.meta = {key: value for key, value in node.meta.items() if key == "val"}
    program._guards_code = []
