"""`plexor chat`: a conversation at the terminal, or one question with --quick."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from plexor.cli.options import add_model_options, add_sampling_options, engine_config, sampling_params
from plexor.errors import RequestError
from plexor.extension.catalog import Catalog

if TYPE_CHECKING:
    from plexor.runtime.engine import Engine
    from plexor.runtime.request import SamplingParams


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", metavar="TEXT", help="ask this, print the answer and leave")
    parser.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    add_model_options(parser)
    add_sampling_options(parser, max_tokens=512)


def run(arguments: argparse.Namespace, catalog: Catalog) -> int:
    from plexor.cli.session import open_engine

    history = [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
    with open_engine(engine_config(arguments), catalog) as (engine, _):
        sampling = sampling_params(arguments, engine.folder.default_sampling)
        if arguments.quick is not None:
            _answer(engine, history, arguments.quick, sampling)
            return 0
        print("/clear forgets the conversation, /exit (or end of input) leaves", file=sys.stderr)
        _talk(engine, history, sampling)
    return 0


def _talk(engine: Engine, history: list[dict[str, str]], sampling: SamplingParams) -> None:
    opening = len(history)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line == "/exit":
            return
        if line == "/clear":
            del history[opening:]
        elif line:
            _try_to_answer(engine, history, line, sampling)


def _try_to_answer(engine: Engine, history: list[dict[str, str]], line: str, sampling: SamplingParams) -> None:
    """A question that cannot be served (a conversation that has become too long) must not end the conversation."""
    try:
        _answer(engine, history, line, sampling)
    except RequestError as error:
        history.pop()
        print(f"plexor: {error} (/clear forgets the conversation)", file=sys.stderr)


def _answer(engine: Engine, history: list[dict[str, str]], line: str, sampling: SamplingParams) -> None:
    from plexor.cli.session import figures, stream_answer

    history.append({"role": "user", "content": line})
    answer = stream_answer(engine, engine.prompts.chat(history), sampling, sys.stdout)
    sys.stdout.write("\n")
    print(figures(answer, engine.core.device), file=sys.stderr)
    history.append({"role": "assistant", "content": answer.text})
