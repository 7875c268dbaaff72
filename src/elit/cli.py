"""The `elit` command: every verb is one function that anyone can also call.

Its options are the parameters of the function, or the fields of the one dataclass that it takes. Each may also come
from ``--config FILE.yaml``.
"""

import ast
import copy
import logging
import signal
import sys
import threading
from argparse import Action, ArgumentError
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from elit import __version__
from elit.errors import ElitError

Verb = Callable[..., object]

VERBS: dict[str, str | dict[str, str]] = {
    "quickstart": "quickstart.quickstart",
    "train": "train.train",
    "distill": "distill.distill",
    "sample": "sample.sample_images",
    "serve": "serve.serve",
    "plan": "plan.make_plan",
    "evaluate": {
        "samples": "evaluate.evaluate_samples",
        "reference": "evaluate.evaluate_reference",
        "compare": "evaluate.evaluate_compare",
    },
    "analyze": {
        "budgets": "analyze.budgets.analyze_budgets",
        "guidance": "analyze.guidance.analyze_guidance",
        "steps": "analyze.steps.analyze_steps",
        "attention": "analyze.attention.analyze_attention",
        "cost": "analyze.cost.analyze_cost",
    },
    "info": "info.info",
    "convert": "convert.convert_model",
    "export": "export.export_model",
    "prepare": {
        "convert": "prepare.prepare_convert",
        "encode": "prepare.prepare_encode",
        "verify": "prepare.prepare_verify",
    },
}
"""Where in ``elit.commands`` the function of each verb is. It is imported for the verb in use alone."""

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


def make_parser(arguments: Sequence[str]) -> Parser:
    """Makes the parser of all verbs, with the options of the verb that the arguments begin with."""
    parser = Parser(
        prog="elit",
        description="Elastic diffusion transformers: one set of weights, many budgets.",
        version=__version__,
        allow_abbrev=False,  # an option that is misspelt must not be taken for another
        exit_on_error=False,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    add_verbs(parser, VERBS, arguments)
    return parser


def add_verbs(parser: Parser, verbs: dict[str, Any], arguments: Sequence[str], before: str = "elit") -> None:
    """Adds a subcommand to a parser for each verb, and to the one that is used its options or its own subcommands."""
    subcommands = parser.add_subcommands(required=True, dest="verb")
    for name, verb in verbs.items():
        nested = isinstance(verb, dict)
        summary = SUMMARIES[name] if nested else summary_of(verb)
        usage = f"{before} {name} {{{','.join(verb)}}} ..." if nested else f"{before} {name} [OPTIONS]"
        subparser = Parser(description=summary, usage=usage)
        subcommands.add_subcommand(name, subparser, help=summary)
        if [name] != list(arguments[:1]):
            continue
        if nested:
            add_verbs(subparser, verb, arguments[1:], f"{before} {name}")
        else:
            add_options(subparser, load_verb(verb))


def load_verb(place: str) -> Verb:
    """Imports the function of a verb."""
    module, _, name = place.rpartition(".")
    verb: Verb = getattr(import_module(f"elit.commands.{module}"), name)
    return verb


def summary_of(place: str) -> str:
    """Reads the first line of a verb's docstring, without importing what the verb needs."""
    module, _, name = place.rpartition(".")
    file = Path(__file__).parent.joinpath("commands", *module.split(".")).with_suffix(".py")
    functions = (node for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef))
    docstring = next(ast.get_docstring(function) for function in functions if function.name == name)
    return (docstring or "").splitlines()[0]


def add_options(parser: Parser, verb: Verb) -> None:
    """Adds the options of a verb to its parser; those that are required and not keywords are given without a name."""
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any of the options below.")
    (first, *_) = signature(verb).parameters.values()
    if first.annotation == list[Path]:  # several words, and not one that lists them
        parser.add_argument(first.name, type=Path, nargs="+", help="Files of elit evaluate, at least two.")
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
    """Runs a verb and returns the exit code: 0, 2 for a wrong input, 130 after Ctrl-C, 143 after SIGTERM."""
    arguments = [_with_underscores(a) for a in (sys.argv[1:] if argv is None else argv)]
    debug = "--debug" in arguments  # wherever it stands
    arguments = _with_default([a for a in arguments if a != "--debug"])
    logging.basicConfig(format="%(message)s")
    logging.getLogger("elit").setLevel(logging.INFO)  # which model was found where
    # No code but ours is imported because a configuration file names it.
    set_parsing_settings(
        import_path_denylist=["*"], import_path_allowlist=["elit"], instantiate_subclass_spec_in_any=False
    )
    try:
        with _sigterm_ends():
            run(make_parser(arguments), arguments)
    except (ElitError, ArgumentError, OSError) as error:
        if debug:
            raise
        print("elit:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except _Ended:
        print("\nelit: ended", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print("\nelit: interrupted", file=sys.stderr)
        return 130
    return 0


class _Ended(KeyboardInterrupt):
    """SIGTERM came, which ends a verb as Ctrl-C does: what is half written is removed."""


def _end(number: int, frame: object) -> NoReturn:
    raise _Ended


@contextmanager
def _sigterm_ends() -> Iterator[None]:
    """Lets SIGTERM raise :class:`_Ended` in the block."""
    if threading.current_thread() is not threading.main_thread():  # the only one that may handle signals
        yield
        return
    before = signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run(parser: Parser, arguments: Sequence[str]) -> None:
    """Calls the function of the verb that the arguments name with the options that they give."""
    try:
        options = parser.instantiate(parser.parse_args(arguments))
    except UnicodeDecodeError as error:
        raise ElitError(f"the file of --config is no text ({error})") from error
    except ImportError as error:  # of a class_path, which is no option of ours
        raise ElitError(f"a configuration cannot name classes: {str(error).partition(',')[0]}") from error
    except ValueError as error:  # a dataclass of the configuration refuses its values
        raise ElitError(str(error)) from error
    verb: Any = VERBS
    while isinstance(verb, dict):
        verb, options = verb[options.verb], options[options.verb]
    function = load_verb(verb)
    values = {key: value for key, value in vars(options).items() if key not in ("config", "__path__")}
    dataclass = options_class(function)
    function(**values) if dataclass is None else function(dataclass(**values))


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
