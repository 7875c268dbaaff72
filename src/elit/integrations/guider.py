"""Guidance with a cheap weak term, in modular pipelines of diffusers."""

from typing import Any, Literal

from diffusers.configuration_utils import register_to_config
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.guiders.guider_utils import BaseGuidance

from elit.errors import ElitError
from elit.integrations.elastic import ElasticMixin
from elit.interface import check_budget

__all__ = ["BaseGuidance", "ElitGuider"]  # pipelines load a class of a module that has its base among its names


class ElitGuider(ClassifierFreeGuidance):
    """Guides an elastic transformer by itself at a lower budget.

    Where the denoiser is not elastic it does what :class:`diffusers.ClassifierFreeGuidance` does.

    Args:
        kind: ``ccfg`` drops the prompt in the weak term and lowers its budget; ``ag`` keeps the prompt and lowers the
            budget (autoguidance); ``cfg`` drops the prompt and keeps the budget.
        weak_budget: the budget of the weak term, for ``ccfg`` and ``ag``.
        budget: the budget of the strong term; None is what the transformer is set to.
        guidance_scale, guidance_rescale, use_original_formulation, start, stop, enabled: as of the base class.

    Raises:
        ElitError: no such kind, or a budget outside (0, 1].
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        kind: Literal["cfg", "ccfg", "ag"] = "ccfg",
        weak_budget: float = 0.125,
        budget: float | None = None,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        use_original_formulation: bool = False,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ) -> None:
        super().__init__(guidance_scale, guidance_rescale, use_original_formulation, start, stop, enabled)
        if kind not in ("cfg", "ccfg", "ag"):
            raise ElitError(f"no guidance is named {kind!r}; there are cfg, ccfg and ag")
        check_budget(weak_budget, "weak_budget")
        if budget is not None:
            check_budget(budget)
        self.kind, self.weak_budget, self.budget = kind, weak_budget, budget
        self._before: Any = None

    def prepare_models(self, denoiser: Any) -> None:
        """Sets the budget of the term that runs next."""
        super().prepare_models(denoiser)
        if not isinstance(denoiser, ElasticMixin):
            return
        self._before = denoiser.budgets
        strong = self._before[0] if self.budget is None else self.budget
        denoiser.set_budget(strong if self.is_conditional or self.kind == "cfg" else self.weak_budget)

    def cleanup_models(self, denoiser: Any) -> None:
        """Sets the budget that there was before."""
        super().cleanup_models(denoiser)
        if isinstance(denoiser, ElasticMixin):
            denoiser.set_budget(*self._before)

    def prepare_inputs(self, data: Any) -> Any:
        """Returns the inputs of both terms; with ``ag`` they have the same prompt."""
        return self._with_prompt(super().prepare_inputs(data), lambda: self._prepare_batch(data, 0, "pred_uncond"))

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Any) -> Any:
        """Returns the inputs of both terms; with ``ag`` they have the same prompt."""
        batches = super().prepare_inputs_from_block_state(data, input_fields)
        weak = lambda: self._prepare_batch_from_block_state(input_fields, data, 0, "pred_uncond")  # noqa: E731
        return self._with_prompt(batches, weak)

    def _with_prompt(self, batches: list[Any], weak: Any) -> list[Any]:
        return [batches[0], weak()] if self.kind == "ag" and len(batches) == 2 else batches
