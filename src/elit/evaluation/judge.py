"""Quality of samples on small data: what a classifier of the real images says of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from elit.data import Data
from elit.errors import ElitError
from elit.evaluation.classifier import Classifier, classify
from elit.evaluation.frechet import frechet_distance, moments

BATCH = 5120  # images of a data set at a time


@dataclass(frozen=True)
class Quality:
    """The quality of samples, or of real images beside them.

    Attributes:
        accuracy: share of them that the classifier takes for what was asked.
        frechet_distance: of their features from those of all training images.
    """

    accuracy: float
    frechet_distance: float


class Judge:
    """``judge(images, labels)``: quality beside the training images of a labelled data set.

    Args:
        classifier: of that data set, see :func:`~elit.evaluation.train_classifier`.
        data: its training part.

    Raises:
        ElitError: data without classes.
    """

    def __init__(self, classifier: Classifier, data: Data) -> None:
        if not data.num_classes:
            raise ElitError("the data have no classes, so no classifier can judge samples of them")
        self.classifier = classifier
        parts = torch.arange(len(data)).split(BATCH)
        self.real = moments(torch.cat([classify(classifier, data.batch(part)[0])[1] for part in parts]))

    def __call__(self, images: Tensor, labels: Tensor) -> Quality:
        """Judges images (M, C, H, W) that were asked for as labels (M,)."""
        predicted, features = classify(self.classifier, images)
        accuracy = (predicted == labels).float().mean().item()
        return Quality(accuracy, frechet_distance(moments(features), self.real))
