"""Parses the command line, runs the command, and turns errors into one sentence and exit code 2."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import NoReturn

from plexor import __version__
from plexor.config import Environment
from plexor.errors import PlexorError
from plexor.extension.catalog import Catalog

COMMANDS = {
    "generate": "continue a prompt",
    "chat": "talk with a model",
    "caption": "describe a picture",
    "serve": "answer over HTTP, as the OpenAI API does",
    "eval": "measure perplexity on a text, in several precisions",
    "quantize": "write a checkpoint in fewer bits, calibrated on a text or not",
    "bench": "measure speed and memory beside the limits of the device",
    "tune": "measure which kernels multiply a model's layers fastest on this GPU",
    "explain": "say how a model would be run and what memory it takes, without loading it",
    "kernels": "list the operations and which kernel wins here",
    "plugins": "list the plugins, what they offer, and why one does not work",
}
"""Built-in commands; the module plexor.cli.NAME has `add_arguments(parser)` and `run(arguments, catalog) -> int`."""

EXIT_ERROR = 2


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence with a guess at what was meant."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(EXIT_ERROR)

    def refuse_unknown(self, unknown: Sequence[str]) -> None:
        """Exit, with a guess, if arguments were left over."""
        if not unknown:
            return
        known = [option for action in self._actions for option in action.option_strings]
        near = get_close_matches(unknown[0].split("=")[0], known, n=1)
        self.error(f"{unknown[0]!r} is not known" + (f": did you mean {near[0]}?" if near else ""))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the process' exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in given
    try:
        debug = debug or Environment.read().debug
        return _run([argument for argument in given if argument != "--debug"])
    except PlexorError as error:
        if debug:
            traceback.print_exc()
        print(f"plexor: {error}", file=sys.stderr)
        return EXIT_ERROR
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def _run(given: Sequence[str]) -> int:
    catalog = Catalog.load(strict="--strict-plugins" in given)
    parser, commands = make_parser(catalog)
    _guess_command(parser, given, commands)
    arguments, unknown = parser.parse_known_args(given)
    commands[arguments.command].refuse_unknown(unknown)
    run: Callable[[argparse.Namespace], int] = arguments.run
    return run(arguments)


def make_parser(catalog: Catalog) -> tuple[Parser, dict[str, Parser]]:
    """The parser of the whole command line, and that of each command."""
    parser = Parser(prog="plexor", description="Serve language, mixture-of-experts and vision-language models.")
    parser.add_argument("--version", action="version", version=f"plexor {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks (also PLEXOR_DEBUG=1)")
    parser.add_argument("--strict-plugins", action="store_true", help="stop at a plugin that does not work")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, summary in COMMANDS.items():
        command = subparsers.add_parser(name, help=summary, description=summary)
        module = import_module(f"plexor.cli.{name}")
        module.add_arguments(command)
        command.set_defaults(run=_bound(module.run, catalog))
    for sentence in catalog.add_commands(subparsers):
        print(f"plexor: {sentence}", file=sys.stderr)
    return parser, dict(subparsers.choices)


def _bound(run: Callable[[argparse.Namespace, Catalog], int], catalog: Catalog) -> Callable[[argparse.Namespace], int]:
    return lambda arguments: run(arguments, catalog)


def _guess_command(parser: Parser, given: Sequence[str], commands: dict[str, Parser]) -> None:
    """argparse lists all commands for a mistyped one; say which was meant instead."""
    word = next((argument for argument in given if not argument.startswith("-")), None)
    if word is None or word in commands:
        return
    near = get_close_matches(word, commands, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(commands)}"
    parser.error(f"there is no command {word!r}: {hint}")
