"""The processes of a run, their devices, and what they compute in."""

import importlib.util
from typing import Any

import torch

from elit.errors import ElitError
from elit.launch import default_device
from elit.training.config import RunConfig


def half_precision(config: RunConfig) -> torch.dtype | None:
    """Returns the dtype of matrix products, where it is not float32."""
    if config.precision == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else None
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]


def make_accelerator(config: RunConfig) -> Any:
    """Finds processes, devices and trackers, and returns them as an object of accelerate.

    Raises:
        ElitError: a package is missing, there is no GPU for fp16, or there are more processes than samples.
    """
    try:
        import accelerate
        import tensorboard  # noqa: F401
    except ImportError as error:
        raise ElitError(f"training needs {error.name}: pip install 'elit-diffusion[train]'") from error
    if "wandb" in config.trackers and importlib.util.find_spec("wandb") is None:
        raise ElitError("trackers has wandb, which is not installed: pip install wandb")
    if config.precision == "fp16" and not torch.cuda.is_available():
        raise ElitError("precision is fp16, which needs a GPU; take bf16 or fp32")
    # Buffers are tables of positions, the same everywhere: processes need not tell each other. Gradients lie in the
    # buckets that are summed over processes, without a copy.
    ddp = accelerate.utils.DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    accelerator = accelerate.Accelerator(
        cpu=default_device().type == "cpu",  # else processes without a GPU would not find each other
        mixed_precision="no",
        log_with=list(config.trackers),
        project_config=accelerate.utils.ProjectConfiguration(config.out, logging_dir=f"{config.out}/tensorboard"),
        kwargs_handlers=[ddp],
    )
    if config.batch_size < accelerator.num_processes:
        raise ElitError(f"batch_size is {config.batch_size}, too small for {accelerator.num_processes} processes")
    return accelerator
