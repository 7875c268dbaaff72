"""What a training run is: one dataclass, one YAML file, one ``--option`` per field."""

from dataclasses import dataclass, field
from typing import Any, Literal

from elit.flow.pyramid import StageDensity
from elit.flow.times import TimeDensity
from elit.interface import BudgetByNoise


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
class ElasticConfig:
    """The budgets of training. With nothing given, an elastic model trains over all of its levels.

    Attributes:
        group_size: side of a window in tokens; the model's own unless given.
        min_mask_prob: smallest fraction of a window's J latents that is dropped; p keeps (1 - p) J. Without it, 0.
        max_mask_prob: largest, without it that of the model's lowest level. Each step draws one of the levels in
            between, uniformly, for all samples and processes. Equal to the smallest: that one budget alone.
        levels: instead, the numbers of latents to draw from; [16] trains at 16 latents alone.
        weights: of the levels, the smallest first; they are scaled to sum to 1.
        by_noise: instead, the budget of each sample by its noise level: ``{thresholds: [0.5], budgets: [0.25, 1]}`` is
            a quarter of the latents while t > 0.5 and all below.
        levels_per_step: levels in the batch of a step, which shares it out evenly. 1: one drawn for all samples. 2: the
            highest, and one drawn. 3 or more: the highest, the lowest and others drawn (the sandwich rule of slimmable
            networks, Yu & Huang 2019).
        batching: constant, or scaled: batch_size is that of full budget, and a step with fewer latents takes as many
            more samples as its forward costs less, so that every step has the same FLOPs.
    """

    group_size: int | None = None
    min_mask_prob: float | None = None
    max_mask_prob: float | None = None
    levels: list[int] | None = None
    weights: list[float] | None = None
    by_noise: BudgetByNoise | None = None
    levels_per_step: int = 1
    batching: Literal["constant", "scaled"] = "constant"


@dataclass
class HeldOutConfig:
    """What a run measures of its averaged weights while it trains.

    Attributes:
        every: steps between validations; 0 is none.
        budgets: of the held-out loss; unless given, those near 1/16, 1/4, 1/2 and 1 that are trained. A plain model has
            the full one alone.
        samples: held-out samples that are looked at, the first ones.
    """

    every: int = 0
    budgets: list[float] | None = None
    samples: int = 1024


@dataclass
class ValidationConfig(HeldOutConfig):
    """What a run measures and shows of its averaged weights while it trains.

    Attributes:
        budgets: of the held-out loss and of the rows of the sample grid; unless given, those near 1/16, 1/4, 1/2 and 1
            that are trained. A plain model has the full one alone.
        images: samples per budget in the grid; 0 is no grid.
        sampling_steps: of the grid.
        autoencoder: diffusers autoencoder that decodes the grid of a model on latents: a folder or a Hub id.
    """

    images: int = 8
    sampling_steps: int = 20
    autoencoder: str | None = None


@dataclass
class RepaConfig:
    """Alignment with a pretrained encoder (REPA, Yu et al. 2024, arXiv 2410.06940). Without an encoder there is none.

    Attributes:
        encoder: DINOv2 model of transformers: a folder or a Hub id, such as facebook/dinov2-base.
        coefficient: of the alignment in the loss.
        depth: the spatial tokens after so many blocks are aligned; blocks of the head, in an elastic model.
    """

    encoder: str | None = None
    coefficient: float = 0.5
    depth: int = 8


@dataclass(kw_only=True)
class RunConfig:
    """What every run of the trainer is told, whatever it trains.

    Attributes:
        out: the run directory; a run found there is continued.
        data: name of the data set, or where it lies.
        resume: a run or checkpoint to start from where ``out`` has no checkpoint of its own yet.
        text_encoder: of captions: a text encoder of transformers (a folder or a Hub id), the folder of a pipeline of
            diffusers, for its own text encoders, or words, a random vector for each word.
        flips: mirror half of the images at random; latents are mirrored when they are encoded.
        elit: at which budgets.
        optimizer: how.
        steps: number of steps.
        batch_size: samples per step, over all processes.
        micro_batch_size: most samples in one forward of a process; gradients of the micro-batches are accumulated.
        seed: of weights, data order, noise, times and budgets.
        times: density of the training times.
        label_dropout: fraction of labels replaced by the null class, for guidance.
        ema_decay: of the moving average of the weights; step i uses at most (1 + i) / (10 + i).
        parallel: of several processes. ddp: each holds everything. fsdp (FSDP2): each holds its share of weights,
            average, gradients and optimizer state, and a block is whole only while it computes.
        precision: auto is bf16 on a GPU and fp32 elsewhere. Weights and optimizer state are fp32 always.
        deterministic: on a GPU use only algorithms that give the same bits every time, which are slower; a run on a
            processor is bit-identical anyway.
        prefetch: batches that a thread reads ahead of the step that trains on them; 0 reads each when it is needed.
        checkpoint_activations: keep the inputs of blocks only and compute the rest again: less memory, a third more
            FLOPs.
        validation: the held-out loss on the way.
        trackers: where the log goes, beside log.jsonl.
        log_every: steps between lines of the log.
        checkpoint_every: steps between checkpoints; the last step always makes one.
        keep_checkpoints: older ones are removed.
        snapshot_every: steps between snapshots of the averaged weights, which are all kept; 0 is none.
        max_skipped: steps without a finite loss, in a row, that stop the run.
    """

    out: str
    data: str
    resume: str | None = None
    text_encoder: str = "words"
    flips: bool = False
    elit: ElasticConfig = field(default_factory=ElasticConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    steps: int = 500_000
    batch_size: int = 256
    micro_batch_size: int | None = None
    seed: int = 0
    times: TimeDensity = field(default_factory=TimeDensity)
    label_dropout: float = 0.1
    ema_decay: float = 0.9999
    parallel: Literal["ddp", "fsdp"] = "ddp"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    deterministic: bool = False
    prefetch: int = 2
    checkpoint_activations: bool = False
    validation: HeldOutConfig = field(default_factory=HeldOutConfig)
    trackers: list[Literal["tensorboard", "wandb"]] = field(default_factory=lambda: ["tensorboard"])
    log_every: int = 50
    checkpoint_every: int = 5_000
    keep_checkpoints: int = 2
    snapshot_every: int = 0
    max_skipped: int = 10


@dataclass
class TrainConfig(RunConfig):
    """A run that trains a new model.

    Attributes:
        model: what to train.
        repa: alignment of hidden tokens with a pretrained encoder, added to the loss.
        path: linear or cosine.
        stages: of a multi-scale model (DFM), in place of times: which stages are active, and their times.
        compile: compile the blocks, Read, Write and the projection; layers of one kind share their compilations, and
            another budget is not another one.
        validation: loss and samples on the way.
    """

    out: str = "runs/train"
    data: str = "digits"
    model: ModelChoice = field(default_factory=ModelChoice)
    repa: RepaConfig = field(default_factory=RepaConfig)
    path: Literal["linear", "cosine"] = "linear"
    stages: StageDensity = field(default_factory=StageDensity)
    compile: bool = False
    validation: ValidationConfig = field(default_factory=ValidationConfig)
