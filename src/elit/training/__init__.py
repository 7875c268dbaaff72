"""Training: configuration, the trainer, and its state on disk."""

from elit.training.config import ElasticConfig, ModelChoice, OptimizerConfig, TrainConfig, ValidationConfig
from elit.training.trainer import StepReport, Trainer

__all__ = [
    "ElasticConfig",
    "ModelChoice",
    "OptimizerConfig",
    "StepReport",
    "TrainConfig",
    "Trainer",
    "ValidationConfig",
]
