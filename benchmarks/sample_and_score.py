"""Time and peak memory of sampling into a folder and scoring it, one process and one thread of PyTorch.

    python benchmarks/sample_and_score.py --model runs/digits --counts 1000 10000
    git worktree add ../before 8d1947a
    python benchmarks/sample_and_score.py --pixels 128 --counts 512 --other ../before

Each command runs alone. The classifier and the features of the reference are in the cache, those of samples are not.
Without a model, one of random weights is made: 6 blocks of width 96 on 16x16 tokens. Its images are noise, which is the
slowest to compress. With another checkout, both take turns, and the pixels and scores of both are compared.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

import elit

HERE = Path(__file__).parents[1]


def measure(checkout: Path, *arguments: str) -> tuple[float, float]:
    """Seconds and peak memory in MiB of one command of elit."""
    start = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(checkout / "src")}
    process = subprocess.Popen([sys.executable, "-m", "elit", *arguments], stdout=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"elit {' '.join(arguments)} failed")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def save_random(folder: Path, pixels: int) -> str:
    """Saves a model of random weights on RGB images of so many pixels a side, and returns where."""
    model = elit.create(
        "ELIT-DiT-S/1", resolution=pixels, downsample=1, in_channels=3, num_classes=10, patch_size=pixels // 16,
        depth=6, width=96, num_heads=3, head_depth=1, tail_depth=1,
    )  # fmt: skip
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=draws) / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="By default one of random weights.")
    parser.add_argument("--pixels", type=int, default=16, help="Of a side, for random weights: a multiple of 16.")
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 10000])
    parser.add_argument("--steps", default="10")
    parser.add_argument("--other", type=Path, help="Another checkout of this repository.")
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    checkouts = {"here": HERE} | ({"there": options.other.resolve()} if options.other else {})
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ELIT_CACHE"] = warm = str(Path(folder) / "warm")
        model = options.model or save_random(Path(folder) / "model", options.pixels)
        measure(HERE, "evaluate", "reference", "digits", f"{folder}/reference.npz", "--extractor", "digits")
        for count in map(str, options.counts):
            found: dict[str, list[tuple[float, ...]]] = {name: [] for name in checkouts}
            made = []
            for turn in range(options.repeats):
                for name, checkout in checkouts.items():
                    out, scores = f"{folder}/{count}-{turn}-{name}", f"{folder}/{count}-{turn}-{name}.json"
                    of_sampling = ("--num-images", count, "--steps", options.steps, "--budget", "0.25")
                    drawn = measure(checkout, "sample", "--model", model, "--out", out, *of_sampling)
                    of_scoring = ("--reference", "digits", "--extractor", "digits", "--out", scores)
                    os.environ["ELIT_CACHE"] = shutil.copytree(warm, f"{out}-cache")
                    scored = measure(checkout, "evaluate", "--samples", out, *of_scoring)
                    found[name].append((*drawn, *scored))
                    pictures = [Image.open(path).tobytes() for path in sorted(Path(out).glob("*.png"))]
                    made.append((pictures, json.loads(Path(scores).read_text())["scores"]))
            if any(each != made[0] for each in made):
                print(f"images or scores of {count} differ")
            rows += [(count, name, *map(statistics.median, zip(*runs, strict=True))) for name, runs in found.items()]
    print("| images | checkout | sampling, s | images/s | peak, MiB | scoring, s | peak, MiB |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    for count, name, seconds, peak, scoring, scoring_peak in rows:
        drawing = f"{seconds:.1f} | {int(count) / seconds:.0f} | {peak:.0f}"
        print(f"| {int(count):,} | {name} | {drawing} | {scoring:.1f} | {scoring_peak:.0f} |")


if __name__ == "__main__":
    main()
