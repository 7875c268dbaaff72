"""Time and peak memory of precision and recall on features of the size of Inception's, one thread by default.

    python benchmarks/knn.py --samples 50000 --reference 10000

Features are random: neither time nor memory depends on what they are.
"""

import resource
import time

import torch
from jsonargparse import auto_cli

from elit.analysis.environment import environment
from elit.evaluation import precision_recall
from elit.seeding import generator, normal


def benchmark(samples: int = 50_000, reference: int = 10_000, features: int = 2048, threads: int = 1) -> None:
    """Prints one row of a table.

    Args:
        samples: rows of one side.
        reference: rows of the other.
        features: numbers of a row.
        threads: of the processor.
    """
    torch.set_num_threads(threads)
    ours, theirs = (normal(generator("knn", n), (n, features)) for n in (samples, reference))
    before, start = peak(), time.perf_counter()
    precision_recall(ours, theirs)
    seconds = time.perf_counter() - start
    print(environment())
    print("| samples | reference | features | threads | seconds | peak before, MiB | peak, MiB |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    print(f"| {samples:,} | {reference:,} | {features} | {threads} | {seconds:.0f} | {before:.0f} | {peak():.0f} |")


def peak() -> float:
    """Of this process so far, in MiB (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    auto_cli(benchmark)
