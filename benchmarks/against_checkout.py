"""Did a change make a forward slower? This checkout against another one, in turns, in one process.

    git worktree add ../before main && python benchmarks/against_checkout.py ../before

Both models have the same weights. The ratio is the median over turns of (here / there): below 1 is faster here. Times
are processor time, which other work on the machine changes little; set OMP_NUM_THREADS=1, for it adds threads up.
"""

import statistics
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from jsonargparse import auto_cli

import elit


def imported_from(checkout: Path) -> ModuleType:
    """The ``elit`` of another checkout, beside the one that is imported already."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "elit"]:
        del sys.modules[name]
    sys.path.insert(0, str(checkout / "src"))
    import elit as other

    if not str(other.__file__).startswith(str(checkout.resolve())):
        raise SystemExit(f"{checkout} has no src/elit")
    return other


def new_model(library: Any, name: str) -> Any:
    torch.manual_seed(0)
    return library.create(name).eval()


@torch.inference_mode()
def compare(checkout: Path, model: str = "ELIT-DiT-B/2", batch_size: int = 2, turns: int = 20) -> None:
    """Print whether outputs are equal, and the ratio of times.

    Args:
        checkout: the other one.
        model: a named model.
        batch_size: images in a forward.
        turns: of one forward each.
    """
    models = [new_model(elit, model), new_model(imported_from(checkout), model)]
    x, t = models[0].example(batch_size)
    y = torch.zeros(batch_size, dtype=torch.long)
    here, there = (net(x, t, y) for net in models)
    print(f"bit-equal outputs: {torch.equal(here, there)}")
    ratios = []
    for turn in range(turns):
        seconds = [0.0, 0.0]
        for i in (0, 1) if turn % 2 else (1, 0):
            start = time.process_time()
            models[i](x, t, y)
            seconds[i] = time.process_time() - start
        ratios.append(seconds[0] / seconds[1])
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"{model}, processor time here / there: {middle:.3f}, quartiles {low:.3f} to {high:.3f}")


if __name__ == "__main__":
    auto_cli(compare)
