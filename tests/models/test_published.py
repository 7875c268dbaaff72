"""Published checkpoints: they load safely, answer as the published code did, and come back bit by bit."""

import hashlib
import json
import logging
import os
import pickle
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

import elit
from elit.commands.convert import PROVENANCE, convert
from elit.errors import ElitError
from elit.interface import InterfaceConfig
from elit.models import DFMConfig, DiT, DiTConfig, config_for
from elit.models.files import save_model
from elit.models.published import (
    Checkpoint,
    load_published,
    read,
    recover_config,
    save_published,
    to_published,
)
from elit.models.registry import build

DATA = Path(__file__).parents[1] / "data" / "published"
OPEN = {  # what args.model, "...-tiny", does not tell
    "sit_tiny": {"num_heads": 4},
    "elit_sit_tiny": {"num_heads": 4, "tail_depth": 2},
    "dfm_sit_tiny": {"num_heads": 4},
}
DESCRIBED = {name: json.loads((DATA / f"{name}.json").read_text()) for name in OPEN}
ANSWERS = {name: load_file(DATA / f"{name}.safetensors") for name in OPEN}


def golden(name: str) -> Any:
    return elit.load(DATA / f"{name}.pt", **OPEN[name])


def contents(name: str) -> dict[str, Any]:
    with torch.serialization.safe_globals([Namespace]):
        return torch.load(DATA / f"{name}.pt", weights_only=True)


def assert_close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


def same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a
    )


# ------------------------------------------------------------------------------------------------ the published numbers


@pytest.mark.parametrize("name", OPEN)
def test_parameters(name: str) -> None:
    assert sum(p.numel() for p in golden(name).parameters()) == DESCRIBED[name]["parameters"]


@pytest.mark.parametrize(
    ("name", "answer"),
    [(name, key) for name in ("sit_tiny", "elit_sit_tiny") for key in ANSWERS[name] if key.startswith("out.")],
)
def test_forward(name: str, answer: str) -> None:
    model, numbers = golden(name), ANSWERS[name]
    budget = None if answer == "out.full" else float(answer.removeprefix("out.budget_"))
    with torch.no_grad():
        v = model(numbers["in.x"], numbers["in.t"], numbers["in.y"], budget=budget)
    assert_close(v, numbers[answer], 1e-6)


@pytest.mark.parametrize("budget", ["0.0625", "0.25", "0.5", "1"])
def test_flops(budget: str) -> None:
    model, numbers = golden("elit_sit_tiny").requires_grad_(False), ANSWERS["elit_sit_tiny"]
    with FlopCounterMode(display=False) as counter:
        model(numbers["in.x"][:1], numbers["in.t"][:1], numbers["in.y"][:1], budget=float(budget))
    assert counter.get_total_flops() == DESCRIBED["elit_sit_tiny"]["meta"][f"flops_per_image.budget_{budget}"]


def test_forward_multi_scale() -> None:
    model, numbers = golden("dfm_sit_tiny"), ANSWERS["dfm_sit_tiny"]
    coarse, fine = numbers["pyramid.0"], numbers["pyramid.1"]
    for answer, x in (("all", [coarse, fine]), ("first", [coarse, torch.zeros_like(fine)])):  # or the fine one masked
        with torch.no_grad():
            v = model(x, numbers["in.t"], numbers["in.y"])
        for stage in (0, 1):
            assert_close(v[stage], numbers[f"out.{answer}.{stage}"], 1e-6)


def guidance(settings: dict[str, Any]) -> elit.Guidance | None:
    if "cfg_scale" not in settings:
        return None
    weak = settings.get("unconditional_inference_budget")
    kind = "cfg" if weak is None else "ag" if settings.get("autoguidance") else "ccfg"
    interval = (settings.get("guidance_low", 0.0), settings.get("guidance_high", 1.0))
    return elit.Guidance(kind, settings["cfg_scale"], weak, interval)


@pytest.mark.parametrize(
    ("name", "answer"),
    [(name, key) for name in OPEN for key in DESCRIBED[name]["meta"] if key.startswith("sample.")],
)
def test_sampler(name: str, answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, numbers = DESCRIBED[name]["meta"][answer], ANSWERS[name]
    if f"{answer}.draws" in numbers:
        draws = numbers[f"{answer}.draws"]
        monkeypatch.setattr("elit.flow.trajectory.normals", lambda keys, _: draws[int(keys[0][1].split()[1])])
    multi_scale = name == "dfm_sit_tiny"
    noise = [numbers["sample.noise.0"], numbers["sample.noise.1"]] if multi_scale else None
    x = elit.sample(
        golden(name),
        numbers["in.y"],
        noise=torch.cat([stage.flatten(1) for stage in noise], dim=1) if noise else numbers["sample.noise"],
        steps=settings.get("num_steps", 7),  # of two stages: 4 and 3, the published schedule
        solver="heun" if settings.get("heun") else "sde" if "sde" in answer else "euler",
        budget=settings.get("inference_budget"),
        guidance=guidance(settings),
    )
    assert_close(x, numbers[f"{answer}.recomposed" if multi_scale else answer], 1e-5)


def meta_model(name: str, **overrides: Any) -> Any:
    with torch.device("meta"):
        return elit.create(name, **overrides).requires_grad_(False)


def flops(model: Any, budget: float | None = None) -> int:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, *model.input_shape()), torch.empty(1), torch.zeros(1, dtype=torch.long), budget=budget)
    return counter.get_total_flops()


def test_flops_of_the_released_size() -> None:
    published, paper = meta_model("ELIT-SiT-XL/2", tail_visible=True), meta_model("ELIT-SiT-XL/2")
    told = {1 / 2: 176.590e9, 1 / 8: 126.535e9, 1 / 16: 118.325e9}
    for budget, number in told.items():
        assert flops(published, budget) == pytest.approx(number, rel=1e-5)
        assert flops(paper, budget) < flops(published, budget)
    assert flops(paper) == flops(published) == pytest.approx(245.443e9, rel=1e-5)


def test_dropping_the_tail_everywhere_costs_less_at_every_budget() -> None:
    shallow = {"depth": 3, "head_depth": 1, "tail_depth": 1}
    published = meta_model("ELIT-SiT-XL/2", tail_visible=True, **shallow)
    paper = meta_model("ELIT-SiT-XL/2", **shallow)
    for latents in range(1, 16):
        assert flops(paper, latents / 16) < flops(published, latents / 16)


@pytest.mark.parametrize(
    ("name", "number", "tolerance"),
    [("SiT-XL/2", 675_111_184, 0), ("ELIT-SiT-XL/2", 705_121_936, 0), ("ELIT-DiT-XL/2", 698e6, 0.01)],
)
def test_parameters_of_the_released_sizes(name: str, number: float, tolerance: float) -> None:
    assert sum(p.numel() for p in meta_model(name).parameters()) == pytest.approx(number, rel=tolerance, abs=0)


# ------------------------------------------------------------------------------------------------ the architecture


def checkpoint(config: DiTConfig, **args: Any) -> Checkpoint:
    """What a file of such a model would hold, without a file."""
    with torch.device("meta"):
        model = build(config)
    return Checkpoint(Path("file.pt"), "ema", to_published(model), Namespace(**args), 0)


@pytest.mark.parametrize("size", ["S", "B", "L", "XL"])
@pytest.mark.parametrize("family", ["SiT", "ELIT-SiT", "DFM-SiT"])
@pytest.mark.parametrize(("patch", "resolution"), [(2, 256), (4, 512)])
def test_named_sizes_need_no_help(family: str, size: str, patch: int, resolution: int) -> None:
    name = f"{family}-{size}/{patch}"
    interface = {"group_size": 4, "levels": tuple(range(2, 17)), "tail_visible": True} if family == "ELIT-SiT" else {}
    config = config_for(name, resolution, **interface)
    found = checkpoint(config, model=name, encoder_depth=config.head_depth, elit_max_mask_prob=0.875)
    assert recover_config(found) == config


def test_args_decide_over_the_name_and_overrides_over_both() -> None:
    config = config_for("ELIT-SiT-S/2", head_depth=4, group_size=4, levels=tuple(range(1, 17)), tail_visible=True)
    found = checkpoint(config, model="ELIT-SiT-S/2", encoder_depth=4, elit_max_mask_prob=0.9375)
    assert recover_config(found) == config
    assert recover_config(found, head_depth=1).head_depth == 1
    assert recover_config(found, num_heads=12, tail_depth=5).num_heads == 12


@pytest.mark.parametrize("side", [2, 3, 4, 5, 6, 7, 8])
def test_levels_of_training_survive_floating_point(side: int) -> None:
    config = DiTConfig(
        input_size=side, patch_size=1, width=8, depth=3, num_heads=2, head_depth=1, tail_depth=1, positions="sincos",
        qk_norm=False, interface=InterfaceConfig(group_size=side, variant="published"),
    )  # fmt: skip
    tensors = checkpoint(config).tensors
    count = side**2
    for latents in range(1, count + 1):
        args = {"num_heads": 2, "encoder_depth": 1, "tail_depth": 1, "elit_max_mask_prob": 1 - latents / count}
        for highest in (None, latents, (latents + count) // 2, count):
            masked = {} if highest is None else {"elit_min_mask_prob": 1 - highest / count}
            found = recover_config(Checkpoint(Path("file.pt"), "ema", tensors, Namespace(**args, **masked), 0))
            assert found.interface.levels == tuple(range(latents, (highest or count) + 1))


ODD = {  # sizes that have no name
    "SiT": DiTConfig(
        input_size=6, patch_size=1, in_channels=3, num_classes=7, width=24, depth=2, num_heads=3, head_depth=1,
        tail_depth=0, positions="sincos", qk_norm=False, mlp_ratio=49 / 24,
    ),
    "ELIT-SiT": DiTConfig(
        input_size=24, patch_size=4, in_channels=5, num_classes=3, width=16, depth=5, num_heads=2, head_depth=0,
        tail_depth=2, positions="sincos", qk_norm=True,
        interface=InterfaceConfig(
            group_size=3, variant="published", levels=tuple(range(2, 10)), write_depth=2, tail_visible=True
        ),
    ),
    "ELIT-SiT of ours": DiTConfig(
        input_size=8, patch_size=2, width=16, depth=3, num_heads=4, head_depth=1, tail_depth=1, positions="sincos",
        qk_norm=False, interface=InterfaceConfig(group_size=2, variant="published", levels=(1, 2, 3)),
    ),
    "DFM-SiT": DFMConfig(
        input_size=16, patch_size=4, width=16, depth=2, num_heads=2, positions="sincos", qk_norm=False, stages=3
    ),
    "ELIT-DFM-SiT": DFMConfig(
        input_size=16, patch_size=2, width=16, depth=3, num_heads=2, head_depth=1, tail_depth=1, positions="sincos",
        qk_norm=False,
        interface=InterfaceConfig(group_size=4, variant="published", levels=(16,), tail_visible=True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_any_size_is_written_and_read_back(name: str, tmp_path: Path) -> None:
    model = build(ODD[name])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    save_published(model, tmp_path / "file.pt")
    loaded = elit.load(tmp_path / "file.pt")
    assert loaded.config == model.config
    assert same_tensors(loaded.state_dict(), model.state_dict())
    assert not loaded.positions.requires_grad
    assert not loaded.training


# ------------------------------------------------------------------------------------------------ which weights


@pytest.fixture
def both(tmp_path: Path) -> Path:
    """A file as training left it: raw weights, optimizer state and REPA projectors beside the average."""
    told = contents("elit_sit_tiny")
    told["model"] = {name: tensor + 1 for name, tensor in told["ema"].items()}
    told["opt"] = {"state": {0: {"exp_avg": torch.zeros(4)}}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.95)}]}
    for weights in (told["ema"], told["model"]):
        weights["projectors.0.0.weight"] = torch.zeros(3, 96)
    torch.save(told, tmp_path / "both.pt")
    return tmp_path / "both.pt"


def test_average_is_preferred_and_the_rest_ignored(both: Path) -> None:
    average, raw = elit.load(both, **OPEN["elit_sit_tiny"]), elit.load(both, weights="raw", **OPEN["elit_sit_tiny"])
    assert same_tensors(average.state_dict(), golden("elit_sit_tiny").state_dict())
    assert same_tensors(raw.state_dict(), {name: tensor + 1 for name, tensor in average.state_dict().items()})


def test_raw_weights_where_there_is_no_average(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    told = contents("sit_tiny")
    torch.save({"model": told["ema"], "args": told["args"]}, tmp_path / "raw.pt")
    with caplog.at_level(logging.INFO, logger="elit"):
        loaded = elit.load(tmp_path / "raw.pt", num_heads=4)
    assert same_tensors(loaded.state_dict(), golden("sit_tiny").state_dict())
    assert "is a published checkpoint: model of SiT" in caplog.text


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks at the memory map of Linux")
def test_weights_are_mapped_and_not_copied(both: Path) -> None:
    model = elit.load(both, **OPEN["elit_sit_tiny"])
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(both) in line]
    ranges = [[int(end, 16) for end in line[0].split("-")] for line in maps]

    def mapped(tensor: torch.Tensor) -> bool:
        return any(low <= tensor.data_ptr() < high for low, high in ranges)

    copied = {name for name, parameter in model.named_parameters() if not mapped(parameter)}
    assert copied <= {"patch_embed.weight", "interface.latent_positions"}  # the two that are arranged otherwise


def test_training_a_loaded_model_leaves_the_file_alone(both: Path) -> None:
    before = hashlib.sha256(both.read_bytes()).digest()
    model = elit.load(both, **OPEN["elit_sit_tiny"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert hashlib.sha256(both.read_bytes()).digest() == before


# ------------------------------------------------------------------------------------------------ refused


class Malicious:
    """Unpickling it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def sentence(raised: pytest.ExceptionInfo[ElitError], path: Path) -> str:
    """The message: one sentence that names the file."""
    text = str(raised.value)
    assert "\n" not in text and str(path) in text and len(text) < 400
    return text


@pytest.mark.parametrize("place", ["args", "ema", "opt", "steps", "weight", "everything", "plain pickle", "old format"])
def test_malicious_pickles_only_fail(place: str, tmp_path: Path) -> None:
    told, path, marker = contents("sit_tiny"), tmp_path / "file.pt", tmp_path / "marker"
    evil: Any = Malicious(marker)
    if place == "args":
        told["args"].model = evil
    elif place == "weight":
        told["ema"]["pos_embed"] = evil
    else:
        told = evil if place == "everything" else told | {place: evil}
    if place == "plain pickle":
        path.write_bytes(pickle.dumps(evil))
    else:
        torch.save(told, path, _use_new_zipfile_serialization=place != "old format")
    with pytest.raises(ElitError) as raised:
        elit.load(path, num_heads=4)
    assert not marker.exists()
    assert "refused" in sentence(raised, path) or place in ("plain pickle", "old format")


def test_only_tensors_plain_values_and_namespace_are_read(tmp_path: Path) -> None:
    told = contents("sit_tiny")
    told["args"].results = Path("results")
    torch.save(told, tmp_path / "file.pt")
    with pytest.raises(ElitError, match=r"it holds pathlib\.\w+, which is neither tensor nor plain value"):
        elit.load(tmp_path / "file.pt", num_heads=4)
    assert Namespace not in torch.serialization.get_safe_globals()  # allowed inside, and nowhere else


@pytest.mark.parametrize(
    ("name", "start", "said"),
    [
        ("empty", b"", "is empty"),
        ("text", b"hello, this is no checkpoint\n", "is no PyTorch checkpoint"),
        ("truncated", (DATA / "sit_tiny.pt").read_bytes()[:100_000], "is cut short"),
        ("zip", b"PK\x05\x06" + bytes(18), "is damaged or no checkpoint"),
    ],
)
def test_files_of_another_kind(name: str, start: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.pt"
    path.write_bytes(start)
    with pytest.raises(ElitError, match=said) as raised:
        elit.load(path)
    sentence(raised, path)


def test_folders_and_files_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for source in (tmp_path, tmp_path / "nothing.pt", Path("nothing.pt")):
        with pytest.raises(ElitError):
            elit.load(source)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ElitError, match="holds no model") as raised:
        elit.load(tmp_path)
    sentence(raised, tmp_path)


def without(told: dict[str, Any], prefix: str) -> None:
    told["ema"] = {name: tensor for name, tensor in told["ema"].items() if not name.startswith(prefix)}


READ = "input_token_editor.adapters.0"
WRONG: dict[str, tuple[Any, str]] = {
    "no dict": (lambda told: [told["ema"]], "holds a list"),
    "no weights": (lambda told: told.pop("ema") and None, "no weights under 'model'"),
    "weights that are none": (lambda told: told.update(ema=torch.zeros(3)), "no weights under 'ema'"),
    "a number": (lambda told: told["ema"].update(pos_embed=3), "'pos_embed'"),
    "whole numbers": (lambda told: told["ema"].update(pos_embed=torch.zeros(1, 64, 96).int()), "'pos_embed'"),
    "args of a dict": (lambda told: told.update(args={}), "its args are a dict"),
    "another model": (lambda told: told.update(ema={"fc.weight": torch.zeros(3, 3)}), "lacks pos_embed"),
    "missing": (lambda told: without(told, "blocks.3.attn.qkv.bias"), "lacks blocks.3.attn.qkv.bias"),
    "missing block": (lambda told: without(told, "blocks.3."), "lacks all of blocks.3"),
    "missing Read": (lambda told: without(told, f"{READ}.fit_layer"), f"lacks {READ}.fit_layer"),
    "missing latents": (lambda told: without(told, f"{READ}.learned"), "lacks .*learned_query_embed"),
    "missing interface": (
        lambda told: without(told, ("input_token_editor", "output_token_editor")),
        f"lacks {READ}.learned_query_embed",
    ),
    "missing Write": (
        lambda told: without(told, "output_token_editor"),
        r"lacks output_token_editor\.adapters.*and 8 more",
    ),
    "unexpected": (lambda told: told["ema"].update(extra=torch.zeros(2)), "has unexpected extra"),
    "wrong shape": (
        lambda told: told["ema"].update({"blocks.2.mlp.fc2.bias": torch.zeros(95)}),
        r"blocks\.2\.mlp\.fc2\.bias is \[95\], not \[96\]",
    ),
    "flat positions": (lambda told: told["ema"].update(pos_embed=torch.zeros(64, 96)), "pos_embed is .64, 96."),
    "no square": (lambda told: told["ema"].update(pos_embed=torch.zeros(1, 60, 96)), "pos_embed has 60 rows"),
    "other classes": (lambda told: setattr(told["args"], "num_classes", 999), "1001 rows"),
    "other prediction": (lambda told: setattr(told["args"], "prediction", "x"), "predicts 'x'"),
    "typed wrong": (lambda told: setattr(told["args"], "encoder_depth", "two"), "args.encoder_depth is 'two'"),
    "masking at least more than at most": (
        lambda told: vars(told["args"]).update(elit_max_mask_prob=0.5, elit_min_mask_prob=0.75),
        "elit_min_mask_prob is above args.elit_max_mask_prob",
    ),
    "masking all": (lambda told: setattr(told["args"], "elit_max_mask_prob", 1.0), "elit_max_mask_prob is 1.0"),
    "norms that lack": (lambda told: setattr(told["args"], "qk_norm", True), r"lacks blocks\.0\.attn\.k_norm\.weight"),
}


@pytest.mark.parametrize("case", WRONG)
def test_contents_that_do_not_fit(case: str, tmp_path: Path) -> None:
    change, said = WRONG[case]
    told, path = contents("elit_sit_tiny"), tmp_path / "file.pt"
    torch.save(change(told) or told, path)
    with pytest.raises(ElitError, match=said) as raised:
        elit.load(path, **OPEN["elit_sit_tiny"])
    sentence(raised, path)


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("elit_sit_tiny", {}, "leaves num_heads open"),
        ("elit_sit_tiny", {"num_heads": 4}, "leaves tail_depth open"),
        ("elit_sit_tiny", {"num_heads": 5, "tail_depth": 2}, "5 heads"),
        ("elit_sit_tiny", {"num_heads": 0, "tail_depth": 2}, "0 heads"),
        ("elit_sit_tiny", {"num_heads": 4, "tail_depth": 6}, "leave no core"),
        ("sit_tiny", {"num_heads": 4, "head_depth": 2}, "no latent interface"),
        ("sit_tiny", {"num_heads": 4, "weights": "raw"}, "no weights under 'model'"),
        ("sit_tiny", {"num_heads": 4, "weights": "best"}, "'ema' or 'raw'"),
    ],
)
def test_what_a_file_leaves_open(name: str, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ElitError, match=said):
        elit.load(DATA / f"{name}.pt", **given)


def test_a_name_that_does_not_fit_its_tensors_tells_no_heads(tmp_path: Path) -> None:
    told = contents("sit_tiny")
    told["args"].model = "SiT-XL/2"
    torch.save(told, tmp_path / "file.pt")
    with pytest.raises(ElitError, match="4 blocks of width 96, called 'SiT-XL/2', are no published size"):
        elit.load(tmp_path / "file.pt")


# ------------------------------------------------------------------------------------------------ sources


def test_hub_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[Any, ...]] = []

    def download(repo: str, file: str, **hub: Any) -> str:
        asked.append((repo, file, hub))
        return str(DATA / "sit_tiny.pt")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, **_: str(tmp_path))
    model = elit.load("mali6/elit/folder/name.pt", num_heads=4, revision="main")
    assert same_tensors(model.state_dict(), golden("sit_tiny").state_dict())
    assert asked == [("mali6/elit", "folder/name.pt", {"revision": "main"})]
    with pytest.raises(ElitError, match=r"mali6/elit on the Hub has no config.json; .* give mali6/elit/FILE.pt"):
        elit.load("mali6/elit")
    with pytest.raises(ElitError, match=r"there is no model at mali6/elit/name\.bin"):
        elit.load("mali6/elit/name.bin")


def test_load_says_what_it_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_model(golden("sit_tiny"), tmp_path / "saved")
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="elit"):
        elit.load(tmp_path / "saved")
        golden("elit_sit_tiny")
    first, second = caplog.messages
    assert f"{tmp_path / 'saved'} is a saved model: ema weights of SiT-4x96/2" in first
    assert "elit_sit_tiny.pt is a published checkpoint: ema of ELIT-SiT-8x96/2 with 2.1 M parameters" in second
    with pytest.raises(ElitError, match="says its num_heads itself"):
        elit.load(tmp_path / "saved", num_heads=4)


def test_load_says_that_a_path_is_not_the_usual_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    told = contents("sit_tiny")
    told["args"].path_type = "cosine"
    torch.save(told, tmp_path / "file.pt")
    with caplog.at_level(logging.INFO, logger="elit"):
        elit.load(tmp_path / "file.pt", num_heads=4)
    assert "sample with path='cosine'" in caplog.text


# ------------------------------------------------------------------------------------------------ converting


@pytest.mark.parametrize("name", OPEN)
def test_round_trip_is_bit_identical(name: str, tmp_path: Path) -> None:
    source, folder, target = DATA / f"{name}.pt", tmp_path / "ours", tmp_path / "back.pt"
    assert str(folder) in convert(source, folder, **OPEN[name])
    assert str(target) in convert(folder, target)

    before = contents(name)
    with torch.serialization.safe_globals([Namespace]):
        after = torch.load(target, weights_only=True)
    assert set(after) == {"model", "ema", "args", "steps"}
    assert same_tensors(before["ema"], after["ema"])
    assert same_tensors(before["ema"], after["model"])
    assert after["steps"] == before["steps"]
    assert vars(before["args"]).items() <= vars(after["args"]).items()
    assert target.stat().st_size < 1.02 * source.stat().st_size  # model and ema share what they hold

    state = golden(name).state_dict()
    assert same_tensors(elit.load(folder).state_dict(), state)
    assert same_tensors(elit.load(target).state_dict(), state)  # and nothing is left open


def test_convert_needs_a_new_target_of_the_other_kind(tmp_path: Path) -> None:
    save_model(golden("sit_tiny"), tmp_path / "ours")
    (tmp_path / "there.pt").touch()
    file = DATA / "sit_tiny.pt"
    for source, target, said in (
        (file, tmp_path / "ours", "exists already"),
        (tmp_path / "ours", tmp_path / "there.pt", "exists already"),
        (file, tmp_path / "new.pt", "give a folder"),
        (tmp_path / "ours", tmp_path / "new", "give a .pt file"),
        (tmp_path / "nothing", tmp_path / "new", "there is no model"),
    ):
        with pytest.raises(ElitError, match=said):
            convert(source, target)
    with pytest.raises(ElitError, match="heads and depths itself"):
        convert(tmp_path / "ours", tmp_path / "new.pt", num_heads=4)
    assert not (tmp_path / "new").exists() and not (tmp_path / "new.pt").exists()


def test_convert_leaves_nothing_behind_when_it_fails(tmp_path: Path) -> None:
    convert(DATA / "sit_tiny.pt", tmp_path / "ours", num_heads=4)
    (tmp_path / "ours" / PROVENANCE).write_text('{"args": 3}')
    with pytest.raises(ElitError, match="is damaged"):
        convert(tmp_path / "ours", tmp_path / "new.pt")
    with pytest.raises(ElitError, match="leaves num_heads open"):
        convert(DATA / "sit_tiny.pt", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"positions": "rotary"}, "its positions are rotary"),
        ({"num_classes": 0}, "it has no classes"),
        ({"input_size": (8, 4)}, "not square"),
        ({"patch_size": (2, 4)}, "not square"),
        ({"interface": InterfaceConfig(group_size=2)}, "its interface is not the published one"),
        ({"interface": InterfaceConfig(group_size=(1, 4, 1), variant="published")}, "its interface is not"),
    ],
)
def test_models_that_the_published_layout_cannot_hold(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    fields = {"input_size": 8, "width": 16, "depth": 3, "num_heads": 2, "head_depth": 1, "tail_depth": 1}
    model = DiT(DiTConfig(**(fields | {"positions": "sincos"} | changes)))
    with pytest.raises(ElitError, match=said):
        save_published(model, tmp_path / "file.pt")
    assert not list(tmp_path.iterdir())


def test_a_file_of_the_published_layout_carries_the_average_twice(tmp_path: Path) -> None:
    save_published(golden("sit_tiny"), tmp_path / "file.pt", steps=3)
    average, raw = read(tmp_path / "file.pt"), read(tmp_path / "file.pt", "raw")
    assert (average.key, raw.key, average.steps) == ("ema", "model", 3)
    assert same_tensors(average.tensors, raw.tensors)


def test_reading_imports_nothing_else(tmp_path: Path) -> None:
    loaded = set(sys.modules)
    load_published(DATA / "sit_tiny.pt", num_heads=4)
    assert not {name for name in set(sys.modules) - loaded if name.split(".")[0] in ("transformers", "diffusers")}
