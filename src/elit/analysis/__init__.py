"""What budgets cost and what they buy."""

from elit.analysis.attention import AttentionMaps, attention_maps, rank_correlation
from elit.analysis.cost import Cost, Latency, count_flops, count_parameters, measure_latency, on_meta

__all__ = [
    "AttentionMaps",
    "Cost",
    "Latency",
    "attention_maps",
    "count_flops",
    "count_parameters",
    "measure_latency",
    "on_meta",
    "rank_correlation",
]
