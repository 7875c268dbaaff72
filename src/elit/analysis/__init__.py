"""What budgets cost and what they buy."""

from elit.analysis.attention import (
    AttentionCorrelations,
    AttentionMaps,
    Interval,
    attention_maps,
    correlate,
    mean_maps,
    rank_correlation,
)
from elit.analysis.cost import (
    BudgetCost,
    Cost,
    Latency,
    count_flops,
    count_parameters,
    measure_costs,
    measure_latency,
    measure_peak_memory,
    on_meta,
    sampling_flops,
)
from elit.analysis.formula import Part, closed_form
from elit.analysis.sweeps import (
    Draws,
    SamplePoint,
    Setting,
    equal_cost_settings,
    guidance_settings,
    hsl_saturation,
    pareto_front,
    sweep,
)

__all__ = [
    "AttentionCorrelations",
    "AttentionMaps",
    "BudgetCost",
    "Cost",
    "Draws",
    "Interval",
    "Latency",
    "Part",
    "SamplePoint",
    "Setting",
    "attention_maps",
    "closed_form",
    "correlate",
    "count_flops",
    "count_parameters",
    "equal_cost_settings",
    "guidance_settings",
    "hsl_saturation",
    "mean_maps",
    "measure_costs",
    "measure_latency",
    "measure_peak_memory",
    "on_meta",
    "pareto_front",
    "rank_correlation",
    "sampling_flops",
    "sweep",
]
