"""`elit export`: a model as one file for other runtimes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from elit.commands.options import DeviceOptions
from elit.errors import ElitError
from elit.export import Format, Metadata, Precision, export, is_exported
from elit.interface import listed
from elit.launch import default_device
from elit.models.files import load


@dataclass(kw_only=True)
class ExportOptions(DeviceOptions):
    """The options of `elit export`.

    Attributes:
        model: a run directory, a saved model, a published .pt file or a Hub id.
        out: the file to write, .pt2 or .onnx.
        format: pt2 (torch.export), onnx, or aoti: a package of machine code for this kind of processor. By default
            what the ending of the file says.
        weights: which weights of a run to take, the moving average (ema) or the raw ones.
        levels: numbers of latents per window that the file may be used with, such as [1,4,16]; by default all that were
            trained.
        batch: the only batch size; by default any.
        precision: of the weights, fp32, fp16, bf16, or for ONNX int8. Inputs and outputs are float32.
        guided: compute both terms of guidance in one call, for runtimes that combine them themselves.
        class_names: one name for each class, kept in the file.
        path: the path between noise and data that the model was trained on.
        steps: number of sampling steps that the file recommends.
        device: where an aoti package is to run: cpu or cuda. The other formats run everywhere.
    """

    model: str
    out: Path
    format: Format | None = None
    weights: Literal["ema", "raw"] = "ema"
    levels: list[int] | None = None
    batch: int | None = None
    precision: Precision = "fp32"
    guided: bool = False
    class_names: list[str] | None = None
    path: Literal["linear", "cosine"] = "linear"
    steps: int = 40
    device: str = "cpu"


def export_model(options: ExportOptions) -> Metadata:
    """Write a model as one file for other runtimes, with all of its budgets: for PyTorch, ONNX, or as machine code.

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
    levels = f"{listed(told.levels)} of {told.num_latents} latents a window" if told.levels else "no levels"
    console.print(f"{options.out}: {options.out.stat().st_size / 1e6:.2f} MB, {told.precision}, {levels}")
    trust = " --trust-native-code" if options.format == "aoti" else ""
    console.print(f"next: elit sample --model {options.out}{trust} --out samples.png")
    return told
