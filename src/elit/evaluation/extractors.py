"""Networks whose features scores are made of: Inception (2015), DINOv2 ViT-L/14, and the classifiers of the digits."""

import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from elit.data import EMBEDDED, open_data
from elit.data.pixels import from_uint8
from elit.data.remote import cache_folder
from elit.digest import weights_digest
from elit.errors import ElitError, first_line
from elit.evaluation.classifier import Classifier, train_classifier
from elit.tensors import load_weights, read_tensors, write_tensors

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
DINO = "facebook/dinov2-large"
SPATIAL_CHANNELS = 7  # sFID of the ADM suite: the first channels of a 17x17 grid, 2023 numbers
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Resize = Literal["float", "pil"]
PRECISION = "float32"  # of every feature, on every device


@dataclass(frozen=True)
class Extractor:
    """Computes named features (B, F), float32 on the CPU, from bytes (B, H, W, 3).

    The network runs in full float32: TF32, which GPUs use for convolutions unless told otherwise, is off.

    Attributes:
        name: inception, dinov2, or a data set.
        weights: SHA-256 of the weights, 16 digits.
        device: where the network runs and scores are computed: cpu, cuda, cuda:1, ...
        resize: how images are brought to its size.
        frechet: which features a Frechet distance is of, by the name of the score.
        neighbours: features for precision, recall and KID; None for neither.
        logits: those of the Inception score; None for none.
        network: the features themselves.
    """

    name: str
    weights: str
    device: str
    resize: str
    frechet: dict[str, str]
    neighbours: str | None
    logits: str | None
    network: Callable[[Tensor], dict[str, Tensor]]

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        with without_tf32():
            return {name: value.float().cpu() for name, value in self.network(pixels).items()}

    def protocol(self) -> dict[str, Any]:
        """Returns what the features depend on."""
        return {
            "extractor": self.name,
            "weights": self.weights,
            "resize": self.resize,
            "device": torch.device(self.device).type,
            "precision": PRECISION,
        }


@contextmanager
def without_tf32() -> Iterator[None]:
    """Makes convolutions and matrix products of float32 exact to float32 for the length of a ``with`` block."""
    cudnn, before = torch.backends.cudnn, torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with cudnn.flags(enabled=cudnn.enabled, deterministic=cudnn.deterministic, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def open_extractor(
    name: str,
    weights: str | Path | None = None,
    fdd_resize: Resize = "pil",
    device: torch.device | str = "cpu",
) -> Extractor:
    """Opens an extractor by name.

    Args:
        name: inception, dinov2, or an embedded data set.
        fdd_resize: how dinov2 gets its 224 pixels: ``pil`` in bytes, as dgm-eval does, or ``float``.
        weights: their file (Inception, digits) or folder or Hub id (DINOv2); default the library's cache.

    Raises:
        ElitError: no such extractor, or weights that are missing, damaged or not its own.
    """
    if name == "inception":
        return inception(weights, device)
    if name == "dinov2":
        return dinov2(weights or DINO, fdd_resize, device)
    if name in EMBEDDED:
        return digit_features(name, weights, device)
    raise ElitError(f"no extractor is named {name!r}; there are inception, dinov2, {', '.join(EMBEDDED)}")


# ------------------------------------------------------------------------------------------------ Inception


def inception(weights: str | Path | None = None, device: torch.device | str = "cpu") -> Extractor:
    """Opens the network of FID: TensorFlow's of 2015-12-05 in the port of torch-fidelity.

    ``pool`` (2048), ``spatial`` (2023: height, width, channel in this order) and ``logits`` (1008, without bias).

    Raises:
        ElitError: torch-fidelity or the weights are missing, or they are damaged.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ElitError(f"Inception features need {error.name}: pip install 'elit-diffusion[evaluate]'") from error
    path = Path(weights) if weights else _find_inception()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        buffer = io.BytesIO()  # torch-fidelity loads without restrictions: it is given only what we have checked
        torch.save(state, buffer)
        buffer.seek(0)
        network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], buffer).to(device)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, AttributeError, TypeError) as error:
        raise ElitError(f"{path} does not hold the weights of Inception; {_where_inception()}") from error

    def features(pixels: Tensor) -> dict[str, Tensor]:
        seen: list[Tensor] = []
        hook = network.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: seen.append(output))
        try:
            pool, logits = network(pixels.permute(0, 3, 1, 2).contiguous().to(device))
        finally:
            hook.remove()
        spatial = seen[0].permute(0, 2, 3, 1)[..., :SPATIAL_CHANNELS].flatten(1)
        return {"pool": pool, "spatial": spatial, "logits": logits}

    resize = "299 px, bilinear as TensorFlow 1 without antialias, in float32"
    frechet = {"fid": "pool", "sfid": "spatial"}
    return Extractor("inception", weights_digest(network), str(device), resize, frechet, "pool", "logits", features)


def _find_inception() -> Path:
    for folder in (cache_folder() / "weights", Path(torch.hub.get_dir()) / "checkpoints"):
        if (folder / INCEPTION_FILE).is_file():
            return folder / INCEPTION_FILE
    raise ElitError(f"the weights of Inception are missing; {_where_inception()}")


def _where_inception() -> str:
    return (
        f"put {INCEPTION_FILE} (release v0.2.0 of torch-fidelity) into {cache_folder() / 'weights'}, or name the file "
        "with --weights"
    )


# ------------------------------------------------------------------------------------------------ DINOv2


def dinov2(source: str | Path = DINO, resize: Resize = "pil", device: torch.device | str = "cpu") -> Extractor:
    """Opens DINOv2 ViT-L/14 without registers: the class token after the last norm, ``token`` (1024).

    Raises:
        ElitError: transformers or the weights are missing, or they are damaged.
    """
    network = load_dinov2(source, "weights").to(device)
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))

    def features(pixels: Tensor) -> dict[str, Tensor]:
        inputs = (_to_224(pixels, resize).to(device) - mean) / std
        return {"token": network(inputs).last_hidden_state[:, 0]}

    described = {"float": "in float32", "pil": "by PIL in bytes"}[resize]
    return Extractor(
        "dinov2",
        weights_digest(network),
        str(device),
        f"224 px, bicubic with antialias {described}",
        {"fdd": "token"},
        "token",
        None,
        features,
    )


def load_dinov2(source: str | Path, option: str) -> Any:
    """Loads a ``Dinov2Model`` of transformers, frozen.

    Args:
        source: a folder or a Hub id.
        option: what a user names it with.

    Raises:
        ElitError: transformers or the weights are missing, or they are damaged.
    """
    try:
        from transformers import Dinov2Model
    except ImportError as error:
        raise ElitError(f"DINOv2 features need {error.name}: pip install 'elit-diffusion[evaluate]'") from error
    try:
        loaded: Any = Dinov2Model.from_pretrained(str(source), use_safetensors=True, output_loading_info=True)
    except Exception as error:  # it raises several kinds, also those of safetensors and of the Hub
        raise ElitError(
            f"there are no weights of DINOv2 at {source}; give the folder of config.json and model.safetensors, such "
            f"as those of {DINO}, with --{option} ({first_line(error)})"
        ) from error
    network, report = loaded
    if report["missing_keys"]:
        raise ElitError(f"{source} does not fit DINOv2: it lacks {sorted(report['missing_keys'])[0]}")
    return network.eval().requires_grad_(False)


def _to_224(pixels: Tensor, resize: Resize) -> Tensor:
    """Resizes bytes (B, H, W, 3) to (B, 3, 224, 224) in [0, 1]."""
    if resize == "pil":
        small = [Image.fromarray(p.numpy()).resize((224, 224), Image.Resampling.BICUBIC) for p in pixels.contiguous()]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in small]))
        return pixels.permute(0, 3, 1, 2).float() / 255
    inputs = pixels.permute(0, 3, 1, 2).float() / 255
    return F.interpolate(inputs, size=(224, 224), mode="bicubic", antialias=True, align_corners=False)


# ------------------------------------------------------------------------------------------------ the digits


def digit_features(data: str, weights: str | Path | None = None, device: torch.device | str = "cpu") -> Extractor:
    """Opens the classifier of an embedded data set, which is trained once and kept: ``features`` (64), ``logits``.

    Raises:
        ElitError: weights that are missing, damaged or not its own.
    """
    path = Path(weights) if weights else cache_folder() / "weights" / f"classifier-{data}.safetensors"
    if weights is None and not path.exists():
        write_tensors(path, train_classifier(open_data(data)).state_dict())
    network = Classifier(1, open_data(data).num_classes)
    load_weights(network, read_tensors(path), path)
    network = network.to(device).eval().requires_grad_(False)

    def features(pixels: Tensor) -> dict[str, Tensor]:
        logits, values = network(from_uint8(pixels[..., :1].permute(0, 3, 1, 2)).to(device))
        return {"features": values, "logits": logits}

    frechet = {"frechet_distance": "features"}
    return Extractor(
        data,
        weights_digest(network),
        str(device),
        "none; the first channel",
        frechet,
        "features",
        "logits",
        features,
    )
