"""Perplexity of a text in every precision, rounded plainly and calibrated, over every cache format: one table a model.

    python bench/perplexity.py demo demo-moe [--text FILE] [--calibrate FILE] [--precision NAME ...] [--kv NAME ...]

Without --calibrate the calibration text is that of bench/calibration.py. "plain" rows are what loading with --precision
gives, "calibrated" rows what `plexor quantize --calibrate` writes; here it is put into a loaded model instead, so that
rows whose groups no layout on disk knows are measured too. bfloat16, windows of 1024 tokens, each on its own. The same
top-1 and the mean KL are against the first row: dense weights, dense cache.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from calibration import DTYPE, put, standard_library
from torch import Tensor
from torch.nn.functional import cross_entropy

from plexor.api import Catalog
from plexor.checkpoint.tokenizer import load_tokenizer
from plexor.runtime.conversion import STEPWISE, spread_windows
from plexor.runtime.loading import BuiltModel
from plexor.testing.architecture import load_model, run
from plexor_quant.calibration.layers import calibrate
from plexor_quant.calibration.scheme import find_scheme

HELD_OUT = Path(__file__).parent.parent / "plugins" / "demo" / "heldout.txt"
SCORED = 1024


@dataclass(frozen=True, slots=True)
class Row:
    """One line; rise: of the perplexity against the first row, None for that row itself, as the last two."""

    precision: str
    rounding: str
    kv: str
    loss: float
    rise: float | None = None
    agreement: float | None = None
    mean_kl: float | None = None

    def __str__(self) -> str:
        rest = "- | - | -"
        if self.rise is not None:
            rest = f"{self.rise:+.2%} | {self.agreement:.2%} | {self.mean_kl:.5f}"
        named = f"| {self.precision} | {self.rounding} | {self.kv}"
        return f"{named} | {self.loss:.4f} | {math.exp(self.loss):.3f} | {rest} |"


class Measure:
    """A model's rows over the windows of a text."""

    def __init__(self, arguments: argparse.Namespace, model: str, catalog: Catalog) -> None:
        self._catalog = catalog
        self._path = catalog.resolve_model(model)
        self._device = torch.device(arguments.device)
        self._arguments = arguments
        encode = load_tokenizer(self._path).encode
        tokens = encode(arguments.text.read_text(encoding="utf-8")[: arguments.characters], add_special_tokens=False)
        # Neighbours share one token, as in `plexor eval`.
        self._windows = [tokens[start : start + SCORED] for start in range(0, len(tokens) - 1, SCORED - 1)]
        self.num_tokens = len(tokens) - 1
        source = arguments.calibrate.read_text(encoding="utf-8") if arguments.calibrate else standard_library()
        self._calibration = spread_windows(
            encode(source, add_special_tokens=False), arguments.window, arguments.windows
        )
        self._reference: list[Tensor] = []
        self._first_loss = 0.0

    def rows(self) -> Iterator[Row]:
        """Dense first; a precision is calibrated once for all caches."""
        for kv in self._arguments.kv:
            yield self._row("dense", "-", kv, self._load("dense", kv))
        for precision in self._arguments.precision:
            for kv in self._arguments.kv:
                yield self._row(precision, "plain", kv, self._load(precision, kv))
            dense = load_model(
                self._path, self._catalog, device=self._device, kernels=dict.fromkeys(STEPWISE, "reference")
            )
            scheme = find_scheme(precision)
            kept = calibrate(
                dense.module, dense.build, self._calibration, self._arguments.window, scheme, gain_dtype=DTYPE
            )
            for kv in self._arguments.kv:
                built = self._load(precision, kv)
                put(built.module, dense.module, kept)
                yield self._row(precision, "calibrated", kv, built)

    def _load(self, precision: str, kv: str) -> BuiltModel:
        return load_model(self._path, self._catalog, precision=precision, kv=kv, dtype=DTYPE, device=self._device)

    def _logits(self, built: BuiltModel) -> Iterator[Tensor]:
        """Of each window; a GPU has room for many at once."""
        together = 1 if self._device.type == "cpu" else 16
        for start in range(0, len(self._windows), together):
            yield from run(built, self._windows[start : start + together], (SCORED,))

    def _row(self, precision: str, rounding: str, kv: str, built: BuiltModel) -> Row:
        loss, agreed, divergence = 0.0, 0, 0.0
        is_first = not self._reference
        for index, (window, rows) in enumerate(zip(self._windows, self._logits(built), strict=True)):
            logits = rows[:-1].to(self._device)
            wide = logits.float()
            wanted = torch.tensor(window[1:], device=self._device)
            loss += float(cross_entropy(wide, wanted, reduction="sum").double())
            if is_first:
                self._reference.append(logits)
                continue
            theirs = self._reference[index].float()
            agreed += int((wide.argmax(-1) == theirs.argmax(-1)).sum())
            expected, found = theirs.log_softmax(-1), wide.log_softmax(-1)
            divergence += float((expected.exp() * (expected - found)).sum())
        loss /= self.num_tokens
        if is_first:
            self._first_loss = loss
            return Row(precision, rounding, kv, loss)
        rise = math.exp(loss - self._first_loss) - 1
        return Row(precision, rounding, kv, loss, rise, agreed / self.num_tokens, divergence / self.num_tokens)


def main() -> None:
    catalog = Catalog.load()
    arguments = _arguments(catalog)
    for model in arguments.models:
        measure = Measure(arguments, model, catalog)
        print(f"\n{model}, {measure.num_tokens} tokens predicted, {arguments.device}:\n")
        print("| precision | rounding | KV | loss | perplexity | against dense | same top-1 | mean KL |")
        print("|---|---|---|---|---|---|---|---|")
        started = time.perf_counter()
        for row in measure.rows():
            print(row, flush=True)
        print(f"{model}: {time.perf_counter() - started:.0f} s", file=sys.stderr)


def _arguments(catalog: Catalog) -> argparse.Namespace:
    rounded = [name for name, spec in catalog.precisions.items() if spec.calibrate]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--text", type=Path, default=HELD_OUT)
    parser.add_argument("--characters", type=int, default=None, help="characters of the text (default: all)")
    parser.add_argument("--calibrate", type=Path)
    parser.add_argument("--precision", nargs="+", default=rounded)
    parser.add_argument("--kv", nargs="+", default=list(catalog.kv_formats))
    parser.add_argument("--window", type=int, default=512, help="tokens of the calibration text that run together")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


if __name__ == "__main__":
    with torch.no_grad():
        main()
