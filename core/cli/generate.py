"""`plexor generate`: continue a prompt, streamed to standard output, figures on standard error."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from plexor.cli.options import add_model_options, add_sampling_options, engine_config, sampling_params
from plexor.errors import ConfigError, RequestError
from plexor.extension.catalog import Catalog

if TYPE_CHECKING:
    from plexor.runtime.engine import Completion, Engine
    from plexor.runtime.prompts import Prompt


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", metavar="TEXT", help="'-' reads it from standard input (default: one that fits)")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="a picture for models that see")
    parser.add_argument("--json", action="store_true", help="print one object with token ids, text and times")
    add_model_options(parser)
    add_sampling_options(parser, max_tokens=128)


def run(arguments: argparse.Namespace, catalog: Catalog) -> int:
    from plexor.cli.session import figures, open_engine, stream_answer

    text = prompt_text(arguments, catalog)
    with open_engine(engine_config(arguments), catalog) as (engine, load_seconds):
        prompt = make_prompt(engine, text, arguments.image)
        sampling = sampling_params(arguments, engine.folder.default_sampling)
        if arguments.json:
            answer = engine.generate(prompt, sampling)[0]
            print(json.dumps(as_object(engine, answer, load_seconds)))
            return 0
        sys.stdout.write(text)
        answer = stream_answer(engine, prompt, sampling, sys.stdout)
        sys.stdout.write("\n")
        print(figures(answer, engine.core.device), file=sys.stderr)
    return 0


def prompt_text(arguments: argparse.Namespace, catalog: Catalog) -> str:
    """What was given, or what the shipped checkpoint suggests; ConfigError where there is neither."""
    if arguments.prompt == "-":
        return sys.stdin.read()
    if arguments.prompt is not None:
        return str(arguments.prompt)
    shipped = catalog.default_checkpoint() if arguments.model is None else catalog.checkpoints.get(arguments.model)
    if shipped is not None and shipped.prompt:
        return shipped.prompt
    if arguments.image:
        return ""
    raise ConfigError("there is no prompt: give one with --prompt TEXT, or --prompt - to read standard input")


def make_prompt(engine: Engine, text: str, images: list[str]) -> Prompt:
    """Text and pictures to tokens."""
    return engine.prompts.text(text, [engine.prompts.open_image(read_file(image)) for image in images])


def read_file(name: str) -> bytes:
    """A file's bytes; ConfigError if it cannot be read."""
    try:
        return Path(name).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"{name} cannot be read ({error.strerror}): check the path") from error


def read_text(name: str) -> str:
    """A file's text; RequestError if it is not UTF-8."""
    try:
        return read_file(name).decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"{name} is not UTF-8 at byte {error.start}: convert it") from error


def as_object(engine: Engine, answer: Completion, load_seconds: float) -> dict[str, object]:
    """What `--json` prints."""
    from plexor.cli.session import peak_memory, tokens_per_second

    return {
        "prompt_token_ids": list(answer.prompt_token_ids),
        "token_ids": answer.token_ids,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
        "error": answer.error,
        "times": {
            "load_seconds": load_seconds,
            "first_token_seconds": answer.first_token_seconds,
            "total_seconds": answer.total_seconds,
        },
        "tokens_per_second": tokens_per_second(answer),
        "peak_memory_bytes": peak_memory(engine.core.device),
    }
