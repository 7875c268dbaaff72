"""Clips: a folder of videos as a data set, and videos on disk.

A video is a file (``.mp4``, ``.webm``, ..., through imageio and PyAV; ``.gif`` through Pillow) or a folder of frames in
the order of their names. Shapes: C channels, T frames, H x W pixels.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from elit.data.dataset import StagedData
from elit.data.pixels import from_uint8
from elit.data.sources import CAPTIONS, Source, captions_of
from elit.errors import ElitError

VIDEOS = (".avi", ".gif", ".mkv", ".mov", ".mp4", ".webm")
FRAMES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
READERS = 8  # threads; decoders run outside of the interpreter's lock
Resampling = Image.Resampling


class ClipFolder(StagedData):
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
        self.folder = folder = Path(folder)
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
    def source(self) -> Source:
        """The videos and what is known of them, as of images."""
        names = [video.relative_to(self.folder).as_posix() for video in self.videos]
        labels = self.labels.tolist() if self.classes else None
        return Source(self.folder, names, labels, self.classes or None, self.captions)

    @property
    def shape(self) -> tuple[int, ...]:
        return (3, self.frames, *self.size)

    def __len__(self) -> int:
        return len(self.videos)

    def read(self, indices: Tensor, seed: int | None = None) -> tuple[Tensor, Tensor]:
        """Reads clips as bytes (B, 3, T, H, W), several at a time, and labels (B,)."""
        return torch.stack(list(self._threads.map(self.item, indices.tolist()))), self.labels[indices]

    def finish(self, raw: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Returns clips (B, 3, T, H, W) in [-1, 1] and labels (B,)."""
        pixels, labels = raw
        return from_uint8(pixels), labels

    def item(self, index: int) -> Tensor:
        """Reads the clip of one video as bytes (3, T, H, W). Frames before and after it are not decoded, where the
        format allows that."""
        video = self.videos[index]

        def middle(count: int) -> range:
            needed = (self.frames - 1) * self.stride + 1
            if count < needed:
                raise ElitError(f"{video} has {count} frames, and a clip of {self.frames} needs {needed}")
            start = (count - needed) // 2
            return range(start, start + needed, self.stride)

        height, width = self.size
        fitted = [ImageOps.fit(image, (width, height), Resampling.BICUBIC) for image in read_video(video, middle)]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in fitted]))  # (T, H, W, 3)
        return pixels.permute(3, 0, 1, 2).contiguous()

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(READERS)


def _videos_in(folder: Path) -> list[Path]:
    """Lists video files and folders of frames directly in a folder, by name."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in VIDEOS or _frames_in(path))


def _frames_in(folder: Path) -> list[Path]:
    """Lists the frames directly in a folder, by name; none where it is no folder."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in FRAMES) if folder.is_dir() else []


Choice = Callable[[int], range]
"""Which frames to read of a video that has so many, in ascending order."""


def read_video(path: Path, choose: Choice = range) -> list[Image.Image]:
    """Reads frames of a video, in RGB: those that ``choose`` names when it is told their number, by default all.

    Raises:
        ElitError: it cannot be read, or imageio is missing.
    """
    try:
        if path.is_dir():
            files = _frames_in(path)
            return [Image.open(files[i]).convert("RGB") for i in choose(len(files))]
        if path.suffix.lower() == ".gif":
            with Image.open(path) as video:
                return [_frame_of(video, i) for i in choose(getattr(video, "n_frames", 1))]
    except (OSError, EOFError, UnidentifiedImageError) as error:
        raise ElitError(f"{path} cannot be read as a video ({error})") from error
    _import_imageio()
    try:
        return _decode(path, choose)
    except ElitError:
        raise
    except Exception as error:  # PyAV has many kinds
        raise ElitError(f"{path} cannot be read as a video ({error})") from error


def _frame_of(video: Image.Image, index: int) -> Image.Image:
    video.seek(index)
    return video.convert("RGB")


def _decode(path: Path, choose: Choice) -> list[Image.Image]:
    """Decodes the chosen frames of a video, from the key frame before the first of them to the last.

    The packets of the file, which are read and not decoded, say how many frames there are and when each is shown. Where
    they do not (there are formats without times), all frames are decoded.
    """
    import av

    with av.open(str(path)) as video:
        stream = video.streams.video[0]
        times = [packet.pts for packet in video.demux(stream) if packet.size]
        shown = sorted(time for time in times if time is not None)
        if len(shown) == len(times) == len(set(times)):
            wanted = [shown[i] for i in choose(len(shown))]
            video.seek(wanted[0], stream=stream)
            found = _decode_until(video, stream, wanted)
            if len(found) == len(wanted):
                return found
        video.seek(0, stream=stream)
        frames = [frame.to_image() for frame in video.decode(stream)]
        return [frames[i] for i in choose(len(frames))]


def _decode_until(video: Any, stream: Any, wanted: list[int]) -> list[Image.Image]:
    """Decodes from where a video stands, and returns the frames of the wanted times, ascending."""
    found = []
    for frame in video.decode(stream):
        if frame.pts in wanted:
            found.append(frame.to_image())
        if frame.pts is not None and frame.pts >= wanted[-1]:
            break
    return found


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
