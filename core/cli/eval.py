"""`plexor eval`: perplexity of a text, and how close each number format's predictions are to a reference's."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

from plexor.cli.generate import read_text
from plexor.cli.options import add_model_options, engine_config
from plexor.config import EngineConfig
from plexor.errors import CapacityError
from plexor.extension.catalog import Catalog

if TYPE_CHECKING:
    from plexor.runtime.engine import Engine
    from plexor.runtime.scoring import Likeness, Score


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", required=True, metavar="FILE", help="what to predict, in UTF-8")
    parser.add_argument(
        "--against", metavar="DIR|NAME", help="a checkpoint to compare with, run as it is stored: the first row"
    )
    parser.add_argument(
        "--window", type=int, default=1024, metavar="N", help="tokens of context at most (default: 1024)"
    )
    parser.add_argument("--json", action="store_true", help="print a list of objects")
    add_model_options(parser)
    parser.epilog = (
        "--precision and --kv take several formats with commas between, or 'all' for those that take any "
        "weights; every row is compared with the first"
    )


def run(arguments: argparse.Namespace, catalog: Catalog) -> int:
    text = read_text(arguments.text)
    precisions = _listed(arguments.precision, [name for name, spec in catalog.precisions.items() if not spec.selective])
    caches = _listed(arguments.kv, list(catalog.kv_formats))
    _look_up(catalog, precisions, caches)
    config = engine_config(arguments)
    configs = [replace(config, precision=precision, kv=kv) for precision, kv in product(precisions, caches)]
    if arguments.against is not None:
        plain = EngineConfig(model=arguments.against)
        configs.insert(0, replace(config, model=plain.model, precision=plain.precision, kv=plain.kv))
    rows = _measure(configs, catalog, text, arguments.window)
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        _print_table(rows)
    return 0


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. The last three, as in Likeness, say how close the row is to the first, which has none."""

    model: str
    precision: str
    kv: str
    num_tokens: int
    loss: float
    perplexity: float
    bits_per_byte: float
    agreement: float | None = None
    mean_kl: float | None = None
    p99_kl: float | None = None


def _measure(configs: list[EngineConfig], catalog: Catalog, text: str, window: int) -> list[Row]:
    """The first config is the reference of the others; it stays loaded while each of them is."""
    from plexor.runtime.startup import import_engine

    import_engine(configs[0].device)
    from plexor.runtime.scoring import check_comparable, context, score_text, scoring_config

    window = min(window, *(context(config, catalog) for config in configs))
    reference_config, *tested = [scoring_config(config, catalog, window) for config in configs]
    for config in tested:
        check_comparable(config, reference_config, catalog, text)
    with _opened(reference_config, catalog) as reference:
        rows = [_row(reference, score_text(reference, text, window))]
        rows += [_compared(config, catalog, reference, text, window) for config in tested]
    return rows


def _compared(config: EngineConfig, catalog: Catalog, reference: Engine, text: str, window: int) -> Row:
    """A row of an engine whose memory is free again on return."""
    from plexor.runtime.scoring import compare_text

    with _beside(reference), _opened(config, catalog) as engine:
        return _row(engine, *compare_text(engine, reference, text, window))


@contextmanager
def _opened(config: EngineConfig, catalog: Catalog) -> Iterator[Engine]:
    from plexor.cli.session import open_engine

    with open_engine(config, catalog) as (engine, _):
        yield engine


@contextmanager
def _beside(reference: Engine) -> Iterator[None]:
    """Memory that another process has taken meanwhile is found out only now."""
    try:
        yield
    except CapacityError as error:
        raise CapacityError(f"beside the reference {reference.folder.path}, which stays loaded: {error}") from error


def _row(engine: Engine, score: Score, likeness: Likeness | None = None) -> Row:
    name, config = engine.folder.path.name, engine.config
    print(f"{name} {config.precision} {config.kv}: perplexity {score.perplexity:.3f}", file=sys.stderr)
    row = Row(name, config.precision, config.kv, score.num_tokens, score.loss, score.perplexity, score.bits_per_byte)
    if likeness is None:
        return row
    return replace(row, agreement=likeness.agreement, mean_kl=likeness.mean_kl, p99_kl=likeness.p99_kl)


def _print_table(rows: list[Row]) -> None:
    print(
        "| precision | KV | tokens | loss | perplexity | against the first | bits per byte | same top-1 | mean KL "
        "| 99th percentile KL | model |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        rise = row.perplexity / rows[0].perplexity - 1
        print(
            f"| {row.precision} | {row.kv} | {row.num_tokens} | {row.loss:.4f} | {row.perplexity:.3f} "
            f"| {rise:+.2%} | {row.bits_per_byte:.4f} | {_shown(row.agreement, '.2%')} | {_shown(row.mean_kl, '.5f')} "
            f"| {_shown(row.p99_kl, '.5f')} | {row.model} |"
        )


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _look_up(catalog: Catalog, precisions: list[str], caches: list[str]) -> None:
    """A wrong name is said before anything is measured, so that no measured row is lost to it."""
    for name in precisions:
        if name != "auto":
            catalog.precision(name)
    for name in caches:
        catalog.kv_format(name)


def _listed(given: str, known: list[str]) -> list[str]:
    return known if given == "all" else given.split(",")
