"""How good samples are."""

from elit.evaluation.classifier import Classifier, classify, train_classifier
from elit.evaluation.frechet import Moments, frechet_distance, moments
from elit.evaluation.held_out import held_out_loss, nearest_distance

__all__ = [
    "Classifier",
    "Moments",
    "classify",
    "frechet_distance",
    "held_out_loss",
    "moments",
    "nearest_distance",
    "train_classifier",
]
