"""Measures what calibration gives: perplexity of a text after plain rounding and after each step of calibration.

    python bench/calibration.py MODEL --text FILE [--calibrate FILE] [--precision w4a_fp8] [--windows 48] [--window 512]

Without --calibrate the calibration text is drawn from the running Python's standard library, without the modules that
plugins/demo/training held out. Rows: "nearest" (plain rounding), "clip" (AWQ's clip search), "gptq", and each of them
with smoothing folded into the layers before. Everything stays in memory: rounded weights and divided gains are put
into a model that was loaded with the precision, and the text runs through its own kernels.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import sysconfig
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from plexor.api import Catalog, GroupedLinear, Linear, RMSNorm
from plexor.checkpoint.tokenizer import load_tokenizer
from plexor.testing.architecture import load_model, run
from plexor_quant.calibration.clip import clipped
from plexor_quant.calibration.gptq import gptq
from plexor_quant.calibration.grid import nearest
from plexor_quant.calibration.layers import calibrate
from plexor_quant.calibration.scheme import Scheme, find_scheme

DTYPE = torch.bfloat16
SCORED = 1024
EXCERPT = 2000
"""Characters of each file: many files say more about the inputs than much of a few."""

DEMO_TRAINING = Path(__file__).parent.parent / "plugins" / "demo" / "training"
ROUNDINGS = {"nearest": nearest, "clip": clipped, "gptq": gptq}
SEED = 20261122


def main() -> None:
    arguments = _arguments()
    catalog = Catalog.load()
    text = arguments.text.read_text(encoding="utf-8")[: arguments.characters]
    source = arguments.calibrate.read_text(encoding="utf-8") if arguments.calibrate else standard_library()
    rows = [("dense", _score(arguments, catalog, text, "dense"), 0.0)]
    scheme = find_scheme(arguments.precision)
    plain = replace(scheme, factors=None)
    for name in arguments.rows:
        rounding = ROUNDINGS[name.removesuffix("+smooth")]
        chosen = replace(scheme if name.endswith("+smooth") else plain, rounding=rounding)
        started = time.perf_counter()
        perplexity = _score(arguments, catalog, text, arguments.precision, chosen, source)
        rows.append((name, perplexity, time.perf_counter() - started))
        print(f"{name}: {perplexity:.4f}, {perplexity / rows[0][1] - 1:+.2%}", file=sys.stderr)
    print("| rounding | perplexity | against dense | seconds, text included |")
    print("|---|---|---|---|")
    for name, perplexity, seconds in rows:
        print(f"| {name} | {perplexity:.3f} | {perplexity / rows[0][1] - 1:+.2%} | {seconds:.0f} |")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--characters", type=int, default=None, help="characters of the text (default: all)")
    parser.add_argument("--calibrate", type=Path)
    parser.add_argument("--precision", default="w4a_fp8")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--rows", nargs="+", default=[n + s for s in ("", "+smooth") for n in ROUNDINGS])
    return parser.parse_args()


def standard_library() -> str:
    """Excerpts of the standard library's sources that the demo's training may have seen, drawn with a fixed seed."""
    sys.path.insert(0, str(DEMO_TRAINING))
    from corpus import stdlib_documents

    drawn = random.Random(SEED)
    seen = [doc.text for doc in stdlib_documents(Path(sysconfig.get_paths()["stdlib"])) if not doc.held_out]
    drawn.shuffle(seen)
    starts = [drawn.randrange(max(1, len(text) - EXCERPT)) for text in seen]
    return "\n\n".join(text[start : start + EXCERPT] for text, start in zip(seen, starts, strict=True))


def _score(
    arguments: argparse.Namespace,
    catalog: Catalog,
    text: str,
    precision: str,
    scheme: Scheme | None = None,
    source: str = "",
) -> float:
    """The perplexity of the text in bfloat16; with a scheme, of the model that was calibrated by it."""
    path = catalog.resolve_model(arguments.model)
    encode = load_tokenizer(path).encode
    built = load_model(path, catalog, precision=precision, dtype=DTYPE)
    if scheme is not None:
        tokens = encode(source, add_special_tokens=False)[: arguments.window * arguments.windows]
        fill(built.module, path, catalog, tokens, arguments.window, scheme)
    token_ids = encode(text, add_special_tokens=False)
    total = 0.0
    # Neighbours share one token, as in `plexor eval`.
    for start in range(0, len(token_ids) - 1, SCORED - 1):
        piece = token_ids[start : start + SCORED]
        logits = run(built, [piece], (len(piece),))[0][:-1]
        total += float(cross_entropy(logits.float(), torch.tensor(piece[1:]), reduction="sum").double())
    return math.exp(total / (len(token_ids) - 1))


def fill(target: nn.Module, path: Path, catalog: Catalog, tokens: list[int], window: int, scheme: Scheme) -> None:
    """Calibrate the checkpoint in float32 and put what comes out into the target's layers and norms."""
    built = load_model(path, catalog)
    kept = calibrate(built.module, built.build, tokens, window, scheme, gain_dtype=DTYPE)
    put(target, built.module, kept)


def put(target: nn.Module, calibrated: nn.Module, kept: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Give a model what calibration keeps of the layers, by name, and the gains of the model that it changed."""
    modules = dict(target.named_modules())
    for name, stored in kept.items():
        linear = modules[name]
        assert isinstance(linear, Linear | GroupedLinear)
        for key, tensor in stored.items():
            linear.stored[key].copy_(tensor)
    for name, module in calibrated.named_modules():
        if isinstance(module, RMSNorm):
            norm = modules[name]
            assert isinstance(norm, RMSNorm)
            norm.weight.copy_(module.weight)


if __name__ == "__main__":
    with torch.no_grad():
        main()
