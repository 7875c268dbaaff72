"""Text encoders of ``transformers``: prompts to the conditions of text models."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elit.conditions import Text
from elit.data.captions import WordVectors
from elit.errors import ElitError
from elit.launch import default_device

WORDS = "words"
INDEX = "model_index.json"  # what a folder of a pipeline of diffusers has


def open_encoder(source: str | Path, device: torch.device | str | None = None) -> Callable[[Sequence[str]], Text]:
    """Opens a text encoder: ``words`` for :class:`~elit.data.captions.WordVectors`, the folder of one of
    :data:`PIPELINES` for :class:`PipelineEncoder`, else a :class:`TextEncoder`.

    Raises:
        ElitError: nothing usable is there, or what it needs is not installed.
    """
    if source == WORDS:
        return WordVectors()
    own_way = _pipeline_at(source) in PIPELINES
    return PipelineEncoder(source, device) if own_way else TextEncoder(source, device=device)


def _pipeline_at(source: str | Path) -> str | None:
    """Returns the class of the pipeline in a folder; None where there is none.

    Raises:
        ElitError: its index is damaged.
    """
    index = Path(source) / INDEX
    if not index.is_file():
        return None
    try:
        return str(json.loads(index.read_text())["_class_name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ElitError(f"{index} is damaged; give the folder of a pipeline of diffusers, or a text encoder") from error


class TextEncoder:
    """Encodes prompts with a text encoder of ``transformers`` (T5, CLIP, BERT, ...), the text part of a larger model.

    Args:
        source: a local folder or a Hub id; or the local folder of a pipeline of diffusers, whose first text encoder it
            is.
        max_length: longest prompt in tokens; the rest is cut off. None is the tokenizer's.
        device: None is the GPU of the process, where there is one.

    Attributes:
        width: of its embeddings.

    Raises:
        ElitError: transformers is not installed, or nothing usable is there.
    """

    def __init__(
        self, source: str | Path, max_length: int | None = None, device: torch.device | str | None = None
    ) -> None:
        try:
            from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer
        except ImportError as error:
            raise ElitError("text encoders need transformers: pip install 'elit-diffusion[text]'") from error
        place = ("tokenizer", "text_encoder") if (Path(source) / INDEX).is_file() else ("", "")
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(source, subfolder=place[0])
            saved = AutoConfig.from_pretrained(source, subfolder=place[1]).architectures or ()
            # half of an encoder-decoder, as pipelines have it, has no weights of the other half
            kind = AutoModelForTextEncoding if any(name.endswith("EncoderModel") for name in saved) else AutoModel
            whole = kind.from_pretrained(source, subfolder=place[1])
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ElitError(f"there is no text encoder at {source}; give a folder or a Hub id ({reason})") from error
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        of_text = whole.get_encoder() if whole.config.is_encoder_decoder else getattr(whole, "text_model", whole)
        self.device = default_device() if device is None else device
        self.model = of_text.to(self.device).eval().requires_grad_(False)
        self.max_length = max_length

    @property
    def width(self) -> int:
        return self.model.config.hidden_size

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Text:
        """Encodes prompts, padded on the right to the longest of them; ``[""]`` is the empty prompt."""
        found = self.tokenizer(
            list(prompts), padding=True, padding_side="right", truncation=True, max_length=self.max_length,
            return_tensors="pt",
        ).to(self.device)  # fmt: skip
        tokens = self.model(input_ids=found.input_ids, attention_mask=found.attention_mask).last_hidden_state
        return Text(tokens.float(), found.attention_mask.bool())


class PipelineEncoder:
    """Encodes prompts with the text encoders of a pipeline of diffusers, as the pipeline does: those of Stable
    Diffusion 3, FLUX and Qwen-Image.

    Where a prompt has one vector for the whole beside its tokens (Stable Diffusion 3, FLUX), it stands before them as
    one token more, filled up with zeros to their width.

    Args:
        source: the local folder of the pipeline.
        device: None is the GPU of the process, where there is one.

    Raises:
        ElitError: diffusers is not installed, or the encoders cannot be read.
    """

    def __init__(self, source: str | Path, device: torch.device | str | None = None) -> None:
        try:
            from diffusers import DiffusionPipeline
        except ImportError as error:
            raise ElitError("pipelines need diffusers: pip install 'elit-diffusion[retrofit]'") from error
        try:
            pipeline = DiffusionPipeline.from_pretrained(source, transformer=None, vae=None)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ElitError(f"cannot read the text encoders of the pipeline {source} ({reason})") from error
        self.pipeline: Any = pipeline.to(default_device() if device is None else device)
        self.embed = PIPELINES[type(pipeline).__name__]

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Text:
        """Encodes prompts, all to the same length; ``[""]`` is the empty prompt."""
        return self.embed(self.pipeline, list(prompts))


def _of_stable_diffusion_3(pipeline: Any, prompts: list[str]) -> Text:
    tokens, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
    return _with_pooled(tokens, pooled)


def _of_flux(pipeline: Any, prompts: list[str]) -> Text:
    tokens, pooled, _ = pipeline.encode_prompt(prompts, None)
    return _with_pooled(tokens, pooled)


def _of_qwen_image(pipeline: Any, prompts: list[str]) -> Text:
    tokens, mask = pipeline.encode_prompt(prompts)  # no mask means that all tokens are there
    mask = torch.ones(tokens.shape[:2], device=tokens.device) if mask is None else mask
    return Text(tokens.float(), mask.bool())


def _with_pooled(tokens: Tensor, pooled: Tensor) -> Text:
    """Puts the vector for the whole (B, P) before the tokens (B, L, D)."""
    first = F.pad(pooled, (0, tokens.shape[2] - pooled.shape[1]))
    together = torch.cat((first[:, None], tokens), dim=1).float()
    return Text(together, torch.ones(together.shape[:2], dtype=torch.bool, device=together.device))


PIPELINES: dict[str, Callable[[Any, list[str]], Text]] = {
    "StableDiffusion3Pipeline": _of_stable_diffusion_3,
    "FluxPipeline": _of_flux,
    "QwenImagePipeline": _of_qwen_image,
}
"""The pipelines that embed prompts in a way of their own. Of others, the first text encoder does it."""
