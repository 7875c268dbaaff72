"""U-ViT against plain loops, and the splits that its skips allow."""

from typing import Any

import numpy as np
import pytest
import torch

import elit
from elit import ElitError
from elit.models import UViT
from tests.helpers import reference
from tests.helpers.models import inputs
from tests.helpers.stacks import Positions, Vectors, check_stack, tiny


def plain_blocks(model: UViT, c: np.ndarray) -> Any:
    """Blocks first..end - 1 on vectors; what a block gives is remembered for its mirror image."""
    config, weights = model.config, reference.weights_of(model)
    remembered: dict[int, Vectors] = {}

    def blocks(first: int, end: int, x: Vectors, positions: Positions) -> Vectors:
        for i in range(first, end):
            mirror = config.depth - 1 - i
            if mirror < config.depth // 2 - 2:
                pairs = zip(x, remembered[mirror], strict=True)
                x = [reference.linear(weights, f"joins.{mirror}", np.concatenate(pair)) for pair in pairs]
            own = reference.part(weights, f"blocks.{i}")
            x = remembered[i] = reference.block(own, x, c, config.num_heads, positions, config.rope_theta)
        return x

    return blocks


@pytest.mark.parametrize("name", ["ELIT-UViT", "ELIT-UViT, deep head"])
@pytest.mark.parametrize("level", [1, 3, 4])
def test_the_stack_is_the_plain_loops(name: str, level: int) -> None:
    check_stack(tiny(name).double(), plain_blocks, level)


@pytest.mark.parametrize("depth", [3, 4, 5, 7, 8])
def test_the_plain_stack_is_the_plain_loops(depth: int) -> None:
    model = tiny("ELIT-UViT", interface=None, depth=depth).double()
    assert len(model.joins) == max(0, depth // 2 - 2)
    x, t, y = inputs(model, 1, dtype=torch.float64)
    c, places = model.condition(t, y), reference.places((1, 4, 4), False)
    tokens = list(reference.array(model.embed(x, (1, 4, 4))[0]))
    tokens = plain_blocks(model, reference.array(c[0]))(0, depth, tokens, places)
    velocity = model.project(torch.from_numpy(np.array(tokens))[None], c, model.encode(x, t, y))
    torch.testing.assert_close(model(x, t, y), velocity, rtol=0, atol=1e-10)  # float64, up to 8 blocks


@pytest.mark.parametrize(("head", "tail"), [(4, 3), (0, 1), (3, 12), (11, 12)])
def test_a_split_that_a_skip_would_cross_is_refused(head: int, tail: int) -> None:
    with pytest.raises(ElitError, match="a long skip of the U-ViT would join tokens and latents; take equal depths, or "
                                        "at least 12 for both"):  # fmt: skip
        elit.models.config_for("ELIT-UViT-XL/2", head_depth=head, tail_depth=tail)


@pytest.mark.parametrize(("head", "tail"), [(4, 4), (0, 0), (12, 15), (15, 12)])
def test_other_splits_are_fine(head: int, tail: int) -> None:
    config = elit.models.config_for("ELIT-UViT-XL/2", head_depth=head, tail_depth=tail)
    assert config.core_depth == 28 - head - tail


def test_a_plain_model_has_no_split_to_check() -> None:
    assert elit.models.config_for("UViT-XL/2", head_depth=4, tail_depth=3).interface is None
