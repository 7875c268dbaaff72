"""Generated image files of varied size, format and mode."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

MODES = ("RGB", "L", "RGBA", "P", "CMYK", "exif")


def smooth(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A random RGB picture without fine grain."""
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def encoded(rng: np.random.Generator, mode: str) -> tuple[bytes, str]:
    """The bytes of a picture of a mode, and its suffix."""
    width, height = (int(side) for side in rng.integers(10, 70, 2))
    image = smooth(rng, width, height)
    kind, options = {"L": ("PNG", {}), "RGBA": ("PNG", {}), "P": ("PNG", {})}.get(mode, ("JPEG", {"quality": 95}))
    if mode == "exif":
        exif = Image.Exif()
        exif[0x0112] = int(rng.integers(1, 9))
        options = {"quality": 95, "exif": exif}
    elif mode == "RGBA":
        image.putalpha(smooth(rng, width, height).convert("L"))
    elif mode != "RGB":
        image = image.convert(mode)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue(), {"PNG": ".png", "JPEG": ".JPEG"}[kind]


def write_pictures(root: Path, count: int, classes: int = 3) -> list[str]:
    """``count`` pictures in class folders, three of them corrupt, whose names it gives."""
    rng = np.random.default_rng(0)
    for i in range(count):
        data, suffix = encoded(rng, MODES[i % len(MODES)])
        file = root / f"n{i % classes:02d}" / f"picture{i:04d}{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    files = sorted(root.rglob("*.*"))
    truncated, empty, text = files[3], files[len(files) // 2], files[-2]
    truncated.write_bytes(truncated.read_bytes()[:100])
    empty.write_bytes(b"")
    text.write_text("not an image")
    return [file.relative_to(root).as_posix() for file in (truncated, empty, text)]
