"""`plexor caption`: describe a picture; without one, draw one and say where it is."""

from __future__ import annotations

import argparse
import secrets
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from plexor.cli.generate import make_prompt
from plexor.cli.options import add_model_options, add_sampling_options, engine_config, sampling_params
from plexor.errors import ConfigError
from plexor.extension.catalog import Catalog
from plexor.extension.specs import Checkpoint
from plexor.kernels.table import resolve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", nargs="?", metavar="IMAGE", help="a picture (default: draws one)")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="what to continue after the picture")
    add_model_options(parser)
    add_sampling_options(parser, max_tokens=48)


def run(arguments: argparse.Namespace, catalog: Catalog) -> int:
    from plexor.cli.session import figures, open_engine, stream_answer

    shipped = _shipped(catalog, arguments.model)
    model = arguments.model if arguments.model is not None or shipped is None else shipped.name
    image = arguments.image if arguments.image is not None else _draw(shipped, arguments.seed)
    with open_engine(replace(engine_config(arguments), model=model), catalog) as (engine, _):
        prompt = make_prompt(engine, arguments.prompt, [image])
        sampling = sampling_params(arguments, engine.folder.default_sampling)
        answer = stream_answer(engine, prompt, sampling, sys.stdout)
        sys.stdout.write("\n")
        print(figures(answer, engine.core.device), file=sys.stderr)
    return 0


def _shipped(catalog: Catalog, model: str | None) -> Checkpoint | None:
    """The checkpoint whose pictures are drawn: the named one, or the first that can draw a sample of its input."""
    if model is not None:
        return catalog.checkpoints.get(model)
    seeing = [checkpoint for checkpoint in catalog.checkpoints.values() if checkpoint.sample]
    if not seeing:
        raise ConfigError("no installed plugin ships a model that sees: name one with --model DIR")
    return seeing[0]


def _draw(shipped: Checkpoint | None, seed: int | None) -> str:
    """A fresh picture in a file, announced on standard error with what it shows."""
    if shipped is None or not shipped.sample:
        raise ConfigError("there is no picture: give one, as in `plexor caption PICTURE --model DIR`")
    picture, caption = resolve(shipped.sample)(secrets.randbits(31) if seed is None else seed)
    path = Path(tempfile.mkdtemp(prefix="plexor-")) / "picture.png"
    picture.save(path)
    print(f"drew {path}: {caption}", file=sys.stderr)
    return str(path)
