"""Measures how good samples are."""

from elit.evaluation.classifier import Classifier, classify, train_classifier
from elit.evaluation.extractors import Extractor, open_extractor
from elit.evaluation.features import CachedFeatures
from elit.evaluation.frechet import Moments, frechet_distance, frechet_influence, moments
from elit.evaluation.held_out import BudgetLoss, held_out_loss, losses_by_budget, nearest_distance
from elit.evaluation.image_set import ImageSet, open_image_set
from elit.evaluation.judge import FrechetJudge, Judge, Quality
from elit.evaluation.metrics import inception_score, kernel_distance, precision_recall
from elit.evaluation.scores import open_reference, save_reference, score
from elit.evaluation.statistics import RunningMoments

__all__ = [
    "BudgetLoss",
    "CachedFeatures",
    "Classifier",
    "Extractor",
    "FrechetJudge",
    "ImageSet",
    "Judge",
    "Moments",
    "Quality",
    "RunningMoments",
    "classify",
    "frechet_distance",
    "frechet_influence",
    "held_out_loss",
    "inception_score",
    "kernel_distance",
    "losses_by_budget",
    "moments",
    "nearest_distance",
    "open_extractor",
    "open_image_set",
    "open_reference",
    "precision_recall",
    "save_reference",
    "score",
    "train_classifier",
]
