"""Text encoders of ``transformers``: prompts to the conditions of text models."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from elit.conditions import Text
from elit.data.captions import WordVectors
from elit.errors import ElitError, first_line
from elit.launch import default_device

WORDS = "words"
UNUSABLE = (ValueError, TypeError, ArithmeticError, RuntimeError)  # what encoders raise when a part is missing
WAN_TOKENS = 512  # to which the pipeline of Wan fills up every prompt
PIPELINE_INDEX = "model_index.json"  # what a folder of a pipeline of diffusers has


def open_encoder(source: str | Path, device: torch.device | str | None = None) -> Callable[[Sequence[str]], Text]:
    """Opens a text encoder: ``words`` for :class:`~elit.data.captions.WordVectors`, the folder of one of
    :data:`PIPELINES` for :class:`PipelineEncoder`, else a :class:`TextEncoder`.

    Raises:
        ElitError: nothing usable is there, or what it needs is not installed.
    """
    if source == WORDS:
        return WordVectors()
    kind = None if (index := pipeline_index(source)) is None else index["_class_name"]
    if kind in PIPELINES:
        return PipelineEncoder(source, device)
    if kind is not None and kind.startswith(PREFIXES):
        raise ElitError(
            f"{source} is a {kind}, whose way with prompts is not known; give the folder of one of "
            f"{', '.join(PIPELINES)}"
        )
    return TextEncoder(source, device=device)


def pipeline_index(source: str | Path) -> dict[str, Any] | None:
    """Reads the index of the pipeline in a local folder, which names its class and its parts; None where there is none.

    Raises:
        ElitError: it is damaged.
    """
    file = Path(source) / PIPELINE_INDEX
    if not file.is_file():
        return None
    try:
        index = json.loads(file.read_text())
        if isinstance(index["_class_name"], str):
            return dict(index)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ElitError(f"{file} is damaged: it names no class of a pipeline; get the folder again")


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
        place = ("tokenizer", "text_encoder") if (Path(source) / PIPELINE_INDEX).is_file() else ("", "")
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(source, subfolder=place[0])
            saved = AutoConfig.from_pretrained(source, subfolder=place[1]).architectures or ()
            # half of an encoder-decoder, as pipelines have it, has no weights of the other half
            kind = AutoModelForTextEncoding if any(name.endswith("EncoderModel") for name in saved) else AutoModel
            whole = kind.from_pretrained(source, subfolder=place[1])
        except (OSError, ValueError, SafetensorError) as error:
            reason = first_line(error)
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
    """Encodes prompts with the text encoders of a pipeline of diffusers, as the pipeline does.

    Where a prompt has one vector for the whole beside its tokens (Stable Diffusion 3, FLUX), it stands before them as
    one token more, filled up with zeros to their width.

    Args:
        source: the local folder of the pipeline.
        device: None is the GPU of the process, where there is one. There the encoders are bf16, elsewhere float32.

    Attributes:
        pooled: width of the vector for the whole prompt; 0 where there is none.

    Raises:
        ElitError: diffusers is not installed, or the encoders cannot be read.
    """

    def __init__(self, source: str | Path, device: torch.device | str | None = None) -> None:
        try:
            from diffusers import DiffusionPipeline
        except ImportError as error:
            raise ElitError("pipelines need diffusers: pip install 'elit-diffusion[retrofit]'") from error
        device = torch.device(default_device() if device is None else device)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # in which such pipelines are run
        unused = {name: None for name in pipeline_index(source) or () if name.startswith(("transformer", "vae"))}
        try:
            self.pipeline: Any = DiffusionPipeline.from_pretrained(source, **unused).to(device, dtype)
            _, pooled, _ = self._embed([""])
        except (*UNUSABLE, OSError, AttributeError, SafetensorError) as error:
            reason = first_line(error)
            raise ElitError(f"cannot use the text encoders of the pipeline {source} ({reason})") from error
        self.pooled = 0 if pooled is None else pooled.shape[1]

    @torch.no_grad()
    def _embed(self, prompts: Sequence[str]) -> "Embedded":
        return PIPELINES[type(self.pipeline).__name__](self.pipeline, list(prompts))

    def __call__(self, prompts: Sequence[str]) -> Text:
        """Encodes prompts; ``[""]`` is the empty prompt."""
        tokens, pooled, mask = self._embed(prompts)
        mask = torch.ones(tokens.shape[:2], device=tokens.device) if mask is None else mask
        if pooled is not None:
            first = F.pad(pooled, (0, tokens.shape[2] - pooled.shape[1]))
            tokens, mask = torch.cat((first[:, None], tokens), dim=1), F.pad(mask, (1, 0), value=1)
        return Text(tokens.float(), mask.bool())


Embedded: TypeAlias = tuple[Tensor, Tensor | None, Tensor | None]
"""Tokens (B, L, D), the vectors for the whole (B, P) or None, and the mask (B, L); None where all tokens count."""


def _of_stable_diffusion_3(pipeline: Any, prompts: list[str]) -> Embedded:
    tokens, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
    return tokens, pooled, None


def _of_flux(pipeline: Any, prompts: list[str]) -> Embedded:
    tokens, pooled, _ = pipeline.encode_prompt(prompts, None)
    return tokens, pooled, None


def _of_qwen_image(pipeline: Any, prompts: list[str]) -> Embedded:
    tokens, mask = pipeline.encode_prompt(prompts, max_sequence_length=512)
    return tokens, None, mask


def _of_pixart(pipeline: Any, prompts: list[str]) -> Embedded:
    cleaned = {"do_classifier_free_guidance": False, "clean_caption": True}
    tokens, mask, *_ = pipeline.encode_prompt(prompts, **cleaned)
    return tokens, None, mask


def _of_wan(pipeline: Any, prompts: list[str]) -> Embedded:
    tokens, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=WAN_TOKENS)
    return tokens, None, tokens.ne(0).any(dim=2)  # it fills prompts up with zeros


PIPELINES: dict[str, Callable[[Any, list[str]], Embedded]] = {
    "StableDiffusion3Pipeline": _of_stable_diffusion_3,
    "FluxPipeline": _of_flux,
    "QwenImagePipeline": _of_qwen_image,
    "PixArtAlphaPipeline": _of_pixart,
    "PixArtSigmaPipeline": _of_pixart,
    "WanPipeline": _of_wan,
}
"""The pipelines whose way with prompts is known."""

PREFIXES = ("StableDiffusion3", "Flux", "QwenImage", "PixArt", "Wan")
"""How the class names of these pipelines begin. Others with such a name are refused; of all the rest, the first text
encoder embeds prompts."""
