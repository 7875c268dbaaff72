"""Pretrained transformers of diffusers on disk or on the Hub, as distillation begins with them."""

from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DDPMScheduler
from diffusers.configuration_utils import ConfigMixin
from safetensors import SafetensorError

from elit.data.autoencoder import Scaling, scaling
from elit.data.text import PIPELINE_INDEX
from elit.errors import ElitError, first_line
from elit.integrations.elastic import ElasticMixin
from elit.integrations.families import FAMILIES, refusal
from elit.models.files import LOCAL

AUTOENCODERS = ("AutoencoderKL", "AutoencoderKLQwenImage", "AutoencoderKLWan")  # whose scaling is known
SCALING_FACTOR = 0.18215  # of an AutoencoderKL that was saved without one
OLD_CLASS = "Transformer2DModel"  # as which DiT and PixArt were published
NEW_CLASSES = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}


class Pretrained(NamedTuple):
    """A transformer that somebody trained, and what is known of it before its weights are read.

    Attributes:
        source: its folder or Hub id.
        subfolder: where it lies there: ``transformer`` of a pipeline, or None.
        family: the class of its elastic version.
        config: its configuration, with the defaults of its class.
        scheduler: configuration of the scheduler of its pipeline, or None.
        autoencoder: configuration of the autoencoder of its pipeline, or None.
    """

    source: str
    subfolder: str | None
    family: type[ElasticMixin]
    config: dict[str, Any]
    scheduler: dict[str, Any] | None
    autoencoder: dict[str, Any] | None

    @property
    def scaling(self) -> Scaling | None:
        """Scale and shift of the latents that it was trained on, where its pipeline says them."""
        if self.autoencoder is None or self.autoencoder.get("_class_name") not in AUTOENCODERS:
            return None
        return scaling({"scaling_factor": SCALING_FACTOR} | self.autoencoder)

    def load(self) -> Any:
        """Reads the transformer, in float32 and evaluation mode.

        Raises:
            ElitError: its weights are missing or damaged.
        """
        try:
            options = {"subfolder": self.subfolder, "torch_dtype": torch.float32}
            return self.family.base.from_pretrained(self.source, **options).eval()
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = first_line(error)
            raise ElitError(f"cannot load the weights of the base {self.source}: {reason}") from error

    def on_meta(self) -> Any:
        """Makes the transformer without memory: shapes only."""
        with torch.device("meta"):
            return self.family.base.from_config(self.config).eval()

    def signal_levels(self) -> torch.Tensor:
        """Returns the share of the data's variance at each step of the scheduler: float32, falling.

        Raises:
            ElitError: there is no scheduler, or the transformer predicts something else than noise.
        """
        name = self.family.base.__name__
        if self.scheduler is None:
            raise ElitError(
                f"{self.source} is a transformer alone, and a {name} predicts noise at the steps of its scheduler; "
                "give the folder of its pipeline, with transformer/ and scheduler/"
            )
        kind = self.scheduler.get("prediction_type", "epsilon")
        if kind != "epsilon":
            raise ElitError(f"the scheduler of {self.source} has prediction_type {kind}; a {name} must predict noise")
        return DDPMScheduler.from_config(self.scheduler).alphas_cumprod


def find_pretrained(source: str) -> Pretrained:
    """Finds the transformer of a pipeline, or one that lies alone, and reads its configuration but no weights.

    Args:
        source: a folder that ``save_pretrained`` wrote, of a pipeline or a transformer; or a Hub id.

    Raises:
        ElitError: there is none, or it cannot be made elastic.
    """
    subfolder: str | None = "transformer"
    owner, _, name = source.partition("/")
    on_hub = bool(name) and "/" not in name and owner not in LOCAL and not Path(owner).exists()
    config = None
    if on_hub or Path(source).is_dir():
        config = _config(source, subfolder)
        if config is None:
            subfolder, config = None, _config(source, None)
    if config is None:
        raise ElitError(
            f"there is no base at {source}: give the folder of a pipeline or transformer of diffusers, or a Hub id "
            "that can be reached"
        )
    name = str(config.get("_class_name"))
    if name == OLD_CLASS:
        name = NEW_CLASSES.get(str(config.get("norm_type")), name)
    family = next((elastic for base, elastic in FAMILIES.items() if base.__name__ == name), None)
    if name in {each.__name__ for each in FAMILIES.values()}:
        raise ElitError(f"{source} holds a {name}, which is elastic already; give what it was made of")
    if family is None:
        raise ElitError(f"{source}: {refusal(name)}")
    parameters = signature(family.base.__init__).parameters.values()
    config = {each.name: each.default for each in parameters if each.default is not each.empty} | config
    if subfolder is not None:
        _check_pipeline(source)
    scheduler, autoencoder = (_config(source, part) if subfolder else None for part in ("scheduler", "vae"))
    return Pretrained(source, subfolder, family, config, scheduler, autoencoder)


def _check_pipeline(source: str) -> None:
    """Refuses pipelines that do with their transformer what distillation does not."""
    index = _config(source, None, PIPELINE_INDEX) or {}  # parts of a pipeline may lie there without an index
    if index.get("boundary_ratio") is not None:
        raise ElitError(
            f"{source} has two transformers, each for its own noise levels; distillation is for pipelines of one"
        )
    if index.get("expand_timesteps"):
        raise ElitError(f"{source} gives each token its own time, which an elastic model does not take")


def _config(source: str, subfolder: str | None, name: str = "config.json") -> dict[str, Any] | None:
    """Reads the configuration of a pipeline or of one part of it; None where there is none.

    Raises:
        ElitError: it is there and damaged.
    """
    name = "scheduler_config.json" if subfolder == "scheduler" else name
    reader: Any = type("Reader", (ConfigMixin,), {"config_name": name})
    file = Path(source, subfolder or "", name)
    try:
        return dict(reader.load_config(source, subfolder=subfolder))
    except (OSError, ValueError) as error:
        if file.exists():
            raise ElitError(f"{file} is damaged; get the folder of the base again") from error
        return None
