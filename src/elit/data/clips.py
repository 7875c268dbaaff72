"""Clips: a folder of videos as a data set, and videos on disk.

A video is a file (``.mp4``, ``.webm``, ..., through imageio and PyAV; ``.gif`` through Pillow) or a folder of frames in
the order of their names. Shapes: C channels, T frames, H x W pixels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError
from torch import Tensor

from elit.data.pixels import from_uint8
from elit.data.sources import CAPTIONS, captions_of
from elit.errors import ElitError

VIDEOS = (".avi", ".gif", ".mkv", ".mov", ".mp4", ".webm")
FRAMES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


class ClipFolder:
    """A folder of videos as clips, one of each video: its middle frames, cropped to their middle and scaled.

    With videos in subfolders, those are the classes, in the order of their names; with videos in the folder itself
    there are none. A ``metadata.jsonl`` as of images gives captions instead. Clips are read when a batch wants them.

    Args:
        folder: where the videos are.
        frames: T.
        size: pixels of a side, or (height, width).
        stride: frames from one that is taken to the next.

    Attributes:
        videos: paths of the videos, in the order of the indices.
        classes: names of the classes.
        captions: one per video, where there are any.

    Raises:
        ElitError: no videos there, captions that do not fit them, or a number below 1. A batch raises it for a video
            that cannot be read, or is too short.
    """

    def __init__(self, folder: str | Path, frames: int, size: int | tuple[int, int], stride: int = 1) -> None:
        self.frames, self.stride = frames, stride
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        if min(frames, stride, *self.size) < 1:
            raise ElitError(f"frames, stride and size must be at least 1, not {frames}, {stride} and {size}")
        folder = Path(folder)
        if not folder.is_dir():
            raise ElitError(f"there is no folder {folder}")
        self.videos = _videos_in(folder)
        self.classes: list[str] = []
        self.labels = torch.zeros(len(self.videos), dtype=torch.long)
        if not self.videos:
            self.classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and _videos_in(path))
            by_class = [_videos_in(folder / name) for name in self.classes]
            self.videos = [video for videos in by_class for video in videos]
            self.labels = torch.tensor([label for label, videos in enumerate(by_class) for _ in videos])
        if not self.videos:
            raise ElitError(f"{folder} holds no videos: give files ({', '.join(VIDEOS)}) or folders of frames")
        self.captions: list[str] | None = None
        if (folder / CAPTIONS).exists():
            names = [video.relative_to(folder).as_posix() for video in self.videos]
            self.captions = captions_of(names, (folder / CAPTIONS).read_bytes(), folder / CAPTIONS)
            self.classes, self.labels = [], torch.zeros(len(self.videos), dtype=torch.long)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def shape(self) -> tuple[int, ...]:
        return (3, self.frames, *self.size)

    def __len__(self) -> int:
        return len(self.videos)

    def batch(self, indices: Tensor, seed: int | None = None) -> tuple[Tensor, Tensor]:
        """Returns clips (B, 3, T, H, W) in [-1, 1] and labels (B,) at indices (B,)."""
        return torch.stack([self.clip(self.videos[i]) for i in indices.tolist()]), self.labels[indices]

    def clip(self, video: Path) -> Tensor:
        """Reads the clip of one video, (3, T, H, W) in [-1, 1]."""
        images = read_video(video)
        needed = (self.frames - 1) * self.stride + 1
        if len(images) < needed:
            raise ElitError(f"{video} has {len(images)} frames, and a clip of {self.frames} needs {needed}")
        start, (height, width) = (len(images) - needed) // 2, self.size
        taken = images[start : start + needed : self.stride]
        fitted = [ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC) for image in taken]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in fitted]))  # (T, H, W, 3)
        return from_uint8(pixels.permute(3, 0, 1, 2))


def _videos_in(folder: Path) -> list[Path]:
    """Lists video files and folders of frames directly in a folder, by name."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in VIDEOS or _frames_in(path))


def _frames_in(folder: Path) -> list[Path]:
    """Lists the frames directly in a folder, by name; none where it is no folder."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in FRAMES) if folder.is_dir() else []


def read_video(path: Path) -> list[Image.Image]:
    """Reads all frames of a video, in RGB.

    Raises:
        ElitError: it cannot be read, or imageio is missing.
    """
    try:
        if path.is_dir():
            return [Image.open(frame).convert("RGB") for frame in _frames_in(path)]
        if path.suffix.lower() == ".gif":
            with Image.open(path) as video:
                return [frame.convert("RGB") for frame in ImageSequence.Iterator(video)]
    except (OSError, UnidentifiedImageError) as error:
        raise ElitError(f"{path} cannot be read as a video ({error})") from error
    imageio = _import_imageio()
    try:
        return [Image.fromarray(frame).convert("RGB") for frame in imageio.imiter(path, plugin="pyav")]
    except Exception as error:  # PyAV has many kinds
        raise ElitError(f"{path} cannot be read as a video ({error})") from error


def write_video(frames: Sequence[Image.Image], path: Path, fps: int = 8) -> None:
    """Writes frames as an endless ``.gif``, or as an ``.mp4``, whose codec wants sides cropped to even numbers.

    Raises:
        ElitError: imageio is missing for an ``.mp4``.
    """
    first, *others = frames
    if path.suffix.lower() == ".gif":
        first.save(path, save_all=True, append_images=others, duration=round(1000 / fps), loop=0)
        return
    width, height = first.width // 2 * 2, first.height // 2 * 2
    pixels = np.stack([np.asarray(frame.convert("RGB"))[:height, :width] for frame in frames])
    _import_imageio().imwrite(path, pixels, plugin="pyav", codec="libx264", fps=fps)


def _import_imageio() -> Any:
    try:
        import av  # noqa: F401
        import imageio.v3
    except ImportError as error:
        raise ElitError(f"videos other than .gif need {error.name}: pip install 'elit-diffusion[video]'") from error
    return imageio.v3
