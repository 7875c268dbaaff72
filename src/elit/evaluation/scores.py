"""Computes scores from features, with the protocol that made them, and says whether two results can be compared."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from elit import __version__
from elit.atomic import atomic_file
from elit.errors import ElitError
from elit.evaluation.extractors import Extractor
from elit.evaluation.features import CachedFeatures
from elit.evaluation.frechet import Moments, frechet_distance
from elit.evaluation.image_set import ImageSet, open_image_set
from elit.evaluation.metrics import (
    KID_SEED,
    KID_SUBSET_SIZE,
    KID_SUBSETS,
    NEIGHBOURS,
    SPLIT,
    inception_score,
    kernel_distance,
    precision_recall,
)

KEYS = ("mu", "sigma"), ("mu_s", "sigma_s")  # of the ADM suite, for the first and second Frechet distance
DEFINITIONS = {
    "is_split": SPLIT,
    "neighbours": NEIGHBOURS,
    "kid": [KID_SUBSETS, KID_SUBSET_SIZE, KID_SEED],
    "covariance": "M - 1",
}
COMPARED = {  # what two results must have in common, and how to say it
    "extractor": "the extractor",
    "weights": "the weights of the extractor",
    "resize": "the resizing",
    "precision": "the precision of features",
    "reference": "the reference",
    "samples": "the number of samples",
    "definitions": "the definition of the scores",
}


class Reference(NamedTuple):
    """What samples are compared with: saved moments by feature, images, or both."""

    source: str
    content: str
    moments: dict[str, Moments]
    images: ImageSet | None


def open_reference(source: str | Path, extractor: Extractor) -> Reference:
    """Opens a reference: an ADM-style ``.npz`` with ``mu``, ``sigma``, ``mu_s``, ``sigma_s`` and/or ``arr_0``, or what
    :func:`~elit.evaluation.image_set.open_image_set` takes.

    Raises:
        ElitError: nothing usable, or statistics of another extractor.
    """
    path = Path(source)
    if not (path.is_file() and path.suffix == ".npz"):
        pictures = open_image_set(source)
        return Reference(str(source), pictures.content, {}, pictures)
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = {name: archive[name] for name in archive.files if name not in ("arr_0", "arr_1")}
            has_images = "arr_0" in archive.files
    except Exception as error:  # numpy and zipfile raise several kinds
        raise ElitError(f"{path} is damaged or no .npz file ({error})") from error
    saved = _check_protocol(path, found, extractor)
    moments = {}
    for name, (mean, covariance) in zip(extractor.frechet.values(), KEYS, strict=False):
        if mean in found and covariance in found:
            mu, sigma = (torch.from_numpy(np.asarray(found[key], dtype=np.float64)) for key in (mean, covariance))
            if mu.dim() != 1 or sigma.shape != (len(mu), len(mu)):
                raise ElitError(f"{path}: {mean} and {covariance} have shapes {tuple(mu.shape)}, {tuple(sigma.shape)}")
            if not (mu.isfinite().all() and sigma.isfinite().all()):
                raise ElitError(f"{path}: {mean} or {covariance} holds numbers that are not finite; make it anew")
            moments[name] = Moments(mu, sigma)
    if not moments and not has_images:
        raise ElitError(f"{path} is no reference: it has neither mu and sigma nor arr_0")
    if "content" in saved:  # the images that our statistics are of
        return Reference(str(source), saved["content"], moments, None)
    digest = hashlib.sha256()
    for name in sorted(found):
        digest.update(name.encode() + np.ascontiguousarray(found[name]).tobytes())
    images = open_image_set(path) if has_images else None
    digest.update((images.content if images else "").encode())
    return Reference(str(source), digest.hexdigest()[:16], moments, images)


def _check_protocol(path: Path, found: dict[str, np.ndarray], extractor: Extractor) -> dict[str, Any]:
    """Returns the protocol of statistics, and refuses those of another extractor; none at all means Inception."""
    if "protocol" not in found:
        if extractor.name != "inception" and "mu" in found:
            raise ElitError(f"{path} does not say of which features it is, so it is taken for Inception's only")
        return {}
    try:
        saved: dict[str, Any] = dict(json.loads(str(found["protocol"])))
    except (ValueError, TypeError) as error:
        raise ElitError(f"{path} has a damaged protocol; write it again with elit evaluate reference") from error
    for key, value in extractor.protocol().items():
        if key != "device" and saved.get(key) != value:  # on another device features differ by rounding alone
            raise ElitError(
                f"{path} holds statistics with {key} {saved.get(key)!r}, not {value!r}; write it again with elit "
                "evaluate reference"
            )
    return saved


def save_reference(features: CachedFeatures, out: Path) -> None:
    """Writes the moments of all images as ``.npz``, in the layout of the ADM suite, with the protocol.

    Raises:
        ElitError: it cannot be written.
    """
    about = {**features.extractor.protocol(), "count": features.images.count, "content": features.images.content}
    arrays: dict[str, Any] = {"protocol": np.array(json.dumps(about))}
    for name, (mean, covariance) in zip(features.extractor.frechet.values(), KEYS, strict=False):
        found = features.moments(name)
        arrays |= {mean: found.mean.cpu().numpy(), covariance: found.covariance.cpu().numpy()}
    with atomic_file(out) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def score(samples: CachedFeatures, reference: Reference, reference_features: CachedFeatures | None) -> dict[str, Any]:
    """Computes all scores that an extractor gives, with their protocol.

    Args:
        reference_features: of the images of the reference, None where it has none: then no precision, recall and KID.

    Returns:
        ``scores``, ``protocol`` and ``warnings``.
    """
    extractor, scores, warnings = samples.extractor, dict[str, float](), list[str]()
    for title, name in extractor.frechet.items():
        found = samples.moments(name)
        wanted = reference.moments.get(name)
        if wanted is None and reference_features is not None:
            wanted = reference_features.moments(name)
        if wanted is None:
            warnings.append(f"{title} is left out: the reference has no statistics for it")
            continue
        if len(wanted.mean) != len(found.mean):
            raise ElitError(
                f"{reference.source} is of {len(wanted.mean)} features; {extractor.name} gives {len(found.mean)}"
            )
        for count, whose in ((samples.images.count, "samples"), (_count(reference, name), "reference images")):
            if count is not None and count <= len(found.mean):
                warnings.append(
                    f"{title} is biased: {count} {whose} are too few for {len(found.mean)} features; the covariance is "
                    "singular"
                )
        scores[title] = frechet_distance(found, wanted)
    if extractor.logits:
        scores["inception_score"] = inception_score(samples.read(extractor.logits))
    if extractor.neighbours and reference_features is None:
        warnings.append("precision, recall and KID are left out: they need images of the reference, not statistics")
    elif extractor.neighbours and reference_features is not None:
        ours, theirs = samples.read(extractor.neighbours), reference_features.read(extractor.neighbours)
        scores["precision"], scores["recall"] = precision_recall(ours, theirs)
        scores["kid"] = kernel_distance(ours, theirs)
    protocol = {
        **extractor.protocol(),
        "samples": samples.images.count,
        "samples_content": samples.images.content,
        "samples_source": samples.images.source,
        "reference": reference.content,
        "reference_source": reference.source,
        "reference_images": None if reference.images is None else reference.images.count,
        "definitions": DEFINITIONS,
        "sampling": samples.images.settings,
        "elit": __version__,
        "torch": torch.__version__,
    }
    return {"scores": scores, "protocol": protocol, "warnings": warnings}


def _count(reference: Reference, name: str) -> int | None:
    """Counts the images that the moments are of, where that is known."""
    return None if name in reference.moments or reference.images is None else reference.images.count


def differences(results: Sequence[dict[str, Any]], names: Sequence[str]) -> list[str]:
    """Says why results are not comparable with the first one: one sentence for each reason."""
    first = results[0]["protocol"]
    return [
        f"{names[0]} and {name} are not comparable: {what} differs ({first.get(key)} and {result['protocol'].get(key)})"
        for name, result in zip(names[1:], results[1:], strict=True)
        for key, what in COMPARED.items()
        if first.get(key) != result["protocol"].get(key)
    ]
