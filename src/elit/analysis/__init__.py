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
from elit.analysis.calibration import Calibration, calibrate
from elit.analysis.choice import choose
from elit.analysis.flops import (
    Flops,
    count_flops,
    count_parameters,
    example_inputs,
    on_meta,
    sampling_flops,
    velocity_flops,
)
from elit.analysis.measure import BudgetCost, Latency, measure_costs, measure_latency, measure_peak_memory
from elit.analysis.plan import Plan, candidate_plans, solve
from elit.analysis.sweeps import (
    SamplePoint,
    SamplerSettings,
    SweepConfig,
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
    "Calibration",
    "Flops",
    "Interval",
    "Latency",
    "Plan",
    "SamplePoint",
    "SamplerSettings",
    "SweepConfig",
    "attention_maps",
    "calibrate",
    "candidate_plans",
    "choose",
    "correlate",
    "count_flops",
    "count_parameters",
    "equal_cost_settings",
    "example_inputs",
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
    "solve",
    "sweep",
    "velocity_flops",
]
