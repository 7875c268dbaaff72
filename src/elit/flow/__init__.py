"""Paths, times, the objective; solvers, guidance and the sampler."""

from elit.flow.guidance import Guidance
from elit.flow.objective import flow_matching_error, flow_matching_loss, per_token
from elit.flow.paths import PATHS, Path, path_named
from elit.flow.pyramid import StageDensity, StageSchedule, decompose, pyramid_loss, recompose
from elit.flow.sampler import sample
from elit.flow.solvers import SOLVERS, StepInfo, time_grid
from elit.flow.times import TimeDensity

__all__ = [
    "PATHS",
    "SOLVERS",
    "Guidance",
    "Path",
    "StageDensity",
    "StageSchedule",
    "StepInfo",
    "TimeDensity",
    "decompose",
    "flow_matching_error",
    "flow_matching_loss",
    "path_named",
    "per_token",
    "pyramid_loss",
    "recompose",
    "sample",
    "time_grid",
]
