"""One exported file is the model at every level: parity, levels, fixed batches, guidance, and what is refused."""

import json
import platform
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode

import elit
from elit.conditions import Text
from elit.errors import ElitError
from elit.export import ExportedModel
from elit.export.graph import trace
from elit.export.metadata import describe, from_json, to_json
from elit.models.registry import config_for, model_class_of
from tests.helpers.models import inputs
from tests.helpers.stacks import KINDS, tiny

FORMATS = {"pt2": "model.pt2", "onnx": "model.onnx"}
FAST = [("ELIT-DiT", "pt2"), ("ELIT-DiT", "onnx")]
ALL = [(kind, form) for kind in KINDS for form in FORMATS]
COMBINATIONS = [pytest.param(*pair, marks=() if pair in FAST else pytest.mark.slow, id=", ".join(pair)) for pair in ALL]


def given(model: Any, batch: int, seed: int = 0) -> tuple[Any, ...]:
    """x, t and y as :func:`elit.sample` would give them to a model."""
    x, t, y = inputs(model, batch, seed)
    return x, t, y if model.conditional else None


def worst(found: Any, wanted: Any) -> float:
    """The largest difference, relative to the largest value, over all stages."""
    stages = zip(found, wanted, strict=True) if isinstance(wanted, list) else [(found, wanted)]
    return max(((f - w).abs().max() / w.abs().max()).item() for f, w in stages)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, Path]]:
    """Exports a kind of model once per format and set of options."""
    known: dict[Any, tuple[Any, Path]] = {}

    def export(kind: str, form: str, **options: Any) -> tuple[Any, Path]:
        key = (kind, form, *sorted(options.items()))
        if key not in known:
            model, file = KINDS[kind](), tmp_path_factory.mktemp("exported") / FORMATS[form]
            elit.export(model, file, **options)
            known[key] = model, file
        return known[key]

    return export


@pytest.mark.parametrize(("kind", "form"), COMBINATIONS)
def test_one_file_gives_every_level_of_the_model(kind: str, form: str, files: Any, monkeypatch: Any) -> None:
    model, file = files(kind, form)
    loaded = elit.load_exported(file)
    for again in ("torch.export.export", "torch.compile", "torch.onnx.export"):
        monkeypatch.setattr(again, None)  # whoever traced or compiled now would fail
    assert loaded.levels == model.levels
    for level in model.levels:
        for batch in (1, 3):
            x, t, y = given(model, batch, seed=level)
            # float32: sums of up to 128 terms in another order
            assert worst(loaded(x, t, y, num_latents=level), model(x, t, y, num_latents=level)) < 1e-5


@pytest.mark.parametrize("form", FORMATS)
def test_samples_of_a_file_are_those_of_the_model(form: str, files: Any) -> None:
    model, file = files("ELIT-DiT", form)
    options: dict[str, Any] = {
        "steps": 3,
        "budget": torch.tensor([1.0, 0.25, 1 / 16]),
        "guidance": [None, elit.Guidance("ccfg", 2.0), elit.Guidance("ag", 2.0)],
    }
    found = elit.sample(elit.load_exported(file), [1, 2, 3], **options)
    assert worst(found, elit.sample(model, [1, 2, 3], **options)) < 1e-4  # three steps of guided float32


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        pytest.param(kind, form, marks=() if (kind, form) == ("ELIT-DiT", "pt2") else pytest.mark.slow)
        for kind in ("ELIT-DiT", "ELIT-SiT, published", "ELIT-MMDiT", "ELIT-DFM", "ELIT-HDiT")
        for form in FORMATS
    ],
)
def test_both_terms_of_guidance_in_one_call(kind: str, form: str, files: Any) -> None:
    model, file = files(kind, form, guided=True)
    loaded = elit.load_exported(file)
    low = model.levels[0]
    for level, weak in ((model.num_latents, low), (low, low), (low, model.num_latents)):
        x, t, y = given(model, 3)
        null = model.null_condition(y)
        strong_found, weak_found = loaded.guided(x, t, y, null, level, weak)
        assert worst(strong_found, model(x, t, y, num_latents=level)) < 1e-5
        assert worst(weak_found, model(x, t, null, num_latents=weak)) < 1e-5
    assert worst(loaded(x, t, y, num_latents=level), model(x, t, y, num_latents=level)) < 1e-5


def test_a_fixed_batch_serves_any_number_of_samples(files: Any) -> None:
    model, file = files("ELIT-DiT", "pt2", batch=2, levels=(2, 16), class_names=tuple("abcdefghij"))
    loaded = elit.load_exported(file)
    x, t, y = given(model, 5)
    found = loaded(x, t, y, num_latents=2)
    assert worst(found, model(x, t, y, num_latents=2)) < 1e-5
    assert (loaded.levels, loaded.metadata.batch) == ((2, 16), 2)
    assert loaded.metadata.class_names == tuple("abcdefghij")
    with pytest.raises(ElitError, match=r"num_latents is 3; the file was exported with \[2, 16\]"):
        loaded(x, t, y, num_latents=3)
    with pytest.raises(
        ElitError, match=r"budget 0\.0625 means 1 of 16 latents, and the model was trained with 2 and 16"
    ):
        loaded(x, t, y, budget=1 / 16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "precision", "tolerance"),
    [
        # eager in the same precision rounds at the same places; the sums of products do so in another order
        ("pt2", "bf16", 2e-2),  # 8 bits, 4 blocks
        ("pt2", "fp16", 3e-3),  # 11 bits
        ("onnx", "fp16", 3e-3),
        ("onnx", "int8", 0.2),  # against float32: 8 bits for weights and activations, of random weights
    ],
)
def test_lower_precisions_are_near_the_model(form: str, precision: str, tolerance: float, files: Any) -> None:
    model, file = files("ELIT-SiT, published", form, precision=precision)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
    loaded, eager = elit.load_exported(file), KINDS["ELIT-SiT, published"]().to(dtype)
    for level in (1, 8, 16):
        x, t, y = given(model, 3)
        found = loaded(x, t, y, num_latents=level)
        assert found.dtype == torch.float32
        assert worst(found, eager(x.to(dtype), t, y, num_latents=level).float()) < tolerance


def test_a_plain_transformer_has_no_levels(tmp_path: Path) -> None:
    model = tiny("ELIT-DiT", interface=None, depth=2)
    elit.export(model, tmp_path / "plain.pt2")
    loaded = elit.load_exported(tmp_path / "plain.pt2")
    x, t, y = inputs(model, 2)
    assert loaded.levels == ()
    assert worst(loaded(x, t, y), model(x, t, y)) < 1e-5
    with pytest.raises(ElitError, match="has no latent interface"):
        elit.export(model, tmp_path / "plain2.pt2", levels=[4])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ELIT-DiT", "ELIT-UViT", "ELIT-HDiT", "ELIT-MMDiT", "ELIT-DFM"])
def test_a_package_of_aotinductor(kind: str, tmp_path: Path, monkeypatch: Any) -> None:
    model, file = KINDS[kind](), tmp_path / "model.pt2"
    elit.export(model, file, format="aoti")
    with pytest.raises(ElitError, match="is machine code, which can do whatever you can"):
        elit.load_exported(file)
    monkeypatch.setenv("PATH", "")  # no compiler is needed any more
    loaded = elit.load_exported(file, trust_native_code=True)
    for level in model.levels:
        for batch in (1, 3):
            x, t, y = given(model, batch)
            # float32: sums of up to 128 terms in another order
            assert worst(loaded(x, t, y, num_latents=level), model(x, t, y, num_latents=level)) < 1e-5


@pytest.mark.slow
def test_a_package_for_another_machine_is_told(tmp_path: Path) -> None:
    whole, other = tmp_path / "model.pt2", tmp_path / "other.pt2"
    elit.export(tiny("ELIT-DiT", depth=2, head_depth=0, tail_depth=0), whole, format="aoti")
    for known, written, message in (
        (platform.machine(), "riscv64", "is a package for linux on riscv64, and this is"),
        ("AOTI_MACHINE", "MACHINE", "is damaged, or a package for another machine"),
    ):
        with zipfile.ZipFile(whole) as old, zipfile.ZipFile(other, "w", zipfile.ZIP_STORED) as new:
            for name in old.namelist():
                record = old.read(name)
                about = name.endswith("metadata.json") and b"AOTI_MACHINE" in record
                new.writestr(name, record.replace(known.encode(), written.encode()) if about else record)
        with pytest.raises(ElitError, match=message):
            elit.load_exported(other, trust_native_code=True)


@pytest.mark.slow
def test_the_largest_model_is_traced_without_weights() -> None:
    config = config_for("ELIT-SiT-XL/2", resolution=256)
    with torch.device("meta"):
        model = model_class_of(config)(config)
    with FakeTensorMode():  # shapes of tensors that a CPU would have
        program = trace(model_class_of(config)(config))
    weights = sum(value.numel() for value in program.state_dict.values())
    assert weights == sum(p.numel() for p in model.parameters())
    assert all(isinstance(value, FakeTensor) for value in program.state_dict.values())
    linear = [node for node in program.graph.nodes if str(node.target) == "aten.linear.default"]
    assert len(linear) > 28 * 5  # every block has its five, and there is nothing that was left out
    (latents,) = [p for p in program.graph.nodes if p.op == "placeholder" and "latent_index" in p.name]
    (size,) = latents.meta["val"].shape
    ranges = program.range_constraints[size.node.expr]
    assert (int(ranges.lower), int(ranges.upper)) == (1, 16)
    told = describe(
        model, model.levels, guided=False, batch=None, precision="fp32", path="linear", solver="euler", steps=40,
        class_names=None,
    )  # fmt: skip
    assert from_json(to_json(told, config), Path("xl.pt2")) == (told, replace(config, interface=replace(
        config.interface, levels=model.levels)))  # fmt: skip
    assert (told.levels, told.input_shape, told.num_latents) == (tuple(range(1, 17)), (4, 32, 32), 16)


def test_metadata_says_what_others_need(files: Any) -> None:
    import onnx

    model, file = files("ELIT-DiT", "onnx")
    found = onnx.load(file)
    told = json.loads({entry.key: entry.value for entry in found.metadata_props}["elit"])
    assert told["levels"] == list(model.levels)
    assert told["input_shape"] == list(model.input_shape())
    assert told["time"].startswith("t = 1 is noise")
    shapes = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in found.graph.input}
    assert shapes == {"x": ["batch", 3, 16, 16], "t": ["batch"], "y": ["batch"], "latent_index": ["latents"]}
    assert str(Path(__file__).parents[2]) not in found.SerializeToString().decode("latin1")


def test_a_file_is_a_model_for_measurements(files: Any) -> None:
    from elit.analysis import attention_maps, count_flops, measure_costs
    from elit.digest import weights_digest

    model, file = files("ELIT-DiT", "onnx")
    loaded = elit.load_exported(file)
    assert isinstance(loaded, ExportedModel)
    assert weights_digest(loaded) == weights_digest(elit.load_exported(file))
    costs = measure_costs(loaded, [1, 16], 2, repeats=2)
    assert costs[0].flops < costs[1].flops == count_flops(model.config).total
    with pytest.raises(ElitError, match="the exported model takes"):
        loaded(torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    with pytest.raises(ElitError, match="an exported file runs as a whole"):
        attention_maps(loaded, torch.randn(1, 3, 16, 16), torch.tensor([1]), 0.5, torch.randn(1, 3, 16, 16))
    with pytest.raises(ElitError, match="cache skips the core"):
        elit.sample(loaded, [1], steps=2, cache=elit.Cache(0.1))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("m.pt2", {"format": "tflite"}, "no format is named 'tflite'"),
        ("m.onnx", {"format": "pt2"}, "ends in .pt2"),
        ("m.txt", {}, r"m\.txt; name one that ends in \.pt2 or \.onnx"),
        ("m.pt2", {"precision": "int8"}, "int8 is for ONNX"),
        ("m.onnx", {"precision": "bf16"}, "no bf16"),
        ("m.pt2", {"precision": "fp8"}, "precision is 'fp8'"),
        ("m.pt2", {"batch": 0}, "batch is 0"),
        ("m.pt2", {"levels": [1, 17]}, "levels is"),
        ("m.pt2", {"class_names": ["a"]}, "1 class names for 10 classes"),
        ("m.pt2", {"steps": 0}, "steps is 0"),
        ("m.pt2", {"path": "curve"}, "no path is named 'curve'"),
        ("m.pt2", {"solver": "ddim"}, "no solver is named 'ddim'"),
    ],
)
def test_wrong_options_are_told(name: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ElitError, match=message):
        elit.export(KINDS["ELIT-DiT"](), tmp_path / name, **options)
    assert list(tmp_path.iterdir()) == []


def test_untrained_levels_are_refused(tmp_path: Path) -> None:
    model = KINDS["ELIT-DiT"]()
    config = replace(model.config, interface=replace(model.config.interface, levels=(8, 16)))
    with pytest.raises(ElitError, match=r"level 4 was not trained; the model has the levels \[8, 16\]"):
        elit.export(type(model)(config), tmp_path / "m.pt2", levels=[4, 8])
    with pytest.raises(ElitError, match="a Recorder cannot be exported"):
        from tests.helpers.models import Recorder

        trace(Recorder(lambda *_: None))  # type: ignore[arg-type, return-value]


@pytest.mark.slow
def test_text_may_be_of_any_length(files: Any) -> None:
    model, file = files("ELIT-MMDiT", "onnx")
    loaded = elit.load_exported(file)
    tokens = torch.randn(2, 9, model.config.text_width)
    text = Text(tokens, torch.arange(9) < torch.tensor([[9], [4]]))
    found = elit.sample(loaded, text, steps=2, guidance=elit.Guidance("cfg", 2.0))
    assert worst(found, elit.sample(model, text, steps=2, guidance=elit.Guidance("cfg", 2.0))) < 1e-4


@pytest.mark.cuda
@pytest.mark.parametrize("form", ["pt2", "aoti"])
def test_a_file_runs_on_a_gpu(form: Any, tmp_path: Path) -> None:
    model, file = KINDS["ELIT-DiT"](), tmp_path / "model.pt2"
    elit.export(model.cuda() if form == "aoti" else model, file, format=form)
    loaded, model = elit.load_exported(file, device="cuda", trust_native_code=True), model.cuda()
    for level in (1, 4, 16):
        x, t, y = (part.cuda() for part in inputs(model, 3))
        assert worst(loaded(x, t, y, num_latents=level), model(x, t, y, num_latents=level)) < 1e-3  # TF32 is off
