"""`elit sample`: images from a model into a PNG, or clips into a video."""

import json
from pathlib import Path
from typing import Literal

import torch
from PIL.PngImagePlugin import PngInfo
from rich.console import Console

from elit.app.images import to_frames, to_grid
from elit.atomic import atomic_file
from elit.data.autoencoder import decode, load_autoencoder
from elit.data.clips import write_video
from elit.data.text import open_encoder
from elit.errors import ElitError
from elit.flow import Guidance, sample
from elit.interface import Budget, BudgetByNoise
from elit.models.files import load

VIDEO = (".gif", ".mp4")
PIXELS = (1, 3)  # channels of models that need no autoencoder


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


def sample_images(
    model: str,
    out: Path = Path("samples.png"),
    num_images: int = 16,
    labels: list[int] | None = None,
    prompts: list[str] | None = None,
    text_encoder: str = "words",
    seed: int = 0,
    steps: int = 40,
    solver: Literal["euler", "heun", "sde"] = "euler",
    budget: float | str | None = None,
    guidance: Literal["none", "cfg", "ccfg", "ag"] = "none",
    guidance_scale: float = 4.0,
    guidance_budget: float | None = None,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    path: Literal["linear", "cosine"] = "linear",
    weights: Literal["ema", "raw"] = "ema",
    autoencoder: str = "stabilityai/sd-vae-ft-ema",
    batch_size: int = 64,
    device: str = "auto",
) -> Path:
    """Draw images from a model into one PNG grid, or clips into one video.

    Args:
        model: a run directory, a saved model, a published .pt file or a Hub id.
        out: the file to write: .png for images, .gif or .mp4 for clips.
        num_images: how many.
        labels: one class per image, such as [3,1,4]; default all classes in turn.
        prompts: for a model of text, one per image, or one for all.
        text_encoder: what embeds them: a text encoder of transformers (a folder or a Hub id), the one of training; or
            words, the vectors of the embedded captioned-digits.
        seed: image i has the seed SEED + i.
        steps: sampling steps.
        solver: euler, heun or sde.
        budget: fraction of the latents in (0, 1], such as 0.25; one per step, such as 0.25,0.5,1; or by noise level:
            0.25@0.5,1 is a quarter while t > 0.5 and all of them afterwards. Default all.
        guidance: kind of guidance.
        guidance_scale: its scale; 1 is none.
        guidance_budget: budget of the weak term of ccfg and ag; default the lowest.
        guidance_interval: times between which guidance is on; noise is 1, data is 0.
        path: the path that the model was trained on.
        weights: of a run, the moving average or the raw weights.
        autoencoder: a diffusers autoencoder that decodes, for models on latents.
        batch_size: images at a time.
        device: auto, cpu, cuda, ...

    Raises:
        ElitError: a wrong option, a model that is not there, or an output that cannot be written.
    """
    settings = {k: v for k, v in locals().items() if k not in ("out", "device", "batch_size")}
    out = Path(out)
    if out.suffix.lower() not in (".png", *VIDEO):
        raise ElitError(f"out is {out}; it must be a .png file, or for clips .gif or .mp4")
    if num_images < 1 or batch_size < 1:
        raise ElitError(f"num_images and batch_size must be at least 1, not {num_images} and {batch_size}")
    if labels is not None and len(labels) != num_images:
        raise ElitError(f"labels lists {len(labels)} classes for {num_images} images; give one per image")
    if prompts is not None and (labels is not None or len(prompts) not in (1, num_images)):
        raise ElitError(f"{len(prompts)} prompts for {num_images} images: give one, or one per image, and no labels")
    chosen = None
    if guidance != "none":
        chosen = Guidance(guidance, guidance_scale, guidance_budget, guidance_interval)

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    net = load(model, weights=weights, device=device)
    is_video = len(net.input_shape()) == 4
    if is_video != (out.suffix.lower() in VIDEO):
        raise ElitError(
            f"out is {out}; {model} makes {'clips: take .gif or .mp4' if is_video else 'images: take .png'}"
        )
    classes, channels = net.config.num_classes, net.config.in_channels
    decoder = None if channels in PIXELS else load_autoencoder(autoencoder, channels)
    condition = labels or (torch.arange(num_images) % classes if classes else None)
    if prompts is not None:
        each = prompts * num_images if len(prompts) == 1 else prompts
        condition = open_encoder(text_encoder, device)(each)
    record = PngInfo()
    record.add_text("elit", json.dumps(settings, default=str))
    with atomic_file(out) as temporary:  # opened first: a folder that cannot be written is told before the work
        images = sample(
            net,
            condition,
            seeds=range(seed, seed + num_images),
            steps=steps,
            solver=solver,
            budget=parse_budget(budget),
            guidance=chosen,
            path=path,
            batch_size=batch_size,
            progress=True,
        )
        images = images if decoder is None else decode(images, decoder)
        if is_video:
            write_video(to_frames(images), temporary)
        else:
            to_grid(images).save(temporary, pnginfo=record)
    Console(soft_wrap=True, highlight=False).print(f"{num_images} images in {out}")
    return out
