"""Training: configuration, the trainer, and its state on disk."""

from elit.training.config import ModelChoice, OptimizerConfig, TrainConfig
from elit.training.trainer import StepReport, Trainer

__all__ = ["ModelChoice", "OptimizerConfig", "StepReport", "TrainConfig", "Trainer"]
