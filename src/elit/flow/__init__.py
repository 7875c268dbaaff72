"""Paths, times, the objective; solvers, guidance and the sampler."""

from elit.flow.guidance import Guidance
from elit.flow.objective import flow_matching_error, flow_matching_loss, per_token
from elit.flow.paths import PATHS, Path, path_named
from elit.flow.sampler import sample
from elit.flow.solvers import SOLVERS, StepInfo, time_grid
from elit.flow.times import TimeDensity

__all__ = [
    "PATHS",
    "SOLVERS",
    "Guidance",
    "Path",
    "StepInfo",
    "TimeDensity",
    "flow_matching_error",
    "flow_matching_loss",
    "path_named",
    "per_token",
    "sample",
    "time_grid",
]
