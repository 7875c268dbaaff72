"""`elit sample`: images from a model into one PNG, a clip into a video, or any number of images into a folder."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from PIL.PngImagePlugin import PngInfo
from rich.console import Console
from torch import Tensor

from elit.analysis.plan import Plan
from elit.atomic import atomic_file
from elit.commands.bulk import Format, Labels, draw_folder, label_of
from elit.commands.images import to_frames, to_grid
from elit.commands.options import ModelOptions, SamplerOptions
from elit.commands.processes import Process, this_process
from elit.conditions import Condition
from elit.data.autoencoder import decode, load_autoencoder
from elit.data.clips import write_video
from elit.data.text import open_encoder
from elit.digest import weights_digest
from elit.errors import ElitError
from elit.flow import sample
from elit.launch import default_device
from elit.models import Model

VIDEO = (".gif", ".mp4")
PIXELS = (1, 3)  # channels of models that need no autoencoder
OTHER_FILES = (".jpg", ".jpeg", ".webp", ".npz", ".zip")  # a name of these is not meant as a folder
UNRECORDED = ("out", "format", "device", "batch_size", "threads", "plan")  # they do not decide what is in an image


@dataclass(kw_only=True)
class SampleOptions(SamplerOptions, ModelOptions):
    """The options of `elit sample`.

    Attributes:
        out: a .png file for a grid of images, a .gif or .mp4 file for clips, or a folder for one file per image.
        num_images: number of images.
        labels: balanced (all classes in turn), random, or one class per image, such as [3,1,4].
        prompts: for a model of text, one prompt per image, or one for all.
        text_encoder: what embeds the prompts: the text encoder of transformers that the model was trained with (a
            folder or a Hub id), or words, the vectors of the embedded data set captioned-digits.
        seed: image i starts from the noise of seed SEED + i.
        plan: a file of elit plan, which takes the place of steps, solver, budget, guidance and path.
        autoencoder: a diffusers autoencoder that decodes the samples of a model on latents: a folder or a Hub id. It
            runs in float32, which a GPU rounds to tf32 unless precision is fp32: half precision would show in pixels.
        format: what a folder gets: one PNG per image, samples.npz in the layout of the ADM suite, or both.
        batch_size: images at a time. The images of a folder repeat to the last bit with the same batch size.
        threads: number of CPU threads of a process, for a folder. Its images repeat to the last bit with the same
            number, and more processes are faster than more threads.

    Raises:
        ElitError: options that do not go together.
    """

    out: Path = Path("samples.png")
    num_images: int = 16
    labels: Labels = "balanced"
    prompts: list[str] | None = None
    text_encoder: str = "words"
    seed: int = 0
    plan: Path | None = None
    autoencoder: str = "stabilityai/sd-vae-ft-ema"
    format: Format = "png"
    batch_size: int = 64
    threads: int = 1

    def __post_init__(self) -> None:
        self.out = Path(self.out)
        if self.out.suffix.lower() in OTHER_FILES or (self.out.is_file() and not self.is_one_file):
            raise ElitError(f"out is {self.out}; it must be a .png file, for clips .gif or .mp4, or a folder")
        if self.num_images < 1 or self.batch_size < 1:
            raise ElitError(
                f"num_images and batch_size must be at least 1, not {self.num_images} and {self.batch_size}"
            )
        if isinstance(self.labels, list) and len(self.labels) != self.num_images:
            raise ElitError(f"labels lists {len(self.labels)} classes for {self.num_images} images; give one per image")
        if self.prompts is not None and (self.labels != "balanced" or len(self.prompts) not in (1, self.num_images)):
            raise ElitError(
                f"{len(self.prompts)} prompts for {self.num_images} images: give one, or one per image, and no labels"
            )

    @property
    def is_video(self) -> bool:
        return self.out.suffix.lower() in VIDEO

    @property
    def is_one_file(self) -> bool:
        return self.is_video or self.out.suffix.lower() == ".png"


def sample_images(options: SampleOptions) -> Path:
    """Draw images from a model into one PNG grid, clips into one video, or any number of images into a folder.

    A folder that was left unfinished is continued. Start it with torchrun or accelerate launch to use several GPUs.

    Returns:
        Where the images are.

    Raises:
        ElitError: a wrong option, a model that is not there, or an output that cannot be written.
    """
    plan = None if options.plan is None else load_plan(options)
    arguments = options.sampler_arguments() | {"path": options.path} if plan is None else plan.arguments()
    process = None if options.is_one_file else this_process(options.device, options.threads)
    model = options.load_model(process.device if process else default_device(options.device))
    check_fit(options, model, plan)
    source = ImageSource(options, model, arguments)
    if process is None:
        write_file(options, source)
    elif not draw_folder(options.out, folder_settings(source, process), source, source.labels, options.format, process):
        return options.out  # other processes are still at it
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"{options.num_images} {'clips' if options.is_video else 'images'} in {options.out}")
    if process is not None:
        console.print(f"next: elit evaluate --samples {options.out} --reference REFERENCE")
    return options.out


def load_plan(options: SampleOptions) -> Plan:
    """Loads the plan of the options.

    Raises:
        ElitError: another option sets what the plan decides, or the file is no plan.
    """
    planned = {field.name for field in fields(SamplerOptions)} | {"path"}
    for field in fields(SampleOptions):
        if field.name in planned and getattr(options, field.name) != field.default:
            raise ElitError(
                f"{field.name} is set by the plan {options.plan}; leave --{field.name.replace('_', '-')} out"
            )
    assert options.plan is not None
    return Plan.load(options.plan)


def check_fit(options: SampleOptions, model: Model, plan: Plan | None) -> None:
    """Checks that the options suit the model.

    Raises:
        ElitError: a plan of another model or precision, clips into a picture or images into a video, or labels that do
            not exist.
    """
    if plan is not None and plan.stamp["dtype"] != str(model.dtype):
        raise ElitError(
            f"{options.plan} was made for a model in {plan.stamp['dtype'].removeprefix('torch.')}, and precision is "
            f"{options.precision}; take the precision of the plan, or run elit plan in this one"
        )
    if plan is not None and plan.stamp["model"] != weights_digest(model):
        raise ElitError(
            f"{options.plan} was made for other weights than those of {options.model}; run elit plan for this model"
        )
    makes_clips = len(model.input_shape()) == 4
    if makes_clips != options.is_video:
        made = "clips: take .gif or .mp4" if makes_clips else "images: take .png or a folder"
        raise ElitError(f"out is {options.out}; {options.model} makes {made}")
    if isinstance(options.labels, list) and model.config.num_classes:
        model.as_condition(options.labels)  # all of them, before the first is drawn


class ImageSource:
    """Draws the images of given indices; each image is a function of its index alone."""

    def __init__(self, options: SampleOptions, model: Model, arguments: dict[str, Any]) -> None:
        """Loads what decodes samples and embeds prompts.

        Args:
            arguments: of :func:`elit.sample`, beside condition and seeds.

        Raises:
            ElitError: an autoencoder or a text encoder that is missing or does not fit.
        """
        self.options, self.model, self.arguments = options, model, arguments
        channels = model.config.in_channels
        self.autoencoder = None if channels in PIXELS else load_autoencoder(options.autoencoder, channels)
        self.encode = None if options.prompts is None else open_encoder(options.text_encoder, str(model.device))

    def __call__(self, indices: Sequence[int], progress: bool = False) -> Tensor:
        """Draws images (B, C, H, W) in [-1, 1]."""
        samples = sample(
            self.model,
            self.condition(indices),
            seeds=[self.options.seed + i for i in indices],
            batch_size=self.options.batch_size,
            progress=progress,
            **self.arguments,
        )
        return samples if self.autoencoder is None else decode(samples, self.autoencoder)

    def labels(self, indices: Sequence[int]) -> list[int] | None:
        """Returns the classes of images, or None for a model without classes."""
        classes = self.model.config.num_classes
        return [label_of(i, self.options.labels, classes, self.options.seed) for i in indices] if classes else None

    def condition(self, indices: Sequence[int]) -> Condition | Sequence[int] | None:
        """Returns what the model is told of images: embedded prompts, or else their classes."""
        if self.encode is None:
            return self.labels(indices)
        prompts = self.options.prompts or []
        return self.encode([prompts[i % len(prompts)] for i in indices])

    def settings(self) -> dict[str, Any]:
        """Returns what decides the images, as plain values for JSON."""
        settings = {key: value for key, value in asdict(self.options).items() if key not in UNRECORDED}
        for later in ("untrained_levels", "compile"):  # they were no settings when the first folders were drawn
            if not settings[later]:
                del settings[later]
        if self.options.plan is not None:
            settings |= self.arguments
        guidance = self.arguments["guidance"]
        settings["guidance"] = asdict(guidance) if guidance else "none"
        settings = {key: value for key, value in settings.items() if not key.startswith("guidance_")}
        return dict(json.loads(json.dumps(settings, default=str)))


def write_file(options: SampleOptions, source: ImageSource) -> None:
    """Draws all images into one PNG, or all clips into one video."""
    record = PngInfo()
    record.add_text("elit", json.dumps(source.settings()))
    with atomic_file(options.out) as temporary:  # opened first: a folder that cannot be written is told before the work
        images = source(range(options.num_images), progress=True)
        if options.is_video:
            write_video(to_frames(images), temporary)
        else:
            to_grid(images).save(temporary, pnginfo=record)


def folder_settings(source: ImageSource, process: Process) -> dict[str, Any]:
    """Returns everything that decides the bytes of the images in a folder."""
    options = source.options
    return source.settings() | {
        "batch_size": options.batch_size,
        "model_weights": weights_digest(source.model, source.autoencoder),
        "model_dtype": str(source.model.dtype),
        "device": device_name(process.device),
        "threads": options.threads,
        "torch": torch.__version__,
    }


def device_name(device: torch.device) -> str:
    """Names the processor, which decides how kernels round."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"
