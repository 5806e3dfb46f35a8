"""`plexor eval`: perplexity of a text, one row for each number format that is asked for."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass, replace
from itertools import product

from plexor.cli.generate import read_file
from plexor.cli.options import add_model_options, engine_config
from plexor.errors import RequestError
from plexor.extension.catalog import Catalog


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", required=True, metavar="FILE", help="what to predict, in UTF-8")
    parser.add_argument(
        "--window", type=int, default=1024, metavar="N", help="tokens of context at most (default: 1024)"
    )
    parser.add_argument("--json", action="store_true", help="print a list of objects")
    add_model_options(parser)
    parser.epilog = "--precision and --kv take several formats with commas between, or 'all' for every installed one"


def run(arguments: argparse.Namespace, catalog: Catalog) -> int:
    text = _decode(arguments.text)
    precisions = _listed(arguments.precision, list(catalog.precisions))
    caches = _listed(arguments.kv, list(catalog.kv_formats))
    _look_up(catalog, precisions, caches)
    rows = [_measure(arguments, catalog, text, precision, kv) for precision, kv in product(precisions, caches)]
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return 0
    print("| precision | KV | tokens | loss | perplexity | against the first | bits per byte |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        rise = row.perplexity / rows[0].perplexity - 1
        print(
            f"| {row.precision} | {row.kv} | {row.num_tokens} | {row.loss:.4f} | {row.perplexity:.3f} "
            f"| {rise:+.2%} | {row.bits_per_byte:.4f} |"
        )
    return 0


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    model: str
    precision: str
    kv: str
    num_tokens: int
    loss: float
    perplexity: float
    bits_per_byte: float


def _measure(arguments: argparse.Namespace, catalog: Catalog, text: str, precision: str, kv: str) -> Row:
    from plexor.cli.session import open_engine
    from plexor.runtime.scoring import score_text

    config = replace(engine_config(arguments), precision=precision, kv=kv)
    with open_engine(config, catalog) as (engine, _):
        score = score_text(engine, text, arguments.window)
        print(f"{engine.folder.path.name} {precision} {kv}: perplexity {score.perplexity:.3f}", file=sys.stderr)
    name = engine.folder.path.name
    return Row(name, precision, kv, score.num_tokens, score.loss, score.perplexity, score.bits_per_byte)


def _look_up(catalog: Catalog, precisions: list[str], caches: list[str]) -> None:
    """A wrong name is said before anything is measured, so that no measured row is lost to it."""
    for name in precisions:
        catalog.precision(name)
    for name in caches:
        catalog.kv_format(name)


def _decode(name: str) -> str:
    try:
        return read_file(name).decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"{name} is not UTF-8 at byte {error.start}: convert it") from error


def _listed(given: str, known: list[str]) -> list[str]:
    return known if given == "all" else given.split(",")
