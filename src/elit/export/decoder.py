"""The decoder of an autoencoder as a file beside an exported model, for runtimes without PyTorch."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from elit.data.autoencoder import decode_batch
from elit.errors import ElitError
from elit.export import archive, onnx
from elit.export.graph import TRACED_BATCH, strip

MAX_BATCH = 63  # from 64 images on diffusers copies them to another layout


class Decoder(nn.Module):
    """Decodes latents (B, C, h, w) as a model gives them, scaled, to images (B, 3, H, W) in [-1, 1]."""

    def __init__(self, autoencoder: Any) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, latents: Tensor) -> Tensor:
        return decode_batch(latents, self.autoencoder)


@torch.no_grad()
def export_decoder(autoencoder: Any, file: str | Path, shape: tuple[int, ...]) -> None:
    """Writes a decoder as a graph from ``latents`` to images, in batches of 1 to 63: from 64 on diffusers' differs.

    Args:
        autoencoder: of :func:`elit.data.autoencoder.load_autoencoder`.
        file: a ``.onnx`` or ``.pt2`` file. The latter is opened with ``torch.export.load``, by people who trust it.
        shape: of the latents of one image, (C, h, w).

    Raises:
        ElitError: latents of another kind, or a file that cannot be written.
    """
    file = Path(file)
    if file.suffix not in (".onnx", ".pt2"):
        raise ElitError(f"file is {file}; a decoder is written to a .onnx or .pt2 file")
    if len(shape) != 3:
        raise ElitError(f"latents have the shape {shape}; only decoders of images can be exported")
    example, sizes = torch.randn(TRACED_BATCH, *shape), {0: Dim("batch", min=1, max=MAX_BATCH)}
    decoder = Decoder(autoencoder.float()).eval()
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        program = torch.export.export(decoder, (example,), dynamic_shapes={"latents": sizes}, strict=False)
    strip(program)
    told = json.dumps({"decoder": type(autoencoder).__name__, "input_shape": shape, "output": "images in [-1, 1]"})
    if file.suffix == ".onnx":
        onnx.save(onnx.convert(program, told), file)
    else:
        archive.save_program(program, file, told)
