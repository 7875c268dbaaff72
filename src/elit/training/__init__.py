"""Training: configuration, the trainer, and its state on disk."""

from elit.training.config import ElasticConfig, ModelChoice, OptimizerConfig, RepaConfig, TrainConfig, ValidationConfig
from elit.training.report import StepReport
from elit.training.trainer import Trainer

__all__ = [
    "ElasticConfig",
    "ModelChoice",
    "OptimizerConfig",
    "RepaConfig",
    "StepReport",
    "TrainConfig",
    "Trainer",
    "ValidationConfig",
]
