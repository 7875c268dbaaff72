"""`elit analyze`: what budgets cost and what they buy, as tables, JSON and figures."""

from elit.commands.analyze.attention import analyze_attention
from elit.commands.analyze.budgets import analyze_budgets
from elit.commands.analyze.cost import analyze_cost
from elit.commands.analyze.guidance import analyze_guidance
from elit.commands.analyze.steps import analyze_steps

__all__ = ["analyze_attention", "analyze_budgets", "analyze_cost", "analyze_guidance", "analyze_steps"]
