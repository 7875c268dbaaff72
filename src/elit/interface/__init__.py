"""The latent interface: token grid and windows, Read, Write, budgets. It knows no backbone."""

from elit.interface.budget import Budget, BudgetByNoise, budget_per_step, check_budget, draw_level, to_level
from elit.interface.grid import TokenGrid, coordinates, triple
from elit.interface.latent import InterfaceConfig, LatentInterface, Read, Spatial, Write

__all__ = [
    "Budget",
    "BudgetByNoise",
    "InterfaceConfig",
    "LatentInterface",
    "Read",
    "Spatial",
    "TokenGrid",
    "Write",
    "budget_per_step",
    "check_budget",
    "coordinates",
    "draw_level",
    "to_level",
    "triple",
]
