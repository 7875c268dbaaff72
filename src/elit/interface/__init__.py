"""The latent interface: token grid and windows, Read, Write, budgets. It knows no backbone."""

from elit.interface.budget import (
    Budget,
    BudgetByNoise,
    budget_schedule,
    budget_schedules,
    check_budget,
    draw_level,
    listed,
    to_level,
    valid_levels,
)
from elit.interface.grid import TokenGrid, coordinates, triple
from elit.interface.latent import InterfaceConfig, LatentInterface, Read, Write
from elit.interface.retrofit import Layout, RetrofitInterface

__all__ = [
    "Budget",
    "BudgetByNoise",
    "InterfaceConfig",
    "LatentInterface",
    "Layout",
    "Read",
    "RetrofitInterface",
    "TokenGrid",
    "Write",
    "budget_schedule",
    "budget_schedules",
    "check_budget",
    "coordinates",
    "draw_level",
    "listed",
    "to_level",
    "triple",
    "valid_levels",
]
