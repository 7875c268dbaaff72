"""Scenes of digits: what is on the canvas, and where."""

import torch
import torch.nn.functional as F

from elit.data import open_data, scenes
from elit.data.digits import DIGIT, digits8
from elit.data.scenes import CANVAS, STEP, layouts


def test_scenes_are_what_they_say() -> None:
    for held_out, count in ((False, 12_000), (True, 2_000)):
        data = open_data("scenes", held_out)
        assert data.shape == (1, 32, 32)
        assert (len(data), data.num_classes) == (count, 10)
        assert data.labels.bincount().tolist() == [count // 10] * 10  # type: ignore[attr-defined]


def test_layouts_are_all_ways_without_overlap() -> None:
    places = range(0, CANVAS - DIGIT + 1, STEP)
    apart = {
        frozenset({(a, b), (c, d)})
        for a in places
        for b in places
        for c in places
        for d in places
        if max(abs(a - c), abs(b - d)) >= DIGIT
    }
    assert {frozenset(map(tuple, way)) for way in layouts(2).tolist()} == apart
    assert len(layouts(1)) == len(places) ** 2
    for number in (3, 4):
        ways = layouts(number)
        distance = (ways[:, :, None] - ways[:, None]).abs().amax(-1) + CANVAS * torch.eye(number, dtype=torch.long)
        assert distance.min() >= DIGIT


def test_a_scene_holds_one_to_four_digits_of_its_class() -> None:
    """Every canvas is taken apart into digits of its own part of the data, until nothing is left."""
    source, data = digits8(held_out=True), scenes(held_out=True)
    large = F.interpolate(source.images, size=(DIGIT, DIGIT), mode="bicubic", align_corners=False).clamp(-1, 1)[:, 0]
    numbers = []
    for image, label in zip(data.images[:60, 0].clone(), data.labels[:60].tolist(), strict=True):
        known = large[source.labels == label]
        found = 0
        for row in range(0, CANVAS - DIGIT + 1, STEP):
            for column in range(0, CANVAS - DIGIT + 1, STEP):
                crop = image[row : row + DIGIT, column : column + DIGIT]
                if (crop == known).flatten(1).all(1).any():
                    crop.fill_(-1)
                    found += 1
        assert (image == -1).all()
        numbers.append(found)
    assert set(numbers) == {1, 2, 3, 4}
