"""`elit sample`: images from a model into one PNG, a clip into a video, or any number of images into a folder."""

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import torch
from PIL.PngImagePlugin import PngInfo
from rich.console import Console
from torch import Tensor

from elit.analysis.plan import Plan
from elit.atomic import atomic_file
from elit.commands.bulk import Labels, draw_folder, label_of
from elit.commands.images import to_frames, to_grid
from elit.commands.processes import this_process
from elit.conditions import Condition
from elit.data.autoencoder import decode, load_autoencoder
from elit.data.clips import write_video
from elit.data.text import open_encoder
from elit.digest import weights_digest
from elit.errors import ElitError
from elit.flow import Guidance, StageSchedule, sample
from elit.flow.pyramid import THRESHOLD
from elit.interface import Budget, BudgetByNoise
from elit.launch import default_device
from elit.models.files import load

VIDEO = (".gif", ".mp4")
PIXELS = (1, 3)  # channels of models that need no autoencoder
PLANNED = (
    *("steps", "stage_thresholds", "solver", "budget", "path"),
    *("guidance", "guidance_scale", "guidance_budget", "guidance_interval"),
)
OTHER_FILES = (".jpg", ".jpeg", ".webp", ".npz", ".zip")  # a name of these is not meant as a folder


def parse_budget(text: float | str | None) -> Budget | None:
    """``0.25``; ``0.25,0.5,1`` one per step; ``0.25@0.5,1`` a quarter while t > 0.5, all of them afterwards.

    Raises:
        ElitError: it is none of these.
    """
    if not isinstance(text, str):
        return text
    parts = [part.partition("@") for part in text.split(",")]
    try:
        budgets = [float(budget) for budget, _, _ in parts]
        thresholds = [float(t) for _, at, t in parts if at]
    except ValueError as error:
        raise ElitError(f"budget is {text!r}; it is a number in (0, 1], or several such as 0.25,0.5,1") from error
    return BudgetByNoise(thresholds, budgets) if thresholds else budgets


def parse_steps(steps: int | list[int], thresholds: list[float] | None) -> int | StageSchedule:
    """A number of steps, or a schedule where one says more of its stages.

    Raises:
        ElitError: see :class:`StageSchedule`.
    """
    if isinstance(steps, int) and thresholds is None:
        return steps
    if isinstance(steps, int):
        steps = list(StageSchedule.even(steps, len(thresholds or []) + 1).steps)
    return StageSchedule(steps, [THRESHOLD] * (len(steps) - 1) if thresholds is None else thresholds)


def sample_images(
    model: str,
    out: Path = Path("samples.png"),
    num_images: int = 16,
    labels: Labels = "balanced",
    prompts: list[str] | None = None,
    text_encoder: str = "words",
    seed: int = 0,
    steps: int | list[int] = 40,
    stage_thresholds: list[float] | None = None,
    solver: Literal["euler", "heun", "sde"] = "euler",
    budget: float | str | None = None,
    guidance: Literal["none", "cfg", "ccfg", "ag"] = "none",
    guidance_scale: float = 4.0,
    guidance_budget: float | None = None,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    path: Literal["linear", "cosine"] = "linear",
    plan: Path | None = None,
    weights: Literal["ema", "raw"] = "ema",
    autoencoder: str = "stabilityai/sd-vae-ft-ema",
    format: Literal["png", "npz", "both"] = "png",
    batch_size: int = 64,
    device: str = "auto",
    threads: int = 1,
) -> Path:
    """Draw images from a model into one PNG grid, clips into one video, or any number of images into a folder.

    A folder that was left unfinished is continued. Start it with torchrun or accelerate launch to use several GPUs.

    Args:
        model: a run directory, a saved model, a published .pt file or a Hub id.
        out: the .png file of a grid, for clips a .gif or .mp4 file, or a folder of images.
        num_images: how many.
        labels: balanced (all classes in turn), random, or one class per image, such as [3,1,4].
        prompts: for a model of text, one per image, or one for all.
        text_encoder: what embeds them: a text encoder of transformers (a folder or a Hub id), the one of training; or
            words, the vectors of the embedded captioned-digits.
        seed: image i has the seed SEED + i.
        steps: sampling steps; for a multi-scale model (DFM) also one number per stage, such as [30,20], coarsest first.
        stage_thresholds: of a multi-scale model, the time that each stage but the last reaches before the next begins;
            default 0.1.
        solver: euler, heun or sde.
        budget: fraction of the latents in (0, 1], such as 0.25; one per step, such as 0.25,0.5,1; or by noise level:
            0.25@0.5,1 is a quarter while t > 0.5 and all of them afterwards. Default all.
        guidance: kind of guidance.
        guidance_scale: its scale; 1 is none.
        guidance_budget: budget of the weak term of ccfg and ag; default the lowest.
        guidance_interval: times between which guidance is on; noise is 1, data is 0.
        path: the path that the model was trained on.
        plan: a file of elit plan, in place of the steps, solver, budget, guidance and path.
        weights: of a run, the moving average or the raw weights.
        autoencoder: a diffusers autoencoder that decodes, for models on latents.
        format: what a folder gets: one PNG per image, samples.npz in the layout of the ADM suite, or both.
        batch_size: images at a time; the images of a folder are exact for one batch size.
        device: auto, cpu, cuda, ...
        threads: of a process on the CPU, for folders; rather start more processes than more threads.

    Raises:
        ElitError: a wrong option, a model that is not there, or an output that cannot be written.
    """
    settings = {k: v for k, v in locals().items() if k not in ("out", "format", "device", "batch_size", "threads")}
    out = Path(out)
    suffix = out.suffix.lower()
    single = suffix in (".png", *VIDEO)
    if suffix in OTHER_FILES or (out.is_file() and not single):
        raise ElitError(f"out is {out}; it must be a .png file, for clips .gif or .mp4, or a folder")
    if num_images < 1 or batch_size < 1:
        raise ElitError(f"num_images and batch_size must be at least 1, not {num_images} and {batch_size}")
    if isinstance(labels, list) and len(labels) != num_images:
        raise ElitError(f"labels lists {len(labels)} classes for {num_images} images; give one per image")
    if prompts is not None and (labels != "balanced" or len(prompts) not in (1, num_images)):
        raise ElitError(f"{len(prompts)} prompts for {num_images} images: give one, or one per image, and no labels")
    chosen = None
    if guidance != "none":
        chosen = Guidance(guidance, guidance_scale, guidance_budget, guidance_interval)
    how: dict[str, Any] = {"steps": parse_steps(steps, stage_thresholds), "solver": solver}
    how |= {"budget": parse_budget(budget), "guidance": chosen, "path": path}
    followed = None if plan is None else _follow(plan, settings)
    if followed is not None:
        how, chosen = followed.arguments(), followed.guidance
        settings |= how
    del settings["plan"]  # what it says counts, not where it lies

    process = None if single else this_process(device, threads)
    device = str(process.device if process else default_device(device))
    net = load(model, weights=weights, device=device)
    if followed is not None and followed.stamp["model"] != weights_digest(net):
        raise ElitError(f"{plan} was made for other weights than those of {model}; run elit plan for this model")
    is_video = len(net.input_shape()) == 4
    if is_video != (suffix in VIDEO):
        raise ElitError(
            f"out is {out}; {model} makes {'clips: take .gif or .mp4' if is_video else 'images: take .png or a folder'}"
        )
    classes, channels = net.config.num_classes, net.config.in_channels
    decoder = None if channels in PIXELS else load_autoencoder(autoencoder, channels)
    encode = None if prompts is None else open_encoder(text_encoder, device)
    if isinstance(labels, list) and classes:
        net.as_condition(labels)  # all of them, before the first is drawn

    def labels_of(indices: Sequence[int]) -> list[int] | None:
        return [label_of(i, labels, classes, seed) for i in indices] if classes else None

    def condition_of(indices: Sequence[int]) -> Condition | Sequence[int] | None:
        if prompts is None or encode is None:
            return labels_of(indices)
        return encode([prompts[i % len(prompts)] for i in indices])

    def draw(indices: Sequence[int], progress: bool = False) -> Tensor:
        images = sample(
            net,
            condition_of(indices),
            seeds=[seed + i for i in indices],
            batch_size=batch_size,
            progress=progress,
            **how,
        )
        return images if decoder is None else decode(images, decoder)

    console = Console(soft_wrap=True, highlight=False)
    if process is None:
        _write_file(out, settings, partial(draw, range(num_images), progress=True), is_video)
        console.print(f"{num_images} images in {out}")
        return out
    settings |= {"batch_size": batch_size, "model_weights": weights_digest(net, decoder), "model_dtype": str(net.dtype)}
    settings |= {"device": _device_name(process.device), "threads": threads, "torch": torch.__version__}
    settings |= {"guidance": asdict(chosen) if chosen else "none"}
    settings = {k: v for k, v in settings.items() if not k.startswith("guidance_")}
    if draw_folder(out, json.loads(json.dumps(settings, default=str)), draw, labels_of, format, process):
        console.print(f"{num_images} images in {out}")
    return out


def _follow(path: Path, settings: dict[str, Any]) -> Plan:
    """The plan, which leaves nothing of what it sets to the other options.

    Raises:
        ElitError: another option sets it too, or the file is no plan.
    """
    defaults = {key: value.default for key, value in signature(sample_images).parameters.items()}
    for key in PLANNED:
        if settings[key] != defaults[key]:
            raise ElitError(f"{key} is set by the plan {path}; leave --{key.replace('_', '-')} out")
    return Plan.load(path)


def _write_file(out: Path, settings: dict[str, Any], draw: Callable[[], Tensor], is_video: bool) -> None:
    record = PngInfo()
    record.add_text("elit", json.dumps(settings, default=str))
    with atomic_file(out) as temporary:  # opened first: a folder that cannot be written is told before the work
        images = draw()
        if is_video:
            write_video(to_frames(images), temporary)
        else:
            to_grid(images).save(temporary, pnginfo=record)


def _device_name(device: torch.device) -> str:
    """What decides the rounding of kernels."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"
