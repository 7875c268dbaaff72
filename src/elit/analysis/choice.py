"""Chooses the plan whose samples a judge likes best, by a race.

All candidates are sampled from the same noise and labels, so that their scores differ by what the plans do, not by
what the noise does. The race has rounds of a quarter, half and all of the samples. A candidate leaves it when its score
is worse than the best one by more than :data:`DROPPED` standard errors of the difference (Maron & Moore 1994 call this
racing). At the end, candidates within :data:`TIED` standard error of the best are taken for equally good, and the
simplest of them is chosen, as is usual in model selection (Breiman et al. 1984): one budget for all steps before
budgets that change, and then the one of least predicted error, the nearest to the full model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from elit.analysis.plan import Plan
from elit.conditions import Condition, map_condition
from elit.errors import ElitError
from elit.flow import sample
from elit.models import Model

FIRST_SEED = 10**12  # of the noise; experiments and measurements start below it
SEEDS = 10**9  # between two seeds of a choice
MIN_SAMPLES = 40  # of which a quarter is the first round
DROPPED, TIED = 3.0, 1.0  # standard errors


class SampleJudge(Protocol):
    """What samples are judged by, such as :class:`elit.evaluation.FrechetJudge`.

    Attributes:
        name: of the score.
    """

    name: str

    def features(self, samples: Tensor) -> Tensor:
        """Computes the features (B, F) of samples (B, C, H, W) in the model's space."""

    def score(self, features: Tensor) -> tuple[float, Tensor]:
        """Computes the score of features (M, F), where less is better, and the influence (M,) of each sample on it.

        An influence is the derivative of the score by the weight of a sample, so that ``influences.std() / M**0.5`` is
        the standard error of the score.
        """

    def protocol(self) -> dict[str, Any]:
        """Returns what the score depends on."""


@dataclass
class _Candidate:
    """One plan in the race, and what was found out about it."""

    name: str
    plan: Plan
    features: list[Tensor] = field(default_factory=list)
    samples: int = 0
    score: float = 0.0
    influences: Tensor = field(default_factory=lambda: torch.empty(0))
    above: float = 0.0
    standard_error: float = 0.0

    def row(self) -> dict[str, Any]:
        """Returns what the file of the chosen plan keeps."""
        kept = ("budgets", "guidance", "cache", "seconds", "flops", "error")
        plan = asdict(self.plan)
        return {
            "name": self.name,
            "samples": self.samples,
            "score": self.score,
            "above": self.above,
            "standard_error": self.standard_error,
            **{key: plan[key] for key in kept},
        }


def choose(
    model: Model,
    labels: Condition | Sequence[int] | None,
    plans: Mapping[str, Plan],
    judge: SampleJudge,
    *,
    num_samples: int = 1000,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> Plan:
    """Chooses the plan whose samples score best, and of equally good ones the simplest.

    Args:
        labels: what to sample, taken in turn, such as all classes; None for an unconditional model.
        plans: the candidates by name, such as :func:`~elit.analysis.plan.candidate_plans`.
        judge: what scores samples.
        num_samples: number of samples of each candidate that stays in the race.
        seed: another one draws other noise; no noise is that of ``elit.sample(seeds=range(...))``.
        batch_size: samples at a time.
        progress: show a bar of the FLOPs that are left, at most.

    Returns:
        The plan. Its ``choice`` has the protocol, the name of the chosen candidate and, best first, all candidates:
        their score, how far it is above the best one, the standard error of this difference, and of how many samples
        these are (fewer for those that left the race).

    Raises:
        ElitError: no candidates, too few samples, or samples that the judge cannot judge.
    """
    if not plans:
        raise ElitError("there are no plans to choose from")
    if num_samples < MIN_SAMPLES:
        raise ElitError(f"num_samples is {num_samples}; a choice by quality needs at least {MIN_SAMPLES}")
    racing = every = [_Candidate(name, plan) for name, plan in plans.items()]
    total = sum(each.plan.flops for each in every) * num_samples
    with tqdm(
        total=total, desc="choosing", unit="FLOP", unit_scale=True, dynamic_ncols=True, disable=not progress
    ) as bar:
        for count in (num_samples // 4, num_samples // 2, num_samples):
            for each in racing:
                for start in range(each.samples, count, batch_size):
                    indices = range(start, min(start + batch_size, count))
                    each.features.append(judge.features(_draw(model, labels, each.plan, indices, seed)))
                    bar.update(each.plan.flops * len(indices))
                each.samples = count
            _compare(racing, judge)
            racing = [each for each in racing if each.above <= DROPPED * each.standard_error]
            bar.total = bar.n + sum(each.plan.flops * (num_samples - count) for each in racing)
            bar.refresh()
    tied = [each for each in racing if each.above <= TIED * each.standard_error]
    chosen = min(tied, key=lambda each: (len(set(each.plan.budgets)) > 1, each.plan.error))
    order = sorted(every, key=lambda each: (-each.samples, each.score))
    choice = {
        "score": judge.name,
        "chosen": chosen.name,
        "num_samples": num_samples,
        "seed": seed,
        "protocol": judge.protocol(),
        "candidates": [each.row() for each in order],
    }
    return replace(chosen.plan, choice=choice)


def _draw(
    model: Model, labels: Condition | Sequence[int] | None, plan: Plan, indices: Sequence[int], seed: int
) -> Tensor:
    """Draws the samples of these indices: the same noise and labels for every plan."""
    condition = None
    if labels is not None:
        at = torch.tensor(indices)
        condition = map_condition(lambda v: v[at.to(v.device) % len(v)], model.as_condition(labels))
    seeds = [FIRST_SEED + seed * SEEDS + index for index in indices]
    return sample(model, condition, seeds=seeds, batch_size=len(indices), **plan.arguments())


def _compare(racing: Sequence[_Candidate], judge: SampleJudge) -> None:
    """Scores the candidates, and measures how far each is above the best one, with the standard error of that."""
    for each in racing:
        each.features = [torch.cat(each.features)]
        each.score, each.influences = judge.score(each.features[0])
    best = min(racing, key=lambda each: each.score)
    for each in racing:
        each.above = each.score - best.score
        each.standard_error = ((each.influences - best.influences).std() / each.samples**0.5).item()
