"""Describes what computed a number, and when; it stands beside every result."""

import os
import platform
from datetime import date
from typing import Any

import torch

from elit import __version__


def environment() -> dict[str, Any]:
    """Returns the date, versions, processor and GPU."""
    return {
        "date": date.today().isoformat(),
        "elit": __version__,
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
