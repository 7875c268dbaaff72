"""Configuration dataclasses from the values of a JSON file, which nobody needs to trust."""

from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from elit.errors import ElitError


def decode(config_class: type, values: dict[str, Any], source: Path, inside: str = "") -> Any:
    """Builds a configuration dataclass from the values of a JSON file.

    The values are only compared with the types of the fields: nothing in a file that others wrote can name something to
    import or to call.

    Args:
        source: the file, for messages.
        inside: the key of the file under which the values stand, for messages.

    Raises:
        ElitError: an unknown key, a value of another type, or values that the dataclass refuses.
    """
    types = get_type_hints(config_class)
    unknown = sorted(values.keys() - {field.name for field in fields(config_class)})
    if unknown:
        raise ElitError(f"{source}: no key {inside}{unknown[0]} exists in a {config_class.__name__}")
    decoded = {}
    for name, value in values.items():
        accepted, decoded[name] = _decode_value(types[name], value, source, f"{inside}{name}")
        if not accepted:
            wanted = types[name].__name__ if isinstance(types[name], type) else str(types[name]).replace("typing.", "")
            raise ElitError(f"{source}: {inside}{name} is {value!r}; it must be of type {wanted}")
    try:
        return config_class(**decoded)
    except (ElitError, ArithmeticError, TypeError, ValueError) as error:
        raise ElitError(f"{source}: {error}") from error


def _decode_value(wanted: Any, value: Any, source: Path, key: str) -> tuple[bool, Any]:
    """Returns whether a value of JSON has a type, and it as that type."""
    origin, arguments = get_origin(wanted), get_args(wanted)
    if origin in (Union, UnionType):
        attempts = (_decode_value(each, value, source, key) for each in arguments)
        return next((attempt for attempt in attempts if attempt[0]), (False, None))
    if origin is Literal:
        return type(value) is str and value in arguments, value
    if origin is tuple:
        if not isinstance(value, list):
            return False, None
        each = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        items = [_decode_value(*pair, source, key) for pair in zip(each, value, strict=False)]
        return len(each) == len(value) and all(accepted for accepted, _ in items), tuple(item for _, item in items)
    if is_dataclass(wanted) and isinstance(wanted, type):
        return (True, decode(wanted, value, source, f"{key}.")) if isinstance(value, dict) else (False, None)
    if wanted is float and type(value) is int:
        return True, float(value)
    return type(value) is wanted, value
