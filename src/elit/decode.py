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
        decoded[name] = _from_json(types[name], value, source, f"{inside}{name}.")
        if not is_of_type(decoded[name], types[name]):
            raise ElitError(f"{source}: {inside}{name} is {value!r}; it must be of type {_named(types[name])}")
    try:
        return config_class(**decoded)
    except (ElitError, ArithmeticError, TypeError, ValueError) as error:
        raise ElitError(f"{source}: {error}") from error


def check_types(config: Any) -> None:
    """Checks that every field of a configuration dataclass holds a value of its type.

    Raises:
        ElitError: names a field that does not.
    """
    types = get_type_hints(type(config))
    for field in fields(config):
        value, wanted = getattr(config, field.name), types[field.name]
        if not is_of_type(value, wanted):
            raise ElitError(f"{field.name} is {value!r}; it must be of type {_named(wanted)}")


def is_of_type(value: Any, wanted: Any) -> bool:
    """Tells whether a value has the type of a field. A whole number is a float too, but True is no number."""
    origin, arguments = get_origin(wanted), get_args(wanted)
    if origin in (Union, UnionType):
        return any(is_of_type(value, each) for each in arguments)
    if origin is Literal:
        return type(value) is str and value in arguments
    if origin is tuple:
        each = arguments[:1] * len(value) if isinstance(value, tuple) and arguments[-1] is Ellipsis else arguments
        return isinstance(value, tuple) and len(each) == len(value) and all(map(is_of_type, value, each))
    if is_dataclass(wanted) and isinstance(wanted, type):
        return isinstance(value, wanted)
    return wanted is Any or type(value) is wanted or (wanted is float and type(value) is int)


def _from_json(wanted: Any, value: Any, source: Path, inside: str) -> Any:
    """Turns a value of JSON into what a field may hold: a whole number into a float, a list into a tuple, and an object
    into a dataclass."""
    if wanted is float and type(value) is int:
        return float(value)
    if isinstance(value, list):
        return tuple(_from_json(None, item, source, inside) for item in value)
    of_field = [each for each in (wanted, *get_args(wanted)) if is_dataclass(each) and isinstance(each, type)]
    return decode(of_field[0], value, source, inside) if of_field and isinstance(value, dict) else value


def _named(wanted: Any) -> str:
    return wanted.__name__ if isinstance(wanted, type) else str(wanted).replace("typing.", "")
