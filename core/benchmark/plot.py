"""A picture of a run: how much of its limit each figure reaches."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from plexor.benchmark.report import Figure, digits
from plexor.errors import ConfigError


def check_plotting() -> None:
    """ConfigError where there is nothing to plot with, before anything is measured."""
    if find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: run `pip install 'plexor[plots]'`")


def plot_figures(figures: Sequence[Figure], title: str, file: Path) -> None:
    """One bar for each speed that has a limit: its share of it, with both written beside.

    The file's ending decides on the format; ConfigError if it cannot be written.
    """
    from matplotlib.figure import Figure as Picture

    bars = [(figure, figure.share) for figure in reversed(figures) if figure.share is not None and figure.unit != "GiB"]
    picture = Picture(figsize=(9, 1.2 + 0.42 * len(bars)), layout="constrained")
    axes = picture.subplots()
    axes.barh(range(len(bars)), [share for _, share in bars], color="tab:blue")
    axes.axvline(1, color="black", linestyle="--", linewidth=1)
    for place, (figure, share) in enumerate(bars):
        limit = "" if figure.limit is None else digits(figure.limit)
        axes.text(share, place, f" {digits(figure.value)} {figure.unit}, limit {limit}", va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), [f"{figure.workload}, {figure.metric}" for figure, _ in bars])
    axes.set_xlim(0, 1.35 * max([1.0, *(share for _, share in bars)]))
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.set_xlabel("share of the limit that was measured in the same run")
    axes.set_title(title, fontsize=10)
    try:
        picture.savefig(file, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be written ({error}): check the folder and the ending") from error
