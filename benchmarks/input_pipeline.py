"""Does training wait for its data? Measures the wait of the device in each step, with batches read ahead and without.

    python benchmarks/input_pipeline.py [--data LATENTS] [--batch_size 48] [--prefetch '[0, 2]']

It trains a small model and prints what `speed.jsonl` says of it. Without LATENTS (whatever `elit train --data` takes)
it writes two shards of random posteriors of 32x32 latents, in the format of `elit prepare encode`. Batch size and model
are chosen so that reading a batch takes about 8 ms and the rest of a step about 50 ms on one thread of a processor.
"""

import json
import tempfile
import time
from contextlib import closing
from pathlib import Path
from statistics import mean, median

import torch
from jsonargparse import auto_cli
from safetensors.torch import save_file

from elit.analysis.environment import environment
from elit.atomic import write_json
from elit.training import ElasticConfig, ModelChoice, TrainConfig, Trainer

EVERY = 10  # steps per line of the log
SHARD = 2048


def benchmark(
    data: str | None = None,
    batch_size: int = 48,
    width: int = 24,
    depth: int = 3,
    steps: int = 100,
    threads: int = 1,
    prefetch: list[int] = [0, 2],  # noqa: B006
) -> None:
    """Prints one row per number of batches that are read ahead.

    Args:
        data: what to train on; random latents unless given.
        batch_size: samples per step.
        width: of the model.
        depth: of the model, in blocks; the first and the last one are head and tail.
        steps: of each run; the first 10 are not counted.
        threads: of PyTorch; the thread that reads is one more.
        prefetch: how many batches are read ahead.
    """
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        data = data or str(random_latents(Path(folder) / "latents"))
        fields = {"width": width, "depth": depth, "num_heads": 2, "head_depth": 1, "tail_depth": 1}
        config = TrainConfig(
            data=data, model=ModelChoice("ELIT-DiT-S/4", fields), steps=steps, batch_size=batch_size,
            elit=ElasticConfig(min_mask_prob=0.0, max_mask_prob=0.0), log_every=EVERY, checkpoint_every=steps,
        )  # fmt: skip
        print(environment())
        rows = [(ahead, *measure(config, ahead, Path(folder) / f"run-{ahead}")) for ahead in prefetch]
    alone = max(row[1] for row in rows)
    print(f"batches of {batch_size}, read in {1000 * alone:.1f} ms each where nothing else runs")
    print("| batches read ahead | step, ms | of it waiting for data, ms | share |\n| ---: | ---: | ---: | ---: |")
    for ahead, _, step, wait in rows:
        print(f"| {ahead} | {1000 * step:.1f} | {1000 * step * wait:.2f} | {wait:.1%} |")


def measure(config: TrainConfig, prefetch: int, out: Path) -> tuple[float, float, float]:
    """Seconds to read a batch, while nothing else runs; seconds of a step; and the part of it that waits for data."""
    config.out, config.prefetch = str(out), prefetch
    trainer = Trainer(config)
    times: list[float] = []
    with closing(trainer.loader.batches(0, 0)) as batches:  # type: ignore[type-var]
        while prefetch == 0 and len(times) < EVERY:
            start = time.perf_counter()
            next(batches).result()
            times.append(time.perf_counter() - start)
    trainer.run_to_end()
    lines = [json.loads(line) for line in (out / "speed.jsonl").read_text().splitlines()][1:]
    seconds = mean(config.batch_size / line["images_per_second"] for line in lines)
    return median(times or [0.0]), seconds, mean(line["data_wait"] for line in lines)


def random_latents(folder: Path) -> Path:
    """Writes two shards of posteriors, as `elit prepare encode` does."""
    folder.mkdir()
    draws = torch.Generator().manual_seed(0)
    shards = []
    for i in range(2):
        mean, std = (torch.randn(SHARD, 4, 32, 32, generator=draws) for _ in range(2))
        labels = torch.randint(1000, (SHARD,), generator=draws)
        file = folder / f"shard-{i:05d}.safetensors"
        save_file({"mean": mean, "std": std.abs() / 10, "labels": labels}, file)
        shards.append({"file": file.name, "count": SHARD, "sha256": ""})
    index = {"shape": [4, 32, 32], "num_classes": 1000, "scaling_factor": 0.18215, "shift_factor": 0.0}
    write_json(folder / "index.json", index | {"shards": shards})
    return folder


if __name__ == "__main__":
    auto_cli(benchmark)
