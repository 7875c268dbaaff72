"""`elit export`: a model as one file for other runtimes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from elit.analysis import calibrate
from elit.analysis.calibration import STEP_COUNTS
from elit.commands.options import DeviceOptions
from elit.data.autoencoder import load_autoencoder
from elit.errors import ElitError
from elit.export import Format, Metadata, Precision, export, is_exported
from elit.export.decoder import export_decoder
from elit.export.web import export_web
from elit.interface import listed
from elit.launch import default_device
from elit.models import Model
from elit.models.files import load


@dataclass(kw_only=True)
class ExportOptions(DeviceOptions):
    """The options of `elit export`.

    Attributes:
        model: a run directory, a saved model, a published .pt file or a Hub id.
        out: the file to write, .pt2 or .onnx; for the format web a new folder.
        format: pt2 (torch.export), onnx, aoti (a package of machine code for this kind of processor), or web (a static
            folder that samples in the browser). By default what the ending of the file says.
        weights: which weights of a run to take, the moving average (ema) or the raw ones.
        levels: numbers of latents per window that the file may be used with, such as [1,4,16]; by default all that were
            trained.
        batch: the only batch size; by default any.
        precision: of the weights, fp32, fp16, bf16, or for ONNX int8. Inputs and outputs are float32.
        guided: compute both terms of guidance in one call, for runtimes that combine them themselves.
        class_names: one name for each class, kept in the file.
        autoencoder: of a model on latents, a diffusers autoencoder (a folder or a Hub id) whose decoder is written
            beside the file, as NAME-decoder.onnx (or .pt2).
        path: the path between noise and data that the model was trained on.
        steps: number of sampling steps that the file recommends.
        device: where an aoti package is to run: cpu or cuda. The other formats run everywhere.
    """

    model: str
    out: Path
    format: Format | Literal["web"] | None = None
    weights: Literal["ema", "raw"] = "ema"
    levels: list[int] | None = None
    batch: int | None = None
    precision: Precision = "fp32"
    guided: bool = False
    class_names: list[str] | None = None
    autoencoder: str | None = None
    path: Literal["linear", "cosine"] = "linear"
    steps: int = 40
    device: str = "cpu"


def export_model(options: ExportOptions) -> Metadata:
    """Write a model as one file with all of its budgets, for PyTorch, ONNX or the browser, or as machine code.

    Raises:
        ElitError: a wrong option, a model that is not there, or a file that cannot be written.
    """
    if is_exported(options.model):
        raise ElitError(f"{options.model} is an exported file already; give the model that it was made from")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = default_device(options.device if options.format == "aoti" else "cpu")
    console = Console(soft_wrap=True, highlight=False)
    model = load(options.model, weights=options.weights, device=device)
    if options.format == "web":
        return export_page(options, model, console)
    autoencoder = None
    if options.autoencoder is not None:
        autoencoder = load_autoencoder(options.autoencoder, model.input_shape()[0])
    with console.status("tracing the model; a package is also compiled, which takes a minute or more"):
        told = export(
            model,
            options.out,
            format=options.format,
            levels=options.levels,
            batch=options.batch,
            precision=options.precision,
            guided=options.guided,
            class_names=options.class_names,
            path=options.path,
            steps=options.steps,
        )
    if autoencoder is not None:
        beside = options.out.with_name(f"{options.out.stem}-decoder{options.out.suffix}")
        export_decoder(autoencoder, beside, told.input_shape)
        console.print(f"{beside}: {beside.stat().st_size / 1e6:.2f} MB, from latents to images in [-1, 1]")
    levels = f"{listed(told.levels)} of {told.num_latents} latents a window" if told.levels else "no levels"
    console.print(f"{options.out}: {options.out.stat().st_size / 1e6:.2f} MB, {told.precision}, {levels}")
    more = " --trust-native-code" if options.format == "aoti" else ""
    more += "".join(
        f" --{name} {value}"
        for name, value in (("path", options.path), ("steps", options.steps))
        if value != getattr(ExportOptions, name)
    )
    console.print(f"next: elit sample --model {options.out}{more} --out samples.png")
    return told


def export_page(options: ExportOptions, model: Model, console: Console) -> Metadata:
    """Writes the folder of a page, whose planner knows what budgets and steps cost in error."""
    if options.guided or options.batch is not None or options.autoencoder is not None:
        raise ElitError("the page draws one image of one term at a time; leave guided, batch and autoencoder out")
    with console.status("measuring the errors of budgets and steps, and tracing the model"):
        known = None
        if model.levels and model.stage_shapes is None and not model.takes_text:
            classes = list(range(model.config.num_classes)) if model.conditional else None
            calibration = calibrate(model, classes, path=options.path)
            known = {
                "levels": calibration.levels,
                "times": calibration.times,
                "errors": calibration.tables[0].errors,
                "step_counts": STEP_COUNTS,
                "step_errors": calibration.step_tables[0].errors,
            }
        told = export_web(
            model,
            options.out,
            calibration=known,
            levels=options.levels,
            precision=options.precision,
            class_names=options.class_names,
            path=options.path,
            steps=options.steps,
        )
    size = (options.out / "model.onnx").stat().st_size / 1e6
    console.print(f"{options.out}: a model of {size:.2f} MB, a page, and ONNX Runtime for the web")
    console.print(f"next: python -m http.server 8000 -d {options.out}, and open http://localhost:8000")
    return told
