"""ELIT: elastic diffusion transformers, one set of weights for many inference budgets (arXiv 2603.12245)."""

__version__ = "0.1.0"

from elit.data.pil import to_pil
from elit.errors import ElitError
from elit.export import export, load_exported  # the function; `from elit.export import` has the rest
from elit.flow import Cache, Guidance, Trajectory, advance, sample, trajectories
from elit.integrations import elastify
from elit.interface import BudgetByNoise
from elit.models import Model, compile, create  # compile: as torch.compile
from elit.models.files import load

__all__ = [
    "BudgetByNoise",
    "Cache",
    "ElitError",
    "Guidance",
    "Model",
    "Trajectory",
    "__version__",
    "advance",
    "compile",
    "create",
    "elastify",
    "export",
    "load",
    "load_exported",
    "sample",
    "to_pil",
    "trajectories",
]
