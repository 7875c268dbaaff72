"""What a training step waits for its batch: milliseconds of reading data at random places.

    python benchmarks/reading.py DATA [DATA ...] [--batch_size 256] [--batches 20]

DATA is whatever `elit train --data` takes. The files are in the cache of the system after the first epoch.
"""

import time
from statistics import median

import torch
from jsonargparse import auto_cli

from elit.analysis.environment import environment
from elit.data import Data, open_data, sample_indices
from elit.seeding import derive_seed


def benchmark(data: list[str], batch_size: int = 256, batches: int = 20, threads: int = 1) -> None:
    """Prints one row per data set.

    Args:
        data: names, folders or URLs.
        batch_size: images at a time.
        batches: that are timed, after a first one.
        threads: of PyTorch; an image folder decodes in eight of its own.
    """
    torch.set_num_threads(threads)
    print(environment())
    print("| data | sample | ms per batch | of the processor | images/s |\n| --- | --- | ---: | ---: | ---: |")
    for name in data:
        source = open_data(name)
        waited, worked = times_of_a_batch(source, batch_size, batches)
        row = f"{1000 * waited:.1f} | {1000 * worked:.1f} | {batch_size / waited:,.0f}"
        print(f"| {name} | {source.shape} | {row} |")


def times_of_a_batch(data: Data, batch_size: int, batches: int) -> tuple[float, float]:
    """Median seconds of a batch as the trainer asks for it: on the clock, and of all threads on the processor."""
    waited, worked = [], []
    for step in range(batches + 1):
        start, before = time.perf_counter(), time.process_time()
        data.batch(sample_indices(0, step * batch_size, batch_size, len(data)), derive_seed(0, "data", step))
        waited.append(time.perf_counter() - start)
        worked.append(time.process_time() - before)
    return median(waited[1:]), median(worked[1:])


if __name__ == "__main__":
    auto_cli(benchmark, as_positional=False)
