"""FSDP2: weights, averages and optimizer state in shards, one for each process, and whole again.

Its modules are imported where they are used: they take longer to load than the rest of a command line.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def shard(network: nn.Module, blocks: Iterable[nn.Module], processes: int, device: torch.device) -> None:
    """Leaves each process with its share of a network's parameters.

    The blocks are gathered one at a time for their forward and backward; the rest of the network is one group more,
    which stays gathered in between.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (processes,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


def whole(tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """The tensors, those in shards put together: something that all processes do at once.

    Args:
        keep: False gives nothing, where a process does its part only.
    """
    from torch.distributed.tensor import DTensor

    found = {}
    for name, value in tensors.items():
        full = value.full_tensor() if isinstance(value, DTensor) else value
        if keep:
            # On the CPU, for all shards of all tensors together are what a GPU has no room for.
            found[name] = full.cpu() if isinstance(value, DTensor) else full
    return found


def like(tensor: Tensor, target: Any) -> Tensor:
    """A whole tensor as the target is: this process's shard of it, or as it was."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(target, DTensor) or tensor.shape != target.shape:  # a step count belongs to no shard
        return tensor
    return distribute_tensor(tensor, target.device_mesh, target.placements, src_data_rank=None)
