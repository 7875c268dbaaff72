"""ELIT: elastic diffusion transformers, one set of weights for many inference budgets (arXiv 2603.12245)."""

__version__ = "0.1.0"

from elit.errors import ElitError
from elit.flow import Guidance, sample
from elit.interface import BudgetByNoise
from elit.models import create
from elit.models.files import load

__all__ = ["BudgetByNoise", "ElitError", "Guidance", "__version__", "create", "load", "sample"]
