"""Bit-identical training on a GPU, where it is asked for."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from elit.errors import ElitError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def require_deterministic_matmul() -> None:
    """Tells cuBLAS to use a workspace with which its sums have one order. It reads this once, when it starts.

    Raises:
        ElitError: it has started already, without.
    """
    if WORKSPACE not in os.environ and torch.cuda.is_initialized():
        raise ElitError(f"deterministic is set, but the GPU is in use already; start with {WORKSPACE}=:4096:8")
    os.environ.setdefault(WORKSPACE, ":4096:8")


@contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """Lets torch use only algorithms that give the same bits every time, where enabled, and restores what was before.

    Attention follows the setting too: flash and memory-efficient attention then sum their gradients in one order, and
    that of cuDNN is not used.
    """
    if not enabled:
        yield
        return
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn_before = cudnn.deterministic, cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark = cudnn_before
