"""What half precision does to samples: their distance to float32 ones, and what a classifier says of both.

    python benchmarks/precision.py MODEL [--data digits] [--device cpu] [--precision bf16] [--samples N] [--steps S]

MODEL is a run of `elit train` on the data set, for example that of `elit quickstart`. Samples start from the same noise
and take Euler steps; the distance is the root mean square over pixels in [-1, 1].
"""

import torch
from jsonargparse import auto_cli
from torch import Tensor

from elit.analysis.environment import environment
from elit.commands.budgets import halved_budgets
from elit.commands.options import ModelOptions
from elit.data import open_data
from elit.evaluation import Judge, train_classifier
from elit.flow import sample
from elit.launch import Precision, default_device
from elit.models.files import load


def benchmark(
    model: str,
    data: str = "digits",
    device: str = "auto",
    precision: Precision = "bf16",
    samples: int = 1000,
    steps: int = 20,
) -> None:
    """Prints a row for each budget.

    Args:
        model: a run directory or a saved model.
        data: the labelled data set that it was trained on.
        device: auto takes a GPU where there is one.
        precision: what is compared with fp32.
        samples: number of samples of a row, of all classes in turn.
        steps: number of Euler steps.
    """
    print(environment())
    place = default_device(device)
    train = open_data(data)
    judge = Judge(train_classifier(train), train)
    labels = torch.arange(samples) % train.num_classes
    budgets = halved_budgets(load(model))

    def draw(precision: Precision) -> list[Tensor]:
        net = ModelOptions(model=model, precision=precision).load_model(place)
        return [
            sample(net, labels, seeds=range(samples), steps=steps, budget=budget, batch_size=250).float().cpu()
            for budget in budgets
        ]

    exact, rounded = draw("fp32"), draw(precision)
    print(f"| budget | RMS distance | accuracy fp32 | {precision} | Frechet distance fp32 | {precision} |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for budget, a, b in zip(budgets, exact, rounded, strict=True):
        first, second = judge(a, labels), judge(b, labels)
        print(
            f"| {budget:g} | {(a - b).square().mean().sqrt():.4f} | {first.accuracy:.1%} | {second.accuracy:.1%} | "
            f"{first.frechet_distance:.2f} | {second.frechet_distance:.2f} |"
        )


if __name__ == "__main__":
    auto_cli(benchmark)
