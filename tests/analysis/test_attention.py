"""Maps and correlations against plain loops and scipy."""

import numpy as np
import torch
from scipy.stats import entropy, spearmanr

from elit.analysis import AttentionMaps, attention_maps, correlate, mean_maps
from elit.layers import rotate
from tests.helpers.models import tiny


def test_maps_of_latents_against_a_loop() -> None:
    """The softmax of Read once more by hand, from its queries and keys, placed back token by token."""
    model = tiny()
    x, noise, y = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.tensor([1, 5])
    maps = attention_maps(model, x, y, 0.3, noise, budget=0.75)
    read = model.interface.read_layer  # type: ignore[union-attr]
    seen = {}
    hook = read.register_forward_hook(lambda module, inputs, output: seen.update(inputs=inputs))
    model(0.7 * x + 0.3 * noise, torch.full((2,), 0.3), y, budget=0.75)
    hook.remove()
    latents, windows, c, rope, _ = seen["inputs"]
    shift, scale = read.modulation(c, 4)[:2]
    context = read.context_norm(windows) * (1 + scale) + shift
    side, heads = 2, model.config.num_heads
    for b in range(2):
        entropies = torch.zeros(3)
        for g in range(4):
            q = read.attention.q_norm(read.attention.q(read.query_norm(latents[b, g])).unflatten(-1, (heads, -1)))
            k = read.attention.k_norm(read.attention.kv(context[b, g]).chunk(2, -1)[0].unflatten(-1, (heads, -1)))
            k = rotate(k.transpose(0, 1), rope)
            scores = torch.einsum("qhd,hkd->hqk", q, k) / q.shape[-1] ** 0.5
            weights = scores.softmax(-1).mean(0)  # (J~, J)
            for token in range(4):
                row, column = g // 2 * side + token // side, g % 2 * side + token % side
                torch.testing.assert_close(maps.latents[b, :, row, column], weights[:, token] * 4, rtol=1e-4, atol=1e-5)
            entropies += torch.from_numpy(entropy(weights.detach().numpy(), base=4, axis=1)) / 4
        torch.testing.assert_close(maps.entropy[b], entropies, rtol=1e-4, atol=1e-5)  # float32
    torch.testing.assert_close(maps.attention, maps.latents.mean(1))


def test_mean_over_noises() -> None:
    model, x, y = tiny(), torch.randn(2, 3, 8, 8), torch.tensor([1, 5])
    noises = torch.randn(3, *x.shape)
    mean = mean_maps(model, x, y, 0.5, noises)
    each = [attention_maps(model, x, y, 0.5, noise) for noise in noises]
    torch.testing.assert_close(mean.latents, sum(m.latents for m in each) / 3)
    torch.testing.assert_close(mean.loss, sum(m.loss for m in each) / 3)


def test_correlations_against_scipy() -> None:
    maps = AttentionMaps(torch.rand(6, 5, 4, 4), torch.rand(6, 5), torch.rand(6, 4, 4))
    found = correlate(maps)
    attention, loss = maps.attention.flatten(1).numpy(), maps.loss.flatten(1).numpy()
    expected = {
        "same_image": [spearmanr(attention[i], loss[i]).statistic for i in range(6)],
        "another_image": [spearmanr(attention[i - 1], loss[i]).statistic for i in range(6)],
        "entropy": [spearmanr(range(5), row).statistic for row in maps.entropy.numpy()],
    }
    for name, values in expected.items():
        interval = getattr(found, name)
        np.testing.assert_allclose(interval.mean, np.mean(values), atol=1e-6)
        np.testing.assert_allclose(interval.half_width, 1.96 * np.std(values, ddof=1) / 6**0.5, rtol=1e-5)
    two = AttentionMaps(maps.latents[:, :2], maps.entropy[:, :2], maps.loss)
    assert correlate(two).entropy is None
