"""Time and peak memory of sampling and scoring at the embedded resolution, one process and one thread.

    python benchmarks/sample_and_score.py --model runs/quickstart/run --counts 1000 10000

Each command runs alone. The classifier and the features of the reference are in the cache, those of samples are not.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def measure(*arguments: str) -> tuple[float, float]:
    """Seconds and peak memory in MiB of one command of elit."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "elit", *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"elit {' '.join(arguments)} failed")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 10000])
    parser.add_argument("--steps", default="10")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ELIT_CACHE"] = str(Path(folder) / "cache")
        measure("evaluate", "reference", "digits", f"{folder}/reference.npz", "--extractor", "digits")
        for count in map(str, options.counts):
            out, steps = f"{folder}/{count}", ("--steps", options.steps)
            drawn = measure(
                *("sample", "--model", options.model, "--out", out, "--num-images", count, *steps), "--budget", "0.25"
            )
            scores = f"{folder}/scores.json"
            scored = measure(
                *("evaluate", "--samples", out, "--reference", "digits", "--extractor", "digits"), "--out", scores
            )
            rows.append((count, *drawn, *scored))
    print("| images | sampling, s | images/s | peak, MiB | scoring, s | peak, MiB |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for count, seconds, peak, scoring, scoring_peak in rows:
        speed = int(count) / seconds
        print(f"| {int(count):,} | {seconds:.0f} | {speed:.0f} | {peak:.0f} | {scoring:.0f} | {scoring_peak:.0f} |")


if __name__ == "__main__":
    main()
