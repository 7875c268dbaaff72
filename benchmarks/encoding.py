"""Is encoding bound by the autoencoder or by reading images? Prints the rate of each alone.

    python benchmarks/encoding.py IMAGES [--autoencoder FOLDER_OR_ID] [--workers N] [--batch_size B] [--batches M]

IMAGES is a folder as `elit prepare convert` writes it. Without ``--autoencoder`` it is one of the architecture of
Stable Diffusion with random weights, which costs the same. With W readers per GPU reading keeps up while
W * (images/s of one reader) exceeds the images/s of the autoencoder; `elit prepare encode` shows the share of its time
that it waits for images.
"""

import time
from typing import Any

import torch
from diffusers import AutoencoderKL
from jsonargparse import auto_cli
from torch.utils.data import DataLoader

from elit.analysis.environment import environment
from elit.data import ImageFolder
from elit.data.autoencoder import load_autoencoder, posterior
from elit.data.encode import PixelBatches
from elit.data.pixels import from_uint8
from elit.launch import default_device


def benchmark(
    images: str, autoencoder: str | None = None, workers: int = 1, batch_size: int = 32, batches: int = 8
) -> None:
    """Prints the rate of reading and of the autoencoder.

    Args:
        images: a folder as ``elit prepare convert`` writes it.
        autoencoder: a diffusers autoencoder: a folder or a Hub id.
        workers: processes that read.
        batch_size: images at a time.
        batches: that the autoencoder encodes.
    """
    print(environment())
    data = ImageFolder(images)
    resolution = data.shape[1]
    reading = read_rate(data, workers, batch_size)
    print(f"reading, {workers} process(es): {reading:.1f} images/s")
    encoding = encode_rate(autoencoder, resolution, batch_size, batches)
    print(f"autoencoder at {resolution}x{resolution}, batch {batch_size}: {encoding:.2f} images/s")
    print(f"reading is {reading / encoding:.1f} times as fast")


def read_rate(images: ImageFolder, workers: int, batch_size: int) -> float:
    """Images per second through the loader of `elit prepare encode`, after its first batch."""
    batches = [range(start, start + batch_size) for start in range(0, len(images) - batch_size + 1, batch_size)]
    loader = iter(DataLoader(PixelBatches(images), batch_size=None, sampler=batches, num_workers=workers))
    next(loader)
    start = time.perf_counter()
    for _ in loader:
        pass
    return (len(batches) - 1) * batch_size / (time.perf_counter() - start)


def encode_rate(source: str | None, resolution: int, batch_size: int, batches: int) -> float:
    """Images per second of the autoencoder, results brought to main memory, after a first batch."""
    device = default_device()
    autoencoder = (load_autoencoder(source) if source else stable_diffusion()).to(device)
    pixels = torch.randint(256, (batch_size, 3, resolution, resolution), dtype=torch.uint8)
    for i in range(batches + 1):
        if i == 1:
            start = time.perf_counter()
        mean, std = posterior(from_uint8(pixels.to(device)), autoencoder)
        mean.cpu(), std.cpu()
    return batches * batch_size / (time.perf_counter() - start)


def stable_diffusion() -> Any:
    """The architecture of Stable Diffusion's autoencoder, random weights."""
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    net: Any = AutoencoderKL(**kinds, block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4)
    return net.eval()


if __name__ == "__main__":
    auto_cli(benchmark)
