"""Models on disk: what is saved comes back, and whatever is wrong with a file is one sentence that names it."""

import json
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import elit
from elit import ElitError
from elit.interface import InterfaceConfig
from elit.models import DiT, Model
from elit.models.files import CONFIG, TRAINING, WEIGHTS, checkpoints, load_model, resolve, save_model
from elit.tensors import read_tensors
from tests.helpers.models import PUBLISHED, inputs, tiny


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


MODELS: dict[str, dict[str, Any]] = {
    "elastic": {},
    "plain": {"interface": None},
    "published": {"interface": PUBLISHED, "positions": "sincos", "qk_norm": False},
    "video": {"input_size": (2, 8, 8), "patch_size": (1, 2, 2), "interface": InterfaceConfig((2, 2, 2), 2)},
    "unconditional": {"num_classes": 0},
}


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("read", [elit.load, DiT.from_pretrained, Model.from_pretrained, load_model])
def test_what_is_saved_comes_back_to_the_bit(
    read: Callable[[Path], DiT], dtype: torch.dtype, changes: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny(seed=3, **changes).to(dtype)
    model.save_pretrained(tmp_path / "model")
    again = read(tmp_path / "model")
    assert again.config == model.config
    assert type(again) is DiT
    assert not again.training
    assert again.dtype == dtype
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    x, t, y = inputs(model, 2, dtype=dtype)
    y = None if model.config.num_classes == 0 else y
    assert torch.equal(again(x, t, y), model(x, t, y))


def test_a_model_loads_in_the_precision_asked_for(saved: Path) -> None:
    model = elit.load(saved, dtype=torch.float64)
    x, t, y = inputs(model, 2, dtype=torch.float64)
    torch.testing.assert_close(model(x, t, y), tiny().double()(x, t, y), rtol=0, atol=0)


def test_half_a_model_widened_again_keeps_its_exact_positions(tmp_path: Path) -> None:
    """Weights saved in bfloat16 and loaded in float32 are rounded; the tables that are not weights must not be."""
    tiny().bfloat16().save_pretrained(tmp_path / "model")
    model, expected = elit.load(tmp_path / "model", dtype=torch.float32), tiny()
    expected.load_state_dict(model.state_dict())
    x, t, y = inputs(model, 2)
    assert torch.equal(model(x, t, y), expected(x, t, y))


def test_the_files_are_a_configuration_weights_and_a_card(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == ["README.md", CONFIG, WEIGHTS]
    described = json.loads((saved / CONFIG).read_text())
    assert described["architecture"] == "DiT"
    assert described["elit_version"] == elit.__version__
    assert described["interface"]["group_size"] == 2
    assert "library_name: elit" in (saved / "README.md").read_text()


def test_a_model_can_be_saved_over_another(saved: Path) -> None:
    tiny(seed=9, depth=3).save_pretrained(saved)
    assert elit.load(saved).config.depth == 3


def test_other_weights_of_the_same_names_can_be_saved(tmp_path: Path) -> None:
    model, other = tiny(), tiny(seed=5)
    save_model(model, tmp_path, other.state_dict())
    assert torch.equal(elit.load(tmp_path).patch_embed.weight, other.patch_embed.weight)


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_loading_draws_no_random_numbers(changes: dict[str, Any], tmp_path: Path) -> None:
    tiny(**changes).save_pretrained(tmp_path)
    before = torch.get_rng_state()
    elit.load(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loaded_model_can_be_trained_and_its_file_stays(saved: Path) -> None:
    before = (saved / WEIGHTS).read_bytes()
    model = elit.load(saved)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, p in tiny().named_parameters() if p.requires_grad
    }
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert (saved / WEIGHTS).read_bytes() == before
    assert not torch.equal(model.patch_embed.weight, elit.load(saved).patch_embed.weight)


@pytest.mark.parametrize("shift", range(8, 64, 8))
def test_weights_anywhere_in_a_file_give_the_same_bits(shift: int, saved: Path) -> None:
    """Older versions of safetensors let them begin at any multiple of 8 bytes; kernels round by where they begin."""
    expected = tiny()
    x, t, y = inputs(expected, 1)
    content = (saved / WEIGHTS).read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size] + b" " * shift
    (saved / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
    assert torch.equal(elit.load(saved)(x, t, y), expected(x, t, y))


@pytest.mark.parametrize("dtype", [None, torch.float64], ids=str)
def test_the_raw_weights_of_a_checkpoint(dtype: torch.dtype | None, saved: Path) -> None:
    other = tiny(seed=5)
    tensors = {f"raw.{name}": value for name, value in other.state_dict().items()}
    save_file(tensors | {"optimizer": torch.zeros(1)}, saved / TRAINING)
    model = elit.load(saved, weights="raw", dtype=dtype)
    x, t, y = inputs(model, 2, dtype=model.dtype)
    assert torch.equal(model(x, t, y), other.to(dtype)(x, t, y))


@pytest.mark.parametrize(
    ("argument", "why"),
    [
        ({"misspelt": 1}, "load has no option 'misspelt'; those of the Hub are revision, token"),
        ({"device": "abacus"}, "there is no device 'abacus' here"),
        ({"device": "cuda:77"}, "there is no device 'cuda:77' here"),
        ({"device": "mps"}, "mps is not supported"),
        ({"dtype": "bfloat16"}, r"dtype is 'bfloat16'; it must be a floating-point dtype of torch"),
        ({"dtype": torch.int8}, r"dtype is torch.int8; it must be a floating-point dtype of torch"),
        ({"weights": "best"}, "weights is 'best'; it is 'ema' or 'raw'"),
    ],
)
def test_a_wrong_argument_is_named(argument: dict[str, Any], why: str, saved: Path) -> None:
    for read in (elit.load, DiT.from_pretrained):
        with pytest.raises(ElitError, match=why):
            read(saved, **argument)


def test_others_may_read_what_is_saved(saved: Path) -> None:
    rights = {path.name: path.stat().st_mode & 0o777 for path in saved.iterdir()}
    assert rights[WEIGHTS] == rights[CONFIG]


@pytest.mark.parametrize(
    ("name", "title"),
    [("ELIT-DiT-S/2", "# ELIT-DiT-S/2, "), ("SiT-S/4", "# SiT-S/4, "), ("ELIT-UViT-S/2", "# ELIT-UViT-S/2, ")],
)
def test_the_card_has_the_name_of_the_model(name: str, title: str, tmp_path: Path) -> None:
    elit.create(name, resolution=128).save_pretrained(tmp_path / "named")
    assert title in (tmp_path / "named/README.md").read_text()
    tiny().save_pretrained(tmp_path / "unnamed")
    assert "# ELIT-DiT-4x32/2, " in (tmp_path / "unnamed/README.md").read_text()


# ------------------------------------------------------------------------------------------------ writing


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ElitError, match=r"^cannot save to .*file/model: Not a directory$"):
        tiny().save_pretrained(tmp_path / "file" / "model")
    with pytest.raises(ElitError, match=r"^cannot write .*file/model/"):
        save_model(tiny(), tmp_path / "file" / "model")


def save_on_a_small_disk(folder: str) -> None:
    """Run in a process of its own: no file may grow beyond 20 kB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        tiny().save_pretrained(folder)
    except ElitError as error:
        print(error)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    code = f"from test_files import save_on_a_small_disk as save; save({str(tmp_path / 'model')!r})"
    paths = f"import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}; "
    ran = subprocess.run([sys.executable, "-c", paths + code], capture_output=True, text=True, check=True)
    assert ran.stdout.startswith(f"cannot write {tmp_path}/model/{WEIGHTS}: ")
    assert "File too large" in ran.stdout
    assert list((tmp_path / "model").iterdir()) == []


# ------------------------------------------------------------------------------------------------ damaged files


def edited(folder: Path, **changes: Any) -> Path:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"widht": 64}, "widht"),
        ({"width": "wide"}, r"width.*wide"),
        ({"width": 33}, "width 33 does not give 4 heads"),
        ({"num_heads": 0}, "config.json"),
        ({"depth": 2}, "no core in depth 2"),
        ({"positions": "none"}, r"positions.*none"),
        ({"interface": {"group_size": 2, "levels": 3}}, "levels"),
        ({"interface": {"group_size": "big"}}, r"group_size.*big"),
        ({"interface": {"variant": "mine"}}, r"variant.*mine"),
        ({"interface": {"group_size": [2, 2, 2, 2]}}, r"config.json: size .2, 2, 2, 2. is neither"),
        ({"interface": {"group_size": 3}}, "group size 3 does not divide the 4 tokens"),
        ({"interface": {"group_size": 2, "min_latents": 5}}, "min_latents is 5"),
        ({"patch_size": 3}, r"patch size .*3.* does not divide the input size"),
        ({"input_size": [8]}, r"size \(8,\) is neither"),
        ({"architecture": "ResNet"}, r"config.json names the architecture 'ResNet'; known are DiT"),
        ({"architecture": ["DiT"]}, "config.json is not a model configuration"),
    ],
)
def test_a_wrong_configuration_says_what_is_wrong(changes: dict[str, Any], why: str, saved: Path) -> None:
    for read in (elit.load, DiT.from_pretrained):
        with pytest.raises(ElitError, match=why) as caught:
            read(edited(saved, **changes))
        assert "\n" not in str(caught.value)


TYPES: dict[str, tuple[Any, ...]] = {  # of each kind of field, values of another type
    "width": ("64", 64.0, True, None, [64], {}),
    "mlp_ratio": ("4", True, None, [4.0]),
    "qk_norm": (1, "true", None, []),
    "positions": (None, 3, ["rotary"], {"rotary": 1}),
    "input_size": (8.0, "8", True, ["8"], [8, 8.5], [True, 8], {"0": 8}, None),
    "interface": ("paper", 2, [2], True),
    "interface.group_size": ([1, 2, "2"], 2.0, None),
    "interface.min_latents": ("1", 1.0, [1], False),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in TYPES.items() for value in values])
def test_a_value_of_another_type_is_named_with_its_key(key: str, value: Any, saved: Path) -> None:
    outer, _, inner = key.partition(".")
    with pytest.raises(
        ElitError, match=rf"^{re.escape(str(saved / CONFIG))}: {key} is .*; it must be of type "
    ) as told:
        elit.load(edited(saved, **{outer: {inner: value} if inner else value}))
    assert repr(value) in str(told.value)


def test_whole_numbers_are_numbers(saved: Path) -> None:
    config = elit.load(edited(saved, mlp_ratio=4, rope_theta=100, input_size=[8, 8])).config
    assert (config.mlp_ratio, config.rope_theta, config.input_size) == (4.0, 100.0, (8, 8))
    assert type(config.mlp_ratio) is float


@pytest.mark.parametrize("name", ["payload.X", "m.payload.X", "payload", "m.payload"])
@pytest.mark.parametrize(
    "disguise",
    [
        lambda name: {"interface": name},
        lambda name: {"interface": {"class_path": name}},
        lambda name: {"interface": {"class_path": name, "init_args": {"group_size": 2}}},
        lambda name: {"interface": {"group_size": {"class_path": name}}},
        lambda name: {"class_path": name},
        lambda name: {"architecture": name},
        lambda name: {"input_size": {"class_path": name}},
        lambda name: {"__path__": name, "config": name},
    ],
)
def test_a_configuration_imports_nothing(
    disguise: Callable[[str], dict[str, Any]], name: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a module of the working directory nor one that came with the model."""
    model = shutil.copytree(saved, tmp_path / "m")
    for folder in (tmp_path, model):
        (folder / "payload.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w').close()\nclass X: pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ElitError, match=r"config\.json"):
        elit.load(edited(model, **disguise(name)))
    assert not (tmp_path / "marker").exists()
    assert not {"payload", "m", "m.payload"} & sys.modules.keys()


@pytest.mark.parametrize(
    "text", ["", "not json", "[" * 100_000, "{", "[]", "3", "null", "{}", '{"width": 64}', "\x00\xff"]
)
def test_what_is_no_configuration_is_named(text: str, saved: Path) -> None:
    (saved / CONFIG).write_bytes(text.encode("latin-1"))
    for read in (elit.load, DiT.from_pretrained):
        with pytest.raises(ElitError, match=r"model/config.json is not a model configuration of this library"):
            read(saved)


def test_a_configuration_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ElitError, match=r"^no model in .*: cannot read config.json \(No such file"):
        load_model(tmp_path)


@pytest.mark.parametrize("keep", [0, 1, 7, 100, 1000, -1])
def test_truncated_weights_are_named(keep: int, saved: Path) -> None:
    data = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(data[:keep])
    with pytest.raises(ElitError, match=r"model/model.safetensors is damaged or not a safetensors file .*again$"):
        elit.load(saved)


def test_weights_that_are_something_else_are_named_and_not_executed(saved: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[..., None], tuple[int]]:
            return sys.exit, (3,)

    torch.save({"model": Bomb()}, saved / WEIGHTS)
    with pytest.raises(ElitError, match="is damaged or not a safetensors file"):
        elit.load(saved)


def test_missing_weights_are_named(saved: Path) -> None:
    (saved / WEIGHTS).unlink()
    with pytest.raises(ElitError, match=r"^no weights: .*model.safetensors does not exist$"):
        elit.load(saved)
    with pytest.raises(ElitError, match="no weights"):
        read_tensors(saved / "nothing")


def test_weights_of_another_model_say_what_does_not_fit(saved: Path) -> None:
    tensors = load_file(saved / WEIGHTS)

    def refused(changed: dict[str, torch.Tensor]) -> str:
        save_file(changed, saved / WEIGHTS)
        with pytest.raises(ElitError, match=r"model\.safetensors does not fit the model: it ") as caught:
            elit.load(saved)
        return str(caught.value)

    first = "blocks.0.attention.k_norm.weight"
    assert refused({k: v for k, v in tensors.items() if k != first}).endswith(f"lacks {first}")
    assert refused(tensors | {"extra": torch.zeros(1)}).endswith("has unexpected extra")
    assert refused(tensors | {first: torch.zeros(3)}).endswith(f"has wrong shapes: {first} is [3], not [8]")
    assert refused({}).endswith(f"and {len(tensors) - 3} more")


# ------------------------------------------------------------------------------------------------ finding models


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with two checkpoints, the later of which also holds raw weights."""
    save_model(tiny(seed=1), tmp_path / "run" / "checkpoints" / "step-00000100")
    last = tmp_path / "run" / "checkpoints" / "step-00001000"
    save_model(tiny(seed=2), last)
    raw = {f"raw.{name}": value for name, value in tiny(seed=3).state_dict().items()}
    save_file(raw | {"optimizer.step": torch.zeros(1)}, last / TRAINING)
    (tmp_path / "run" / "checkpoints" / ".step-00002000.unfinished").mkdir()
    return tmp_path / "run"


def test_a_run_is_its_latest_whole_checkpoint(run: Path) -> None:
    assert [path.name for path in checkpoints(run)] == ["step-00000100", "step-00001000"]
    assert resolve(run) == resolve(str(run)) == checkpoints(run)[-1]
    assert resolve(checkpoints(run)[0]) == checkpoints(run)[0]
    assert torch.equal(elit.load(run).patch_embed.weight, tiny(seed=2).patch_embed.weight)


def test_the_raw_weights_of_a_run_are_there_on_request(run: Path, saved: Path) -> None:
    raw = elit.load(run, weights="raw")
    assert torch.equal(raw.patch_embed.weight, tiny(seed=3).patch_embed.weight)
    with pytest.raises(ElitError, match="weights is 'best'; it is 'ema' or 'raw'"):
        elit.load(run, weights="best")  # type: ignore[arg-type]
    with pytest.raises(ElitError, match=r"no weights: .*training.safetensors does not exist"):
        elit.load(saved, weights="raw")


def test_a_run_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ElitError, match=f"{tmp_path} holds no model: neither config.json nor checkpoints/"):
        elit.load(tmp_path)


@pytest.mark.parametrize("source", ["missing", "runs/a/b", "./missing", "/missing/run", "~/missing", "a b/c d"])
def test_a_missing_run_is_named_at_once(source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for read in (elit.load, DiT.from_pretrained):
        with pytest.raises(ElitError, match=f"there is no model at {source}"):
            read(source)


@pytest.mark.parametrize("content", ["", "some notes"])
def test_a_file_that_is_no_checkpoint_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text(content)
    for read in (elit.load, DiT.from_pretrained):
        with pytest.raises(ElitError, match=r"/notes\.txt") as caught:
            read(tmp_path / "notes.txt")
        assert "\n" not in str(caught.value)


def test_a_hub_id_without_the_network_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # what HF_HUB_OFFLINE=1 sets at import
    monkeypatch.chdir(tmp_path)
    for read in (elit.load, DiT.from_pretrained):
        with pytest.raises(ElitError, match=r"nobody/nothing.* and the Hub does not give a model") as caught:
            read("nobody/nothing", cache_dir=tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["runs/train", "runs/a.pt", "mine/missing", "mine/missing/file.pt", "file/x"])
def test_a_path_is_not_looked_up_on_the_hub(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``runs`` is where training writes by default, before there is such a folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("elit.models.files._download", lambda *_, **__: pytest.fail("the Hub was asked"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ElitError, match=f"there is no model at {source}: give a run directory"):
        resolve(source)


@pytest.mark.parametrize("given", ["mine/model", "mine/model/file.pt"])
def test_an_id_of_the_hub_can_be_marked_as_one(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    monkeypatch.setattr("elit.models.files._download", lambda repo, file, **_: Path(repo, file))
    assert resolve(f"hf://{given}") == Path(given)
    with pytest.raises(ElitError, match=f"for the Hub's write hf://{given}"):
        resolve(given)
    with pytest.raises(ElitError, match="there is no model at hf://model"):
        resolve("hf://model")


def test_a_hub_id_is_downloaded_with_its_revision(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def download(repo: str, **options: Any) -> str:
        asked.append((repo, options))
        return str(saved)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    model = DiT.from_pretrained("someone/model", revision="v2")
    assert asked == [("someone/model", {"allow_patterns": [CONFIG, WEIGHTS], "revision": "v2"})]
    assert torch.equal(model.patch_embed.weight, tiny().patch_embed.weight)


def test_a_repository_of_something_else_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, **_: str(tmp_path))
    with pytest.raises(ElitError, match=r"someone/else on the Hub has no config\.json"):
        elit.load("someone/else")


def test_a_saved_model_knows_its_own_shape(saved: Path) -> None:
    with pytest.raises(ElitError, match="model says its num_heads itself"):
        elit.load(saved, num_heads=4)


def test_a_model_of_another_class_is_named(saved: Path) -> None:
    class Other(DiT):
        pass

    with pytest.raises(ElitError, match=r"model holds a DiT, not a Other"):
        Other.from_pretrained(saved)


def test_a_copied_folder_is_the_same_model(saved: Path, tmp_path: Path) -> None:
    """Nothing in it depends on where it is."""
    shutil.move(saved, tmp_path / "moved")
    assert elit.load(tmp_path / "moved").config == tiny().config
