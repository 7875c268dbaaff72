"""Paths, times, flows and the objective; solvers, guidance, trajectories and the sampler."""

from elit.flow.caching import Cache, embedding_changes
from elit.flow.guidance import Guidance, weak_level
from elit.flow.matching import Flow, FlowMatching, TrainingFlow
from elit.flow.objective import flow_matching_error, flow_matching_loss, per_token
from elit.flow.paths import PATHS, Path, path_named
from elit.flow.pyramid import PyramidFlow, StageDensity, StageSchedule, decompose, recompose
from elit.flow.sampler import StepInfo, sample, trajectories
from elit.flow.solvers import SOLVERS, Solver, time_grid
from elit.flow.times import TimeDensity
from elit.flow.trajectory import Evaluation, Trajectory, advance, evaluate, flow_of

__all__ = [
    "PATHS",
    "SOLVERS",
    "Cache",
    "Evaluation",
    "Flow",
    "FlowMatching",
    "Guidance",
    "Path",
    "PyramidFlow",
    "Solver",
    "StageDensity",
    "StageSchedule",
    "StepInfo",
    "TimeDensity",
    "TrainingFlow",
    "Trajectory",
    "advance",
    "decompose",
    "embedding_changes",
    "evaluate",
    "flow_matching_error",
    "flow_matching_loss",
    "flow_of",
    "path_named",
    "per_token",
    "recompose",
    "sample",
    "time_grid",
    "trajectories",
    "weak_level",
]
