"""The `elit` command: one verb, one function that anyone can also call.

Every option is a parameter of the function, and every parameter may come from ``--config FILE.yaml``.
"""

import logging
import re
import sys
from collections.abc import Callable, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from elit import __version__
from elit.commands.analyze import analyze_attention, analyze_budgets, analyze_cost, analyze_guidance, analyze_steps
from elit.commands.convert import convert_model
from elit.commands.evaluate import evaluate, evaluate_compare, evaluate_reference
from elit.commands.info import info
from elit.commands.plan import plan
from elit.commands.prepare import prepare_convert, prepare_encode, prepare_verify
from elit.commands.quickstart import quickstart
from elit.commands.sample import sample_images
from elit.commands.train import train
from elit.errors import ElitError
from elit.training.config import TrainConfig

VERBS: dict[str, Callable[..., object]] = {
    "quickstart": quickstart,
    "train": train,
    "sample": sample_images,
    "plan": plan,
    "evaluate": evaluate,
    "evaluate-reference": evaluate_reference,
    "evaluate-compare": evaluate_compare,
    "analyze-budgets": analyze_budgets,
    "analyze-guidance": analyze_guidance,
    "analyze-steps": analyze_steps,
    "analyze-attention": analyze_attention,
    "analyze-cost": analyze_cost,
    "info": info,
    "convert": convert_model,
    "prepare-convert": prepare_convert,
    "prepare-encode": prepare_encode,
    "prepare-verify": prepare_verify,
}

POSITIONAL = (
    "info",
    "convert",
    "prepare-convert",
    "prepare-encode",
    "prepare-verify",
    "evaluate-reference",
    "evaluate-compare",
)
"""Verbs whose required options need no name."""


class Parser(ArgumentParser):
    """Errors in one sentence, options with dashes."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ElitError(_sentence(str(ex or message)))

    def format_help(self, *args: Any) -> str:
        return re.sub(r"(?<=--)[a-z_.]+", lambda option: option[0].replace("_", "-"), super().format_help(*args))


def make_parser() -> Parser:
    """The parser of all verbs."""
    parser = Parser(
        prog="elit",
        description="Elastic diffusion transformers: one set of weights, many budgets.",
        version=__version__,
        allow_abbrev=False,  # an option that is misspelt must not be taken for another
    )
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    verbs = parser.add_subcommands(required=True, dest="verb")
    for name in VERBS:
        verbs.add_subcommand(name, _parser_of(name), help=_summary(name))
    return parser


def _parser_of(name: str) -> Parser:
    """The parser of one verb."""
    verb = Parser(description=_summary(name), usage=f"elit {name.replace('-', ' ')} [OPTIONS]")
    verb.add_argument("--config", action=ActionConfigFile, help="YAML file with any of the options below.")
    if name == "train":
        verb.add_class_arguments(TrainConfig, as_group=False)
    elif name == "evaluate-compare":
        verb.add_argument("results", type=Path, nargs="+", help="Files of elit evaluate, at least two.")
    else:
        verb.add_function_arguments(VERBS[name], as_group=False, as_positional=name in POSITIONAL)
        switches = {key for key, value in signature(VERBS[name]).parameters.items() if value.annotation is bool}
        for action in verb._actions:
            if action.dest in switches:
                action.nargs, action.const = "?", True  # --strict is --strict true
    return verb


def _summary(name: str) -> str:
    return (VERBS[name].__doc__ or "").splitlines()[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb and returns the exit code: 0, 2 for a wrong input, 130 after Ctrl-C."""
    arguments = [_with_underscores(a) for a in (sys.argv[1:] if argv is None else argv)]
    debug = "--debug" in arguments  # wherever it stands
    arguments = [a for a in arguments if a != "--debug"]
    if "-".join(arguments[:2]) in VERBS:  # elit evaluate compare: a verb of two words
        arguments[:2] = ["-".join(arguments[:2])]
    elif seconds := _second_words(arguments):
        print(f"elit: elit {arguments[0]} is followed by {' or '.join(seconds)}", file=sys.stderr)
        return 2
    logging.basicConfig(format="%(message)s")
    logging.getLogger("elit").setLevel(logging.INFO)  # which model was found where
    try:
        parser = make_parser()
        chosen = _instantiate(parser, arguments)
        name, options = chosen.verb, chosen[chosen.verb]
        values: dict[str, Any] = {k: v for k, v in vars(options).items() if k not in ("config", "__path__")}
        if name == "train":
            train(TrainConfig(**values))
        else:
            VERBS[name](**values)
    except (ElitError, OSError) as error:
        if debug:
            raise
        print(f"elit: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nelit: interrupted", file=sys.stderr)
        return 130
    return 0


def _second_words(arguments: list[str]) -> list[str]:
    """Of a verb of two words whose second is missing or wrong."""
    if not arguments or arguments[0] in VERBS:
        return []
    return [verb.partition("-")[2] for verb in VERBS if verb.partition("-")[0] == arguments[0]]


def _instantiate(parser: Parser, arguments: list[str]) -> Namespace:
    parsed = parser.parse_args(arguments)
    try:
        return parser.instantiate(parsed)
    except ValueError as error:  # what a dataclass of the configuration refuses
        raise ElitError(_sentence(str(error))) from error


def _with_underscores(argument: str) -> str:
    """``--num-images=4`` -> ``--num_images=4``: parameters have underscores, options may have either."""
    option, equals, value = argument.partition("=")
    return option[:2] + option[2:].replace("-", "_") + equals + value if option.startswith("--") else argument


def _sentence(message: str) -> str:
    """What jsonargparse has to say, on one line and in plain words."""
    text = " ".join(line.strip(" -") for line in message.splitlines())
    # An option that may be left out is a union with None, of which a user need not hear.
    union = r"Does not validate against any of the Union subtypes Subtypes: .*? Errors: (.*?) Expected a <class 'None"
    text = re.sub(f"{union}.*", r"\1", text)
    text = re.sub(
        r"Does not validate .*? Subtypes: \[(.*)\] Errors: .* Given value: ", r"Expected one of \1. Got value: ", text
    )
    text = text.replace(", <class 'NoneType'>", "")
    text = re.sub(
        r"argument verb: invalid choice: ('.*?') \(.*\)", r"no verb is named \1; elit --help lists them", text
    )
    text = re.sub(r"the following arguments are required: (.*)", _required, text)
    text = re.sub(r"""Parser key ["']([\w.]+)["']:""", r"\1:", text)
    for python, plain in (
        ("<class 'int'>", "whole number"),
        ("<class 'float'>", "number"),
        ("typing.Literal", "choice of "),
    ):
        text = text.replace(python, plain)
    return text if "--help" in text else f"{text} (see elit VERB --help)"


def _required(found: re.Match[str]) -> str:
    """``sample.model`` -> ``give --model``."""
    names = [name.rpartition(".") for name in found[1].split(", ")]
    return "give " + ", ".join(name if verb in POSITIONAL else f"--{name}" for verb, _, name in names)


if __name__ == "__main__":
    sys.exit(main())
