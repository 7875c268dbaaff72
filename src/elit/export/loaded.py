"""Exported files as models: what samples, plans and measures a model takes them too."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elit.conditions import Condition, Text, select_condition
from elit.errors import ElitError
from elit.export import archive, onnx
from elit.export.archive import Run
from elit.export.metadata import Metadata, as_tensor, from_json
from elit.models import MMDiT, MMDiTConfig, Model, TransformerConfig
from elit.models.base import Levels
from elit.models.registry import build_on_meta
from elit.models.transformer import in_order

SUFFIXES = (".pt2", ".onnx")


class ExportedModel(Model):
    """Predicts velocities with the graph of an exported file, behind the interface of a model.

    It has no weights that could be looked at or trained, and its core cannot be skipped by a cache.

    Attributes:
        metadata: what the file says of itself.
    """

    def __init__(self, metadata: Metadata, config: TransformerConfig, run: Run, device: torch.device) -> None:
        super().__init__(config)
        self.metadata, self._run, self._device = metadata, run, device
        described: Any = build_on_meta(config)
        self.__dict__["interface"] = described.interface  # past nn.Module: it has no weights, only levels
        self._stage_shapes = described.stage_shapes
        self.register_buffer("weights_digest", torch.tensor(list(metadata.weights.encode()), dtype=torch.uint8))

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32  # of inputs and outputs, whatever the weights are

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def stage_shapes(self) -> list[tuple[int, ...]] | None:
        return self._stage_shapes

    # -------------------------------------------------------------------------------------------- the forward

    def encode(self, x: Any, t: Tensor, y: Any = None) -> tuple[Any, Tensor, Any]:
        """Checks the inputs, which :meth:`at_levels` then runs as a whole: a graph has no parts."""
        stages = x if isinstance(x, list) else [x]
        shapes = self.stage_shapes or [self.input_shape()]
        found = [tuple(stage.shape[1:]) for stage in stages]
        if found != shapes:
            raise ElitError(f"input of shape {found}; the exported model takes {shapes}, and no other resolution")
        if (y is None) == self.conditional:
            raise ElitError("the model needs a condition" if y is None else "the model takes no condition")
        return x, t, y

    def at_levels(
        self, encoded: tuple[Any, Tensor, Any], num_latents: Levels, rows: Sequence[int] | None = None
    ) -> Any:
        """Runs the graph, once for each level; see :meth:`Model.at_levels`.

        Raises:
            ElitError: a level that the file was not exported with.
        """
        x, t, y = encoded
        if rows is None and isinstance(num_latents, int):
            return self._velocity(x, t, y, num_latents)
        rows = range(t.shape[0]) if rows is None else rows
        levels = [num_latents] * len(rows) if isinstance(num_latents, int) else num_latents
        groups: dict[int, list[int]] = {}
        for place, level in enumerate(levels):
            groups.setdefault(level, []).append(place)
        parts = []
        for level, places in groups.items():
            chosen = torch.tensor([rows[place] for place in places], device=t.device)
            of_group = [stage[chosen] for stage in x] if isinstance(x, list) else x[chosen]
            y_of_group = None if y is None else select_condition(y, chosen)
            parts.append(self._velocity(of_group, t[chosen], y_of_group, level))
        return in_order(parts, [place for places in groups.values() for place in places])

    def guided(
        self, x: Any, t: Tensor, y: Condition | None, weak_y: Condition | None, num_latents: int, weak_num_latents: int
    ) -> tuple[Any, Any]:
        """Returns the velocities of both terms of guidance, from one call of a graph that was exported with both.

        Args:
            x, t, y: as for a forward.
            weak_y: the condition of the weak term.
            num_latents, weak_num_latents: J~ of each term.

        Raises:
            ElitError: the file has one term alone, or a level is none of its own.
        """
        if not self.metadata.guided:
            raise ElitError("the file computes one term; export it with --guided for both in one call")
        outputs = self._outputs(x, t, (y, weak_y), (num_latents, weak_num_latents))
        half = len(outputs) // 2
        return self._joined(outputs[:half]), self._joined(outputs[half:])

    def _velocity(self, x: Any, t: Tensor, y: Any, level: int) -> Any:
        """Returns velocities at one level. A graph of both terms computes the cheapest weak one for nothing."""
        outputs = self._outputs(x, t, (y, y), (level, min(self.levels, default=0)))
        return self._joined(outputs[: len(outputs) // 2] if self.metadata.guided else outputs)

    def _joined(self, stages: Sequence[Tensor]) -> Any:
        return stages[0] if self.stage_shapes is None else list(stages)

    def _outputs(self, x: Any, t: Tensor, y: tuple[Any, Any], levels: tuple[int, int]) -> tuple[Tensor, ...]:
        """Runs the graph, in batches of its size where that is fixed."""
        terms = list(zip(("", "weak_"), y, levels, strict=True))[: 2 if self.metadata.guided else 1]
        inputs = {f"x_{k}": stage for k, stage in enumerate(x)} if isinstance(x, list) else {"x": x}
        inputs["t"] = t
        for term, of_term, _ in terms:
            if isinstance(of_term, Text):
                inputs |= {f"{term}tokens": of_term.tokens.float(), f"{term}mask": of_term.mask}
            elif of_term is not None:
                inputs[f"{term}y"] = of_term
        indices = {}
        for term, _, level in terms if self.interface is not None else ():
            if level not in self.levels:
                raise ElitError(f"num_latents is {level}; the file was exported with {list(self.levels)}")
            indices[f"{term}latent_index"] = torch.arange(level, device=self.device)
        size, count = self.metadata.batch, t.shape[0]
        if size is None:
            return self._run(inputs | indices)
        places = torch.arange(-(-count // size) * size, device=t.device).clamp(max=count - 1)  # the last is repeated
        batches = [self._run({k: v[part] for k, v in inputs.items()} | indices) for part in places.split(size)]
        return tuple(torch.cat(parts)[:count] for parts in zip(*batches, strict=True))


class ExportedTextModel(ExportedModel):
    """Does the same with a graph of a model of text."""

    empty_prompt: Tensor

    def __init__(self, metadata: Metadata, config: TransformerConfig, run: Run, device: torch.device) -> None:
        super().__init__(metadata, config, run, device)
        prompt = as_tensor(metadata.empty_prompt)
        self.register_buffer("empty_prompt", None if prompt is None else prompt.to(device))

    takes_text = MMDiT.takes_text
    conditional = MMDiT.conditional
    check_text: Any = MMDiT.check_text
    as_condition: Any = MMDiT.as_condition
    null_condition: Any = MMDiT.null_condition


def load_exported(
    file: str | Path, *, device: torch.device | str = "cpu", trust_native_code: bool = False
) -> ExportedModel:
    """Loads a file of :func:`elit.export` as a model that :func:`elit.sample` and everything else takes.

    Files of PyTorch (``pt2``) and ONNX are data: nothing in them is executed beyond the operators of their graph. A
    package of AOTInductor (``aoti``) is machine code, which can do whatever you can.

    Args:
        file: a ``.pt2`` or ``.onnx`` file.
        device: where to run it. A package runs on the kind of device that it was compiled for.
        trust_native_code: load a package of AOTInductor, because you know who made it.

    Raises:
        ElitError: nothing is there, it is damaged or foreign, or it is machine code that is not trusted.
    """
    path, device = Path(file), torch.device(device)
    if not path.is_file():
        raise ElitError(f"there is no exported file at {path}")
    if path.suffix not in SUFFIXES:
        raise ElitError(f"{path} is no exported file: those end in {' or '.join(SUFFIXES)}; for others call elit.load")
    native = False
    if path.suffix == ".onnx":
        text = onnx.read_metadata(path)
    else:
        text, native = archive.read_metadata(path)
    metadata, config = from_json(text, path)
    if native and not trust_native_code:
        raise ElitError(
            f"{path} is machine code, which can do whatever you can: if you trust who made it, load it with "
            "trust_native_code (on the command line --trust-native-code)"
        )
    if path.suffix == ".onnx":
        run = onnx.load(path, device)
    else:
        run = archive.load_package(path) if native else archive.load_program(path, device)
    kind = ExportedTextModel if isinstance(config, MMDiTConfig) else ExportedModel
    return kind(metadata, config, run, device).eval()


def is_exported(source: str | Path) -> bool:
    """Tells whether a source of a model names an exported file, by its ending."""
    return Path(source).suffix in SUFFIXES
