"""Networks against other code, with random weights in their true format."""

import io
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from elit import ElitError
from elit.commands.evaluate import ExtractorOptions
from elit.evaluation.classifier import Classifier
from elit.evaluation.extractors import INCEPTION_FILE, Extractor, dinov2, inception, open_extractor
from elit.tensors import write_tensors

fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")


def empty_file() -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save({}, buffer)
    buffer.seek(0)
    return buffer


@pytest.fixture(scope="module")
def network() -> Any:
    """The Inception of torch-fidelity with random weights, scaled so that signal reaches the end."""
    kind = fidelity.FeatureExtractorInceptionV3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "load_state_dict", lambda self, state: None)
        found = kind("inception", ["2048", "logits_unbiased"], empty_file())
    draws = torch.Generator().manual_seed(0)
    for module in found.modules():
        if isinstance(module, torch.nn.Conv2d):
            fan_in = module.weight[0].numel()
            module.weight.copy_(torch.randn(module.weight.shape, generator=draws) * (2 / fan_in) ** 0.5)
    return found


@pytest.fixture(scope="module")
def ours(network: Any, tmp_path_factory: pytest.TempPathFactory) -> Extractor:
    path = tmp_path_factory.mktemp("weights") / INCEPTION_FILE
    torch.save(network.state_dict(), path)
    return inception(path)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.randint(256, (2, 40, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_inception_features_are_those_of_torch_fidelity_and_of_a_hook(
    network: Any, ours: Extractor, pixels: Tensor
) -> None:
    seen: list[Tensor] = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    pool, logits = network(pixels.permute(0, 3, 1, 2))
    found = ours(pixels)
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "pool": (2, 2048),
        "spatial": (2, 17 * 17 * 7),
        "logits": (2, 1008),
    }
    assert pool.std() > 0.01
    torch.testing.assert_close(found["pool"], pool)
    torch.testing.assert_close(found["logits"], logits)
    expected = [seen[0][i, c, y, x] for i in range(2) for y in range(17) for x in range(17) for c in range(7)]
    torch.testing.assert_close(found["spatial"].flatten(), torch.stack(expected))  # height, width, channel: as in ADM
    assert len(ours.weights) == 16


def test_dinov2_is_the_class_token_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=518, patch_size=14
    )
    network = transformers.Dinov2Model(config).eval()
    network.save_pretrained(tmp_path)
    photo = torch.randint(256, (2, 300, 300, 3), dtype=torch.uint8)
    found = {resize: dinov2(tmp_path, resize)(photo)["token"] for resize in ("float", "pil")}  # type: ignore[arg-type]
    for i, image in enumerate(photo.numpy()):
        small = np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC))
        inputs = (small / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        with torch.inference_mode():
            output = network(torch.tensor(inputs, dtype=torch.float32).permute(2, 0, 1)[None])
        torch.testing.assert_close(found["pil"][i], output.pooler_output[0], atol=1e-5, rtol=1e-4)
    assert not torch.equal(found["pil"], found["float"])
    torch.testing.assert_close(found["pil"], found["float"], atol=0.05, rtol=0.05)  # the bytes' rounding apart


def test_the_literature_resizes_for_dinov2_in_bytes() -> None:
    """As dgm-eval does, whose numbers are the published ones."""
    for function, name in ((dinov2, "resize"), (open_extractor, "fdd_resize"), (ExtractorOptions, "fdd_resize")):
        assert signature(function).parameters[name].default == "pil"


def test_inception_sees_299_pixels_as_tensorflow_1_makes_them(network: Any, ours: Extractor, pixels: Tensor) -> None:
    """Against its definition: corner (0, 0) stays, every other one is a weighted mean of its four neighbours."""
    seen: list[Tensor] = []
    hook = network.Conv2d_1a_3x3.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    network(pixels.permute(0, 3, 1, 2))
    hook.remove()
    images = pixels.double().numpy()
    size, scale = images.shape[1], images.shape[1] / 299
    expected = np.zeros((2, 299, 299, 3))
    for row in range(299):
        for column in range(299):
            y, x = row * scale, column * scale
            top, left = int(y), int(x)
            below, right, b, r = min(top + 1, size - 1), min(left + 1, size - 1), y - top, x - left
            upper = images[:, top, left] * (1 - r) + images[:, top, right] * r
            lower = images[:, below, left] * (1 - r) + images[:, below, right] * r
            expected[:, row, column] = upper * (1 - b) + lower * b
    found = seen[0].permute(0, 2, 3, 1).double().numpy()
    np.testing.assert_allclose(found, (expected - 128) / 128, atol=2e-5)  # of float32 positions up to 40
    pool = ours(pixels)["pool"]
    torch.testing.assert_close(pool, network(pixels.permute(0, 3, 1, 2))[0])


def test_features_are_of_full_float32_whatever_the_process_has_chosen() -> None:
    """Convolutions of GPUs use TF32 by default, with 10 bits; what was chosen is as before afterwards."""
    inside: list[tuple[bool, str]] = []

    def network(pixels: Tensor) -> dict[str, Tensor]:
        inside.append((torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()))
        return {"x": pixels.float()}

    extractor = Extractor("x", "0", "cpu", "none", {}, None, None, network)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    assert before[1]
    try:
        torch.set_float32_matmul_precision("high")
        extractor(torch.zeros(1, 2, 2, 3, dtype=torch.uint8))
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)
    finally:
        torch.set_float32_matmul_precision(before[0])
    assert inside == [(False, "highest")]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_features_of_a_gpu_are_those_of_the_cpu(network: Any, pixels: Tensor, tmp_path: Path) -> None:
    torch.save(network.state_dict(), tmp_path / INCEPTION_FILE)
    cpu, gpu = (inception(tmp_path / INCEPTION_FILE, device) for device in ("cpu", "cuda"))
    assert (cpu.device, gpu.device) == ("cpu", "cuda")
    on_cpu, on_gpu = cpu(pixels), gpu(pixels)
    for name, expected in on_cpu.items():
        error = (on_gpu[name] - expected).norm() / expected.norm()
        assert error < 1e-5, name  # of float32; TF32 gives 1e-3


def test_classifier_from_a_file(tmp_path: Path) -> None:
    network = Classifier(1, 10)
    write_tensors(tmp_path / "c.safetensors", network.state_dict())
    images = torch.randint(256, (3, 8, 8, 1), dtype=torch.uint8).expand(-1, -1, -1, 3)
    found = open_extractor("digits8", tmp_path / "c.safetensors")(images)
    logits, features = network(images[..., :1].permute(0, 3, 1, 2) / 127.5 - 1)
    torch.testing.assert_close(found["features"], features)
    torch.testing.assert_close(found["logits"], logits)


def test_weights_that_are_missing_or_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELIT_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    missing = rf"weights of Inception are missing; put {INCEPTION_FILE} \(release v0\.2\.0 of torch-fidelity\) into "
    with pytest.raises(ElitError, match=missing):
        inception()
    for name, content in (("text.pth", b"no weights"), ("empty.pth", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ElitError, match=f"{name} does not hold the weights of Inception"):
            inception(tmp_path / name)
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ElitError, match=r"other\.pth does not hold the weights"):
        inception(tmp_path / "other.pth")
    with pytest.raises(ElitError, match="there are no weights of DINOv2 at"):
        dinov2(tmp_path)
    with pytest.raises(ElitError, match=r"there are inception, dinov2, scenes, digits, digits8"):
        open_extractor("clip")


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"x": Harmful()}, tmp_path / "weights.pth")
    with pytest.raises(ElitError, match="does not hold the weights of Inception"):
        inception(tmp_path / "weights.pth")
    assert not (tmp_path / "ran").exists()
