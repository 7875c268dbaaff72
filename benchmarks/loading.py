"""Time and peak memory of loading a model, here and in another checkout, each in processes of their own.

    git worktree add ../before 8d1947a
    OMP_NUM_THREADS=1 python benchmarks/loading.py --other ../before

Memory is the largest resident size of the process beyond that after the imports. A first forward of one sample comes
after loading, because weights that are mapped are only read where they are used.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import elit

CHILD = """
import sys, time
import torch, elit

def peak():  # in MiB; that of resource.getrusage would be at least the size of the parent
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024

before, start = peak(), time.perf_counter()
model = elit.load(sys.argv[1])
loaded, memory = time.perf_counter() - start, peak() - before
with torch.inference_mode():
    model(torch.zeros(1, *model.input_shape()), torch.ones(1), torch.zeros(1, dtype=torch.long))
print(loaded, memory, time.perf_counter() - start, peak() - before)
"""


def load_in(checkout: Path, folder: str) -> list[float]:
    """Loads a model in a process of its own: seconds and MiB of loading, and both with a first forward."""
    environment = os.environ | {"PYTHONPATH": str(checkout / "src")}
    child = subprocess.run([sys.executable, "-c", CHILD, folder], env=environment, capture_output=True, text=True)
    if child.returncode:
        sys.exit(child.stderr)
    return [float(number) for number in child.stdout.split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ELIT-DiT-B/2")
    parser.add_argument("--other", type=Path, help="Another checkout of this repository.")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    checkouts = {"here": Path(__file__).parents[1]} | ({"there": options.other.resolve()} if options.other else {})
    with tempfile.TemporaryDirectory() as folder:
        model = elit.create(options.model)
        model.save_pretrained(folder)
        size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
        found = {name: [load_in(path, folder) for _ in range(options.repeats)] for name, path in checkouts.items()}
    print(f"{options.model}, {size:.0f} MiB of weights; medians of {options.repeats}\n")
    print("| checkout | loading, s | peak, MiB | with a first forward, s | peak, MiB |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, runs in found.items():
        loaded, memory, ran, peak = (statistics.median(numbers) for numbers in zip(*runs, strict=True))
        print(f"| {name} | {loaded:.2f} | {memory:.0f} | {ran:.2f} | {peak:.0f} |")


if __name__ == "__main__":
    main()
