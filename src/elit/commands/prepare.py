"""`elit prepare`: turns images into what training reads."""

from pathlib import Path

from rich.console import Console
from tqdm import tqdm

from elit.data import ClipFolder, open_pixels
from elit.data.autoencoder import commit_of, load_autoencoder
from elit.data.convert import REPORT, available_cpus, convert_images
from elit.data.encode import Encoding, verify_shards
from elit.data.latents import INDEX, read_index
from elit.data.remote import local_copy
from elit.data.sources import find_images
from elit.data.text import open_encoder
from elit.errors import ElitError
from elit.launch import default_device, local_world_size


def prepare_convert(
    source: str,
    out: Path,
    resolution: int = 256,
    transform: str = "center-crop-dhariwal",
    workers: int | None = None,
    strict: bool = False,
) -> None:
    """Convert images of any size and mode to square PNGs with dataset.json.

    A run that was killed continues when it is started again.

    Args:
        source: a folder or zip of images, in class folders, with dataset.json, with captions in metadata.jsonl, or
            loose and without labels; or its URL.
        out: the folder to write.
        resolution: height and width of the result.
        transform: center-crop, center-crop-wide (black bars above and below) or center-crop-dhariwal.
        workers: number of processes; by default one per processor.
        strict: stop at an image that cannot be read, instead of naming it in report.json.

    Raises:
        ElitError: a wrong option or source, or a folder that cannot be used.
    """
    images = find_images(local_copy(source))
    converted = convert_images(images, Path(out), resolution, transform, workers or available_cpus(), strict)
    skipped = [bad for bad in tqdm(converted, total=len(images), desc="converting", unit="image") if bad is not None]
    unlabelled = "no labels" if images.captions is None else "with captions"
    classes = f"{images.num_classes} classes" if images.num_classes else unlabelled
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"{len(images) - len(skipped):,} images of {resolution}x{resolution}, {classes}, in {out}")
    for name, reason in skipped[:10]:
        console.print(f"  skipped {name}: {reason}", markup=False)
    if skipped:
        console.print(f"{len(skipped)} could not be read: see {Path(out) / REPORT}")
    console.print(f"next: elit train --data {out}, or elit prepare encode {out} LATENTS to train on latents")


def prepare_encode(
    source: str,
    out: Path,
    autoencoder: str = "stabilityai/sd-vae-ft-ema",
    revision: str | None = None,
    flips: bool = False,
    dtype: str = "float32",
    shard_size: int = 4096,
    batch_size: int = 32,
    workers: int | None = None,
    device: str = "auto",
    text_encoder: str | None = None,
) -> None:
    """Encode images or clips with an autoencoder into shards of latents, and their captions with a text encoder.

    A run that was killed continues at its next shard. Under accelerate launch or torchrun the processes share the work.

    Args:
        source: a folder or zip of images of one square size, see elit prepare convert; or its URL. VIDEOS@8x64x96 is a
            folder of videos as clips of 8 frames, 64 pixels high and 96 wide.
        out: the folder to write.
        autoencoder: a diffusers autoencoder: a folder or a Hub id.
        revision: branch, tag or commit of the autoencoder on the Hub.
        flips: store the mirror image of each image after it.
        dtype: precision of the stored latents: float32, float16 or bfloat16.
        shard_size: number of images per shard.
        batch_size: images at a time.
        workers: number of processes that read images; by default one per processor, shared by the processes of a
            launch.
        device: auto takes a GPU where there is one; or cpu, cuda, cuda:1, ...
        text_encoder: of captions, which are then stored embedded: a text encoder of transformers (a folder or a Hub
            id), the folder of a pipeline of diffusers, or words. Training then needs no text encoder.

    Raises:
        ElitError: a wrong option or source, an image that cannot be read, or a folder that cannot be used.
    """
    images = open_pixels(source)
    encoder = load_autoencoder(autoencoder, revision=revision)
    if workers is None:
        workers = max(1, available_cpus() // local_world_size())
    encoding = Encoding(
        images, Path(out), encoder.to(default_device(device)), autoencoder, commit_of(autoencoder, revision),
        flips, dtype, shard_size, batch_size, workers,
        None if text_encoder is None else open_encoder(text_encoder, default_device(device)), text_encoder,
    )  # fmt: skip
    waited = encoded = 0.0
    with tqdm(total=sum(len(encoding.shards[s]) for s in encoding.todo), desc="encoding", unit="image") as bar:
        for report in encoding:
            bar.update(report.images)
            waited, encoded = waited + report.waited, encoded + report.encoded
            bar.set_postfix(waiting=f"{waited / (waited + encoded):.0%}", refresh=False)
    console = Console(soft_wrap=True, highlight=False)
    kind = "clips" if isinstance(images, ClipFolder) else "images"
    console.print(f"{len(images):,} {kind} in {len(encoding.shards)} shards of {out}")
    if encoding.todo:
        console.print(f"the autoencoder ran for {encoded:.1f} s and waited {waited:.1f} s for {kind} to be read")
    console.print(f"next: elit train --data {out}")


def prepare_verify(folder: str) -> None:
    """Compare every shard of latents with its checksum, as after a copy to another machine.

    Args:
        folder: what elit prepare encode wrote; or its URL.

    Raises:
        ElitError: names the shards that are missing or damaged.
    """
    root = local_copy(folder)
    total = len(read_index(root / INDEX)["shards"])
    damaged = [file for file in tqdm(verify_shards(root), total=total, desc="verifying", unit="shard") if file]
    if damaged:
        names = ", ".join(file.name for file in damaged)
        raise ElitError(
            f"{len(damaged)} of {total} shards of {root} are damaged or missing: {names}; delete them and "
            "run elit prepare encode again; it makes those anew"
        )
    Console(soft_wrap=True, highlight=False).print(f"{total} shards of {root} are as their index says")
