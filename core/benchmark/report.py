"""The figures of a run, the file that keeps those of many runs, and the tables made of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
from rich.table import Table

from plexor.errors import ConfigError


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One figure beside the limit that was measured in the same run.

    shape: the model's name. gpus: 0 on a CPU. limit: in the same unit, None where nothing bounds it. gpu: the device's
    name. date: ISO 8601. commit: what was run, "+" behind it if files had been changed since.
    """

    shape: str
    precision: str
    kv: str
    gpus: int
    workload: str
    metric: str
    value: float
    unit: str
    limit: float | None
    gpu: str
    date: str
    commit: str

    @property
    def key(self) -> tuple[str, str, str, int, str, str]:
        """What is measured: a later figure of the same key replaces an earlier one."""
        return (self.shape, self.precision, self.kv, self.gpus, self.workload, self.metric)

    @property
    def share(self) -> float | None:
        """How much of the limit is reached: the value over it, and for times, of which less is better, the inverse."""
        if self.limit is None:
            return None
        return self.limit / self.value if self.unit in TIMES else self.value / self.limit


TIMES = frozenset({"ms", "s"})


def read_figures(file: Path) -> list[Figure]:
    """The figures that a file keeps, none if there is no file; ConfigError if it holds something else."""
    if not file.exists():
        return []
    try:
        return msgspec.json.decode(file.read_bytes(), type=list[Figure])
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{file} is no file of benchmark figures ({error}): name another") from error


def merge_figures(kept: Iterable[Figure], new: Iterable[Figure]) -> list[Figure]:
    """The new figures in the place of those with the same key, the rest behind."""
    merged = {figure.key: figure for figure in kept}
    merged.update({figure.key: figure for figure in new})
    return list(merged.values())


def write_figures(file: Path, new: Sequence[Figure]) -> None:
    """Merge into the file; ConfigError if it cannot be written."""
    merged = merge_figures(read_figures(file), new)
    text = json.dumps([msgspec.to_builtins(figure) for figure in merged], indent=1)
    try:
        file.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file} cannot be written ({error.strerror}): check the path") from error


def terminal_table(figures: Iterable[Figure]) -> Table:
    """What `plexor bench` prints."""
    table = Table(header_style="bold")
    for name in ("workload", "metric"):
        table.add_column(name, no_wrap=True)
    for name in ("value", "unit", "limit", "of limit"):
        table.add_column(name, justify="left" if name == "unit" else "right", no_wrap=True)
    workload = ""
    for figure in figures:
        if workload and figure.workload != workload:
            table.add_section()
        table.add_row("" if figure.workload == workload else figure.workload, *_cells(figure))
        workload = figure.workload
    return table


def markdown_table(figures: Iterable[Figure]) -> str:
    """One table for each model, precision, cache format and number of GPUs, in the order of the file."""
    groups: dict[tuple[str, ...], list[Figure]] = {}
    for figure in figures:
        where = f"{figure.gpus} x {figure.gpu}" if figure.gpus else figure.gpu
        groups.setdefault((figure.shape, f"precision {figure.precision}", f"KV {figure.kv}", where), []).append(figure)
    return "\n".join(_section(", ".join(title), members) for title, members in groups.items())


def _section(title: str, figures: Sequence[Figure]) -> str:
    lines = [f"## {title}", ""]
    lines += [
        "| workload | metric | value | unit | limit | of limit | date | commit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for figure in figures:
        lines.append("| " + " | ".join((figure.workload, *_cells(figure), figure.date, figure.commit)) + " |")
    return "\n".join([*lines, ""])


def _cells(figure: Figure) -> tuple[str, str, str, str, str]:
    limit = "" if figure.limit is None else digits(figure.limit)
    share = "" if figure.share is None else f"{figure.share:.0%}"
    return figure.metric, digits(figure.value), figure.unit, limit, share


def digits(value: float) -> str:
    """Three significant digits at least, thousands apart."""
    decimals = next((count for count, least in enumerate((100, 10, 1)) if value >= least), 3)
    return f"{value:,.{decimals}f}"
