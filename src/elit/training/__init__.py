"""Training: configuration, the trainer, and its state on disk."""

from elit.training.config import ElasticConfig, ModelChoice, OptimizerConfig, RepaConfig, TrainConfig, ValidationConfig
from elit.training.trainer import StepReport, Trainer

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
