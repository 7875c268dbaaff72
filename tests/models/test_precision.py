"""One policy of precision for every backbone: float32 residual stream, half-precision matrix products."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elit.interface import InterfaceConfig, Read, Write
from elit.layers import CrossAttention, Linear, SelfAttention
from elit.models import Transformer
from tests.helpers.models import PUBLISHED, inputs
from tests.helpers.models import tiny as tiny_dit
from tests.helpers.stacks import ELASTIC, tiny

NAMES = [*ELASTIC, "published", "plain UViT", "plain HDiT"]


def model_named(name: str) -> Transformer:
    if name == "published":
        return tiny_dit(interface=PUBLISHED, positions="sincos", qk_norm=False)
    plain, _, family = name.rpartition(" ")
    return tiny(f"ELIT-{family}", interface=None) if plain == "plain" else tiny(name)


def in_half(model: Transformer, way: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Runs a forward under autocast, or with cast weights."""
    x, t, y = inputs(model, 2)
    if way == "autocast":
        with torch.autocast("cpu", dtype):
            return model(x, t, y)
    model = model.to(dtype)
    y = y._replace(tokens=y.tokens.to(dtype)) if model.takes_text else y
    return model(x.to(dtype), t, y)


@pytest.mark.parametrize("way", ["autocast", "weights"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_tokens_are_float32_and_products_are_not(name: str, way: str) -> None:
    model, streams, products = model_named(name), set(), set()

    def stream(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        tokens = [arg for arg in (*args, output) if isinstance(arg, Tensor) and arg.dim() > 2]
        streams.update(token.dtype for token in tokens)

    for part in model.modules():
        if isinstance(part, Read | Write):
            part.register_forward_hook(stream)
        elif isinstance(part, SelfAttention | CrossAttention):
            part.register_forward_hook(lambda module, args, output: products.add(output.dtype))
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: streams.add(args[0].dtype))
        block.register_forward_hook(
            lambda module, args, output: streams.add((output[0] if isinstance(output, tuple) else output).dtype)
        )
    in_half(model, way)
    assert streams == {torch.float32}
    assert products == {torch.bfloat16} or (not products and model.takes_text)


@pytest.mark.parametrize("way", ["autocast", "weights"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_half_precision_is_near_float32(name: str, way: str) -> None:
    exact = model_named(name)(*inputs(model_named(name), 2))
    error = (in_half(model_named(name), way).float() - exact).square().mean().sqrt()
    assert error < 0.02 * exact.square().mean().sqrt()  # bfloat16 has 8 bits: 0.4 % in each product


@torch.no_grad()
def test_weights_of_the_interface_alone_do_not_lower_the_stream() -> None:
    model = tiny_dit(interface=InterfaceConfig(group_size=2)).bfloat16()
    assert model.interface is not None
    c = torch.randn(2, 32).bfloat16()
    assert model.interface.read(torch.randn(2, 4, 4, 32), c, 2).dtype == torch.float32
    assert isinstance(model.patch_embed, Linear)
