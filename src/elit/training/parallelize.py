"""How a model is prepared for training, one function for each way, and weights in shards on their way to disk and back.

What belongs to FSDP2 is imported where it is used: it takes longer to load than the rest of a command line.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from elit.errors import ElitError
from elit.models.compiled import layers_to_compile, missing_compiler

CHECKPOINT_PREFIX = "_checkpoint_wrapped_module."


def apply_activation_checkpointing(blocks: nn.ModuleList) -> None:
    """Wraps blocks so that only their inputs are kept for the backward, and the rest is computed again there.

    Names in ``state_dict`` stay as they are; for those of parameters there is :func:`named_parameters`.
    """
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    for i, block in enumerate(blocks):
        blocks[i] = checkpoint_wrapper(block, preserve_rng_state=False)  # a forward draws nothing


def apply_compile(model: nn.Module, aligned: nn.Module | None = None) -> None:
    """Compiles the layers of a model in place, those that :func:`elit.compile` compiles: blocks, Read, Write and the
    projection. Layers of one kind share their compilations, see :func:`~elit.models.compiled.compile_layers`.

    Args:
        aligned: a block that stays as it is, for what it gives is looked at from outside.

    Raises:
        ElitError: there is no compiler here.
    """
    if why := missing_compiler(next(model.parameters()).device):
        raise ElitError(f"compile is set, but {why}; install it, or train without")
    for layer in layers_to_compile(model):
        if layer is not aligned:
            layer.compile(dynamic=True)


def apply_fsdp(
    network: nn.Module, blocks: Iterable[nn.Module], processes: int, device: torch.device, half: torch.dtype | None
) -> None:
    """Leaves each process with its shard of a network's parameters (FSDP2).

    The blocks are gathered one at a time for their forward and backward; the rest of the network is one group more,
    which stays gathered in between.

    Args:
        half: the precision that blocks are gathered in, and their gradients with them; None is float32. Gradients are
            summed over processes in float32, and tokens stay float32 between the blocks. The rest of the network,
            where rounding would hurt (positions, embeddings), is float32 in any case.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (processes,))
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half and torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(network, mesh=mesh)


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields parameters under the names that they have in ``state_dict``, whether or not blocks are wrapped."""
    for name, parameter in model.named_parameters():
        yield name.replace(CHECKPOINT_PREFIX, ""), parameter


def gather_full_tensors(tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """Puts tensors that are in shards together; the others stay as they are. All processes call it at once.

    Args:
        keep: False returns nothing, for a process that only has to take part.
    """
    from torch.distributed.tensor import DTensor

    full = {}
    for name, value in tensors.items():
        tensor = value.full_tensor() if isinstance(value, DTensor) else value
        if keep:
            # On the CPU, for all shards of all tensors together are what a GPU has no room for.
            full[name] = tensor.cpu() if isinstance(value, DTensor) else tensor
    return full


def shard_like(tensor: Tensor, target: Any) -> Tensor:
    """Returns this process's shard of a full tensor where the target is in shards, else the tensor itself."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(target, DTensor) or tensor.shape != target.shape:  # a step count belongs to no shard
        return tensor
    return distribute_tensor(tensor, target.device_mesh, target.placements, src_data_rank=None)
