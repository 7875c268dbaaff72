"""Models of this library as a pipeline of diffusers."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Self

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from elit.data.autoencoder import decode, load_autoencoder
from elit.data.pil import to_pil
from elit.decode import decode as decode_config
from elit.errors import ElitError
from elit.flow import Cache, Guidance, sample
from elit.interface import Budget
from elit.models import Model
from elit.models.files import load
from elit.models.registry import ARCHITECTURES

Output = Literal["pil", "np", "pt", "latent"]


class ElitTransformer(ModelMixin, ConfigMixin):
    """A model of this library among the models of diffusers: ``transformer.model`` is the model.

    Args:
        description: its architecture and the fields of its configuration.

    Raises:
        ElitError: it describes no model of this library.
    """

    _supports_gradient_checkpointing = False

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, description: dict[str, Any]) -> None:
        super().__init__()
        fields = dict(description)
        architecture = fields.pop("architecture", None)
        if architecture not in ARCHITECTURES:
            raise ElitError(f"there is no architecture {architecture!r}; known are {', '.join(ARCHITECTURES)}")
        kind, config = ARCHITECTURES[architecture]
        self.model: Model = kind(decode_config(config, fields, Path("the configuration of an ElitTransformer")))

    @classmethod
    def of(cls, model: Model) -> Self:
        """Wraps a model, with whose weights it shares memory."""
        with torch.device("meta"):
            fields = json.loads(json.dumps(asdict(model.config)))  # as a file has them: lists for tuples
            made = cls(description={"architecture": type(model).__name__, **fields})
        made.model = model
        return made.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Predicts velocities, as the model does."""
        return self.model(*args, **kwargs)


class ElitPipeline(DiffusionPipeline):
    """Draws pictures of classes from a model of this library: what :func:`elit.sample` does, the way of diffusers.

    ``ElitPipeline.from_elit("runs/quickstart/run")`` makes one of a run, a saved model, a Hub id or a published file;
    ``save_pretrained`` and ``from_pretrained`` write and read it as diffusers does.

    Args:
        transformer: the model.
        vae: decodes latents; None for a model of pixels.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]  # noqa: RUF012

    def __init__(self, transformer: ElitTransformer, vae: Any = None) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae)

    @classmethod
    def from_elit(cls, source: str | Path | Model, autoencoder: str | Path | Any = None, **how: Any) -> Self:
        """Makes a pipeline of a model of this library.

        Args:
            source: the model, or whatever :func:`elit.load` takes.
            autoencoder: of diffusers, its folder or its Hub id, for a model of latents.
            how: further arguments of :func:`elit.load`.

        Raises:
            ElitError: there is no such model or autoencoder.
        """
        model = source if isinstance(source, Model) else load(source, **how)
        if isinstance(autoencoder, str | Path):
            autoencoder = load_autoencoder(autoencoder, model.input_shape()[0])
        return cls(ElitTransformer.of(model), autoencoder)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int] | None = None,
        num_inference_steps: int = 40,
        guidance_scale: float = 4.0,
        budget: Budget | None = None,
        guidance: Literal["cfg", "ccfg", "ag"] = "cfg",
        weak_budget: float | None = None,
        solver: str = "euler",
        cache: Cache | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seeds: Sequence[int] | None = None,
        num_images: int = 1,
        output_type: Output = "pil",
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], Any] | None = None,
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draws one picture per label.

        Args:
            class_labels: one class per picture; None for an unconditional model.
            num_inference_steps: number of steps.
            guidance_scale: w; 1 is no guidance.
            budget: the fraction of the latents to use, or one per step, as of :func:`elit.sample`.
            guidance: what the weak term is, see :class:`elit.Guidance`.
            weak_budget: the budget of the weak term of ``ccfg`` and ``ag``; None is the lowest that was trained.
            solver, cache: as of :func:`elit.sample`.
            generator: its seed is that of the first picture, and the next ones follow it; or one for each picture.
            seeds: of the pictures, in place of generators: those of :func:`elit.sample`.
            num_images: how many pictures an unconditional model draws.
            output_type: ``pil``; ``np`` (B, H, W, C) or ``pt`` (B, C, H, W) in [0, 1]; or ``latent``, what the model
                samples.
            callback_on_step_end: called after each step with the pipeline, the step, the noise level and the latents.
                It watches: what it returns is not used.
            return_dict: False returns a tuple.

        Raises:
            ElitError: an argument that :func:`elit.sample` refuses too, or latents without an autoencoder.
        """
        model = self.transformer.model
        if model.takes_text:
            raise ElitError("an ElitPipeline draws classes, and this model takes text; use elit.sample")
        count = num_images if class_labels is None else len(class_labels)
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ElitError(f"output_type is {output_type!r}; it is pil, np, pt or latent")
        channels = model.input_shape()[0]
        if output_type != "latent" and self.vae is None and channels not in (1, 3):
            raise ElitError(
                f"the model samples latents of {channels} channels; give the pipeline an autoencoder, or take "
                "output_type='latent'"
            )
        hook = getattr(self.transformer, "_hf_hook", None)
        if hook is not None:  # offloaded: sampling runs parts of the model, which hooks of a forward do not see
            hook.pre_forward(self.transformer)

        def after_step(info: Any) -> None:
            bar.update()
            if callback_on_step_end is not None:
                callback_on_step_end(self, info.step, info.t.flatten()[0], {"latents": info.x})

        with self.progress_bar(total=num_inference_steps) as bar:
            latents = sample(
                model,
                class_labels,
                seeds=_seeds(generator, count) if seeds is None else seeds,
                steps=num_inference_steps,
                solver=solver,
                budget=budget,
                guidance=None if guidance_scale == 1 else Guidance(guidance, guidance_scale, weak_budget),
                cache=cache,
                batch_size=max(1, count),
                callback=after_step,
            )
        images = _output(latents, self.vae, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def _seeds(generator: torch.Generator | Sequence[torch.Generator] | None, count: int) -> list[int]:
    if isinstance(generator, Sequence):
        if len(generator) != count:
            raise ElitError(f"{len(generator)} generators for {count} pictures; give one, or one for each")
        return [each.initial_seed() for each in generator]
    first = int(torch.randint(2**31, ())) if generator is None else generator.initial_seed()
    return list(range(first, first + count))


def _output(latents: torch.Tensor, vae: Any, output_type: Output) -> Any:
    if output_type == "latent":
        return latents
    if output_type == "pil":
        return to_pil(latents, vae)
    pixels = latents if vae is None else decode(latents, vae)
    pixels = (pixels.float() / 2 + 0.5).clamp(0, 1)
    return pixels if output_type == "pt" else pixels.cpu().permute(0, 2, 3, 1).numpy()
