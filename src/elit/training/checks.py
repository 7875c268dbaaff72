"""Whether the settings of a run are of their types and in their ranges, which is told before anything is built."""

import math
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from functools import reduce
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from elit.errors import ElitError
from elit.training.config import RunConfig

RANGES: list[tuple[str, Callable[[float], bool], str]] = [
    (
        "at least 1",
        lambda value: value >= 1,
        "steps batch_size micro_batch_size log_every checkpoint_every keep_checkpoints max_skipped "
        "validation.samples validation.sampling_steps repa.depth lora_rank elit.levels_per_step",
    ),
    ("at least 0", lambda value: value >= 0, "snapshot_every prefetch optimizer.warmup_steps"),
    ("at least 0", lambda value: value >= 0, "validation.every validation.images"),
    (
        "a number of at least 0",
        lambda value: 0 <= value < math.inf,
        "optimizer.lr optimizer.weight_decay optimizer.muon_lr repa.coefficient distillation",
    ),
    ("above 0", lambda value: value > 0, "optimizer.clip"),
    ("in [0, 1]", lambda value: 0 <= value <= 1, "label_dropout ema_decay optimizer.decay_from"),
    ("in [0, 1)", lambda value: 0 <= value < 1, "optimizer.betas optimizer.muon_momentum"),
    ("in 1..99", lambda value: 1 <= value < 100, "optimizer.muon_ns_steps"),
]
"""What the values of some settings must be; None is a setting that is not given."""

KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def check(config: RunConfig) -> None:
    """Checks the settings of a run that stand for themselves.

    Raises:
        ElitError: one is of another type, out of its range, or does not go with another.
    """
    _check_types(config)
    for words, fits, names in RANGES:
        for name in names.split():
            value = _setting(config, name)
            for each in value if isinstance(value, Sequence) else (value,):
                if each is not None and not fits(each):
                    raise ElitError(f"{name} is {value}; it must be {words}")
    if config.parallel == "fsdp" and config.optimizer.name == "muon":
        raise ElitError("parallel is fsdp, and optimizer.name muon needs whole matrices; take adamw or parallel ddp")
    if config.parallel == "fsdp" and config.precision == "fp16":
        raise ElitError("precision is fp16, whose loss scale parallel fsdp does not know; take bf16")


def _setting(config: Any, name: str) -> Any:
    """Returns a setting by its name, or None where this kind of run has none of that name."""
    return reduce(lambda part, key: getattr(part, key, None), name.split("."), config)


def _check_types(config: Any, inside: str = "") -> None:
    types = get_type_hints(type(config))
    for name in (field.name for field in fields(config)):
        value = getattr(config, name)
        check_type(types[name], value, inside + name)
        if is_dataclass(value):
            _check_types(value, f"{inside}{name}.")


def check_type(wanted: Any, value: object, name: str) -> None:
    """Checks the type of a setting.

    Raises:
        ElitError: it has another.
    """
    if has_type(wanted, value):
        return
    plain = [each for each in get_args(wanted) if each is not type(None)] if _is_union(wanted) else [wanted]
    literal = get_origin(plain[0]) is Literal
    kind = f"one of {', '.join(get_args(plain[0]))}" if literal else KINDS.get(plain[0])
    described = kind if kind and len(plain) == 1 else f"of type {str(wanted).replace('typing.', '')}"
    raise ElitError(f"{name} is {value!r}; it must be {described}")


def has_type(wanted: Any, value: Any) -> bool:
    """Returns whether a value has the type of a field. Tuples and lists are taken for each other, as YAML does."""
    origin, arguments = get_origin(wanted), get_args(wanted)
    if _is_union(wanted):
        return any(has_type(each, value) for each in arguments)
    if origin is Literal:
        return type(value) is str and value in arguments
    if origin in (tuple, list, Sequence):
        fixed = origin is tuple and arguments[-1] is not Ellipsis
        sequence = isinstance(value, tuple | list) and (not fixed or len(value) == len(arguments))
        return sequence and all(has_type(arguments[0], each) for each in value)
    if wanted is float:
        return type(value) in (int, float)
    return isinstance(value, origin or wanted) if is_dataclass(wanted) or origin else type(value) is wanted


def _is_union(wanted: Any) -> bool:
    return get_origin(wanted) in (Union, UnionType)
