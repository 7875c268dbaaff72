"""What a training run is: one dataclass, one YAML file, one ``--option`` per field."""

from dataclasses import dataclass, field
from typing import Any, Literal

from elit.flow.times import TimeDensity


@dataclass
class ModelChoice:
    """The model to train. Resolution, channels and classes come from the data.

    Attributes:
        name: a named model, see ``elit info``.
        fields: fields of its configuration to change, such as ``{width: 64, group_size: 4}``.
    """

    name: str = "ELIT-DiT-S/2"
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass
class OptimizerConfig:
    """AdamW for all weights, or Muon for the matrices of blocks, Read and Write and AdamW for the rest.

    Attributes:
        name: adamw or muon.
        lr: learning rate of AdamW.
        betas: of AdamW.
        weight_decay: of both.
        muon_lr: learning rate of Muon.
        muon_momentum: of Muon.
        muon_ns_steps: Newton-Schulz iterations of Muon.
        warmup_steps: linear warm-up.
        decay: what follows the warm-up: constant, linear or cosine to zero.
        decay_from: fraction of all steps at which the decay begins.
        clip: largest norm of the gradient.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    muon_lr: float = 0.02
    muon_momentum: float = 0.95
    muon_ns_steps: int = 5
    warmup_steps: int = 10_000
    decay: Literal["constant", "linear", "cosine"] = "constant"
    decay_from: float = 0.0
    clip: float = 1.0


@dataclass
class TrainConfig:
    """A training run.

    Attributes:
        out: the run directory; a run found there is continued.
        data: name of the data set: digits or digits8.
        model: what to train.
        optimizer: how.
        steps: number of steps.
        batch_size: samples per step, over all processes.
        seed: of weights, data order, noise, times and budgets.
        path: linear or cosine.
        times: density of the training times.
        label_dropout: fraction of labels replaced by the null class, for guidance.
        multi_budget: draw the number of latents per step; otherwise train at full budget.
        ema_decay: of the moving average of the weights; step i uses at most (1 + i) / (10 + i).
        precision: auto is bf16 on a GPU and fp32 elsewhere.
        log_every: steps between lines of the log.
        checkpoint_every: steps between checkpoints; the last step always makes one.
        keep_checkpoints: older ones are removed.
        max_skipped: steps without a finite loss, in a row, that stop the run.
    """

    out: str = "runs/train"
    data: str = "digits"
    model: ModelChoice = field(default_factory=ModelChoice)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    steps: int = 500_000
    batch_size: int = 256
    seed: int = 0
    path: Literal["linear", "cosine"] = "linear"
    times: TimeDensity = field(default_factory=TimeDensity)
    label_dropout: float = 0.1
    multi_budget: bool = True
    ema_decay: float = 0.9999
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    log_every: int = 50
    checkpoint_every: int = 5_000
    keep_checkpoints: int = 2
    max_skipped: int = 10
