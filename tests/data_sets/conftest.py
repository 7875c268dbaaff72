"""Real files that several tests of preparation share."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from pictures import write_pictures

from elit.app.prepare import prepare_convert, prepare_encode


class Prepared(NamedTuple):
    """A small data set at every stage."""

    source: Path
    corrupt: list[str]
    images: Path
    autoencoder: Path
    latents: Path


def save_autoencoder(folder: Path, **changes: float) -> None:
    """A small autoencoder (a quarter of the resolution) with random weights, in the real format."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    options = {"block_out_channels": (8, 8, 8), "norm_num_groups": 4, "latent_channels": 4} | changes
    AutoencoderKL(**kinds, **options).save_pretrained(folder)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """60 files, three of them corrupt -> 57 images of 32x32 -> latents in three shards."""
    root = tmp_path_factory.mktemp("prepared")
    corrupt = write_pictures(root / "source", 60)
    prepare_convert(str(root / "source"), root / "images", 32, workers=1)
    save_autoencoder(root / "autoencoder")
    options = {"shard_size": 20, "batch_size": 8, "workers": 0}
    prepare_encode(str(root / "images"), root / "latents", str(root / "autoencoder"), **options)
    return Prepared(root / "source", corrupt, root / "images", root / "autoencoder", root / "latents")
