"""The `elit` command: every verb is one function that anyone can also call.

Its options are the parameters of the function, or the fields of the one dataclass that it takes. Each may also come
from ``--config FILE.yaml``.
"""

import copy
import logging
import sys
from argparse import Action, ArgumentError
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from inspect import signature
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from elit import __version__
from elit.commands.analyze import analyze_attention, analyze_budgets, analyze_cost, analyze_guidance, analyze_steps
from elit.commands.convert import convert_model
from elit.commands.evaluate import evaluate_compare, evaluate_reference, evaluate_samples
from elit.commands.export import export_model
from elit.commands.info import info
from elit.commands.plan import make_plan
from elit.commands.prepare import prepare_convert, prepare_encode, prepare_verify
from elit.commands.quickstart import quickstart
from elit.commands.sample import sample_images
from elit.commands.serve import serve
from elit.commands.train import train
from elit.errors import ElitError

Verb = Callable[..., object]

VERBS: dict[str, Verb | dict[str, Verb]] = {
    "quickstart": quickstart,
    "train": train,
    "sample": sample_images,
    "serve": serve,
    "plan": make_plan,
    "evaluate": {"samples": evaluate_samples, "reference": evaluate_reference, "compare": evaluate_compare},
    "analyze": {
        "budgets": analyze_budgets,
        "guidance": analyze_guidance,
        "steps": analyze_steps,
        "attention": analyze_attention,
        "cost": analyze_cost,
    },
    "info": info,
    "convert": convert_model,
    "export": export_model,
    "prepare": {"convert": prepare_convert, "encode": prepare_encode, "verify": prepare_verify},
}

SUMMARIES = {
    "evaluate": "Score samples against real images, and compare the scores of several runs.",
    "analyze": "Measure what each budget of a model costs and how good its samples are.",
    "prepare": "Turn images of any size into what training reads.",
}
"""Of the verbs that are followed by another one."""

DEFAULTS = {"evaluate": "samples"}
"""``elit evaluate --samples ...`` is short for ``elit evaluate samples --samples ...``."""


class HelpFormatter(DefaultHelpFormatter):
    """Shows options with dashes, as they are usually typed."""

    def _format_action_invocation(self, action: Action) -> str:
        shown = copy.copy(action)
        shown.option_strings = [option.replace("_", "-") for option in action.option_strings]
        return super()._format_action_invocation(shown)


class Parser(ArgumentParser):
    """A parser that takes ``--strict`` for ``--strict true``."""

    def add_argument(self, *names: str, **settings: Any) -> Action:
        if settings.get("type") is bool:
            settings |= {"nargs": "?", "const": True}
        return super().add_argument(*names, **settings)


def make_parser() -> Parser:
    """Makes the parser of all verbs."""
    parser = Parser(
        prog="elit",
        description="Elastic diffusion transformers: one set of weights, many budgets.",
        version=__version__,
        allow_abbrev=False,  # an option that is misspelt must not be taken for another
        exit_on_error=False,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    add_verbs(parser, VERBS)
    return parser


def add_verbs(parser: Parser, verbs: dict[str, Any], before: str = "elit") -> None:
    """Adds a subcommand to a parser for each verb, and their own subcommands to those."""
    subcommands = parser.add_subcommands(required=True, dest="verb")
    for name, verb in verbs.items():
        nested = isinstance(verb, dict)
        summary = SUMMARIES[name] if nested else (verb.__doc__ or "").splitlines()[0]
        usage = f"{before} {name} {{{','.join(verb)}}} ..." if nested else f"{before} {name} [OPTIONS]"
        subparser = Parser(description=summary, usage=usage)
        subcommands.add_subcommand(name, subparser, help=summary)
        if nested:
            add_verbs(subparser, verb, f"{before} {name}")
        else:
            add_options(subparser, verb)


def add_options(parser: Parser, verb: Verb) -> None:
    """Adds the options of a verb to its parser; those that are required and not keywords are given without a name."""
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any of the options below.")
    if verb is evaluate_compare:
        parser.add_argument("results", type=Path, nargs="+", help="Files of elit evaluate, at least two.")
    elif options := options_class(verb):
        parser.add_class_arguments(options, as_group=False, as_positional=True)
    else:
        parser.add_function_arguments(verb, as_group=False, as_positional=True)


def options_class(verb: Verb) -> type | None:
    """Returns the dataclass that a verb takes as its only argument, or None where it takes several plain ones."""
    parameters = list(signature(verb).parameters.values())
    kind = parameters[0].annotation
    return kind if isinstance(kind, type) and is_dataclass(kind) else None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb and returns the exit code: 0, 2 for a wrong input, 130 after Ctrl-C."""
    arguments = [_with_underscores(a) for a in (sys.argv[1:] if argv is None else argv)]
    debug = "--debug" in arguments  # wherever it stands
    arguments = [a for a in arguments if a != "--debug"]
    logging.basicConfig(format="%(message)s")
    logging.getLogger("elit").setLevel(logging.INFO)  # which model was found where
    # No code but ours is imported because a configuration file names it.
    set_parsing_settings(
        import_path_denylist=["*"], import_path_allowlist=["elit"], instantiate_subclass_spec_in_any=False
    )
    try:
        run(make_parser(), _with_default(arguments))
    except (ElitError, ArgumentError, OSError) as error:
        if debug:
            raise
        print("elit:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nelit: interrupted", file=sys.stderr)
        return 130
    return 0


def run(parser: Parser, arguments: Sequence[str]) -> None:
    """Calls the function of the verb that the arguments name with the options that they give."""
    parsed = parser.parse_args(arguments)
    try:
        options = parser.instantiate(parsed)
    except ValueError as error:  # a dataclass of the configuration refuses its values
        raise ElitError(str(error)) from error
    verb: Any = VERBS
    while isinstance(verb, dict):
        verb, options = verb[options.verb], options[options.verb]
    values = {key: value for key, value in vars(options).items() if key not in ("config", "__path__")}
    dataclass = options_class(verb)
    verb(**values) if dataclass is None else verb(dataclass(**values))


def _with_default(arguments: list[str]) -> list[str]:
    """Puts in the second verb where the first one is followed by options alone."""
    first, *rest = arguments or [""]
    if first in DEFAULTS and rest and rest[0].startswith("--") and rest[0] != "--help":
        return [first, DEFAULTS[first], *rest]
    return arguments


def _with_underscores(argument: str) -> str:
    """``--num-images=4`` -> ``--num_images=4``: parameters have underscores, options may have either."""
    option, equals, value = argument.partition("=")
    return option[:2] + option[2:].replace("-", "_") + equals + value if option.startswith("--") else argument


if __name__ == "__main__":
    sys.exit(main())
