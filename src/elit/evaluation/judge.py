"""Quality of samples: what a classifier of small data says of them, and how far they are from a reference."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elit.data import EMBEDDED, Data
from elit.data.pixels import to_uint8
from elit.errors import ElitError
from elit.evaluation.classifier import Classifier, classify
from elit.evaluation.extractors import Extractor
from elit.evaluation.features import CachedFeatures
from elit.evaluation.frechet import frechet_distance, frechet_influence, moments
from elit.evaluation.scores import open_reference

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
        """Judges images (M, C, H, W) that were asked for as labels (M,), as pictures show them: cut to [-1, 1]."""
        predicted, features = classify(self.classifier, images.clamp(-1, 1))
        accuracy = (predicted == labels).float().mean().item()
        return Quality(accuracy, frechet_distance(moments(features), self.real))


class FrechetJudge:
    """Measures how far samples are from a reference: the Frechet distance of the features of an extractor.

    Args:
        reference: what :func:`~elit.evaluation.open_reference` opens: images, an embedded data set or statistics.
        extractor: see :func:`~elit.evaluation.open_extractor`.
        decode: turns samples into images in [-1, 1]; None where they are images already.
        progress: show a bar while features of the reference are computed; they are kept in the cache.

    Attributes:
        name: of the distance, such as ``fid``.

    Raises:
        ElitError: a reference that cannot be read, or without statistics of these features.
    """

    def __init__(
        self,
        reference: str,
        extractor: Extractor,
        decode: Callable[[Tensor], Tensor] | None = None,
        progress: bool = False,
    ) -> None:
        self.extractor, self.decode = extractor, decode
        self.name, self.feature = next(iter(extractor.frechet.items()))
        self.reference = open_reference(reference, extractor)
        if self.feature in self.reference.moments:
            self.wanted = self.reference.moments[self.feature]
        elif self.reference.images is not None:
            features = CachedFeatures(self.reference.images, extractor)
            features.compute(progress=progress)
            self.wanted = features.moments(self.feature)
        else:
            raise ElitError(f"{reference} has no statistics for {self.name}; make it anew with elit evaluate reference")

    def features(self, samples: Tensor) -> Tensor:
        """Computes the features (B, F) of samples (B, C, H, W), from bytes as files hold them.

        Raises:
            ElitError: samples that are no images, or other features than the reference's.
        """
        images = samples if self.decode is None else self.decode(samples)
        if images.dim() != 4 or images.shape[1] not in (1, 3):
            raise ElitError(f"samples of shape {tuple(images.shape[1:])} are no images, so they cannot be judged")
        if self.extractor.name in EMBEDDED and self.reference.images is not None:
            known, size = self.reference.images.read(0, 1).shape[1:3], images.shape[2:]
            if known != size:  # its classifier knows no other
                raise ElitError(
                    f"samples have {size[0]}x{size[1]} pixels, and images of {self.reference.source} "
                    f"{known[0]}x{known[1]}; give a reference of the size of the samples"
                )
        pixels = to_uint8(images)
        found = self.extractor(pixels.expand(*pixels.shape[:-1], 3))[self.feature]
        if found.shape[1] != len(self.wanted.mean):
            raise ElitError(
                f"{self.reference.source} is of {len(self.wanted.mean)} features; {self.extractor.name} gives "
                f"{found.shape[1]}"
            )
        return found

    def score(self, features: Tensor) -> tuple[float, Tensor]:
        """Computes the distance of features (M, F), and the influence of each sample on it, (M,)."""
        features = features.to(self.extractor.device)
        influences = frechet_influence(features, self.wanted)
        return frechet_distance(moments(features), self.wanted), influences.cpu()

    def protocol(self) -> dict[str, Any]:
        """Returns what the distance depends on."""
        about = {"reference": self.reference.content, "reference_source": self.reference.source}
        return self.extractor.protocol() | about
