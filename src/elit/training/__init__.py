"""Training: configuration, the trainer, and its state on disk."""

from elit.training.config import (
    ElasticConfig,
    HeldOutConfig,
    ModelChoice,
    OptimizerConfig,
    RepaConfig,
    RunConfig,
    TrainConfig,
    ValidationConfig,
)
from elit.training.report import StepReport
from elit.training.trainer import Trainer

__all__ = [
    "ElasticConfig",
    "HeldOutConfig",
    "ModelChoice",
    "OptimizerConfig",
    "RepaConfig",
    "RunConfig",
    "StepReport",
    "TrainConfig",
    "Trainer",
    "ValidationConfig",
]
