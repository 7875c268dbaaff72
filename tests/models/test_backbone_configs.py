"""The configurations of other backbones and of video: they build, and cost what they say."""

import re
from pathlib import Path
from typing import Any

import pytest

from elit.analysis import count_flops, on_meta
from elit.models import config_for
from tests.training.test_configs import load

FOLDER = Path(__file__).parents[2] / "configs/train"
KINDS = ("*uvit*", "*hdit*", "*mmdit*", "*kinetics*", "*-digits")
FILES = sorted(path for kind in KINDS for path in FOLDER.glob(f"{kind}.yaml"))


def test_there_are_files() -> None:
    assert len(FILES) == 19


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_configuration_builds_and_costs_what_it_says(path: Path) -> None:
    text = path.read_text()
    config = load(path)
    resolution = re.search(r"--resolution (\d+)", text)
    size: dict[str, Any] = {"moving-digits": (8, 16, 16), "captioned-digits": 16}
    fitted = {"input_size": size[path.stem], "in_channels": 1} if path.stem in size else {}
    choice = config.model
    model = on_meta(config_for(choice.name, int(resolution[1]) if resolution else 256, **(fitted | choice.fields)))
    if "kinetics" in path.stem and model.interface is not None:
        assert model.interface.grid.window == (2, 4, 4)
    stated = re.search(r"# Cost: ([\d.]+) GFLOPs", text)
    assert (stated is None) == (path.stem in size)
    if stated and not path.stem.endswith("-mb"):  # theirs is the mean over up to 61 levels
        assert count_flops(model.config).total / 1e9 == pytest.approx(float(stated[1]), abs=0.05)
