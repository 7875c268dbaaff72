"""What other libraries need of us: elastic versions of diffusers transformers, and how they are guided and counted.

The modules ``elastic``, ``families``, ``guider`` and ``cost`` import diffusers: ``pip install
'elit-diffusion[retrofit]'``.
"""

from typing import Any

from elit.errors import ElitError
from elit.integrations.distillation import distillation_loss
from elit.interface.retrofit import Start

__all__ = ["KNOWN_BASES", "distillation_loss", "elastify"]

KNOWN_BASES = ("qwen-image", "flux", "sd3.5", "pixart", "dit-xl", "wan")
"""Published transformers whose elastic versions are counted from their configurations, see :mod:`~.cost`."""


def elastify(
    transformer: Any,
    read_after: int | None = None,
    write_after: int | None = None,
    *,
    group_size: int | tuple[int, ...] | None = None,
    min_latents: int | None = None,
    start: Start = "base",
) -> Any:
    """Makes an elastic transformer of a pretrained one of diffusers, whose pipelines run it unmodified.

    The result is a new model of a subclass, ``Elastic<class of the base>``, in the mode, precision and place of the
    base. It shares the weights of the base, which stays as it was: train a copy of the base where it must not change
    with the elastic model.

    Args:
        transformer: a ``DiTTransformer2DModel``, ``PixArtTransformer2DModel``, ``SD3Transformer2DModel``,
            ``FluxTransformer2DModel``, ``QwenImageTransformer2DModel`` or ``WanTransformer3DModel``.
        read_after: the number of blocks before Read; None is 2/15 of all, as the paper did with Qwen-Image (8 of 60).
        write_after: the number of blocks before Write; None leaves as many after Write as there are before Read.
        group_size: side of a window in tokens, or (height, width), or (time, height, width); None is 4, for video
            (1, 2, 4). J is the number of tokens in a window.
        min_latents: the smallest number of latents per window; None is J / 16.
        start: what the model does before any training: see :class:`~elit.interface.RetrofitInterface`. With ``base`` it
            answers as its base does at full budget.

    Raises:
        ElitError: a model that is not supported, is elastic already, or does not fit; or diffusers is missing.
    """
    try:
        from elit.integrations.families import elastic_version
    except ImportError as error:
        raise ElitError(f"retrofits need {error.name}: pip install 'elit-diffusion[retrofit]'") from error
    return elastic_version(transformer, read_after, write_after, group_size, min_latents, start)
