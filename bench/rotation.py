"""Measures what a rotation of the residual stream gives a precision: perplexity of a text, with and without it.

    python bench/rotation.py MODEL --text FILE [--precision w4a_fp8] [--characters N] [--windows 24] [--seeds 2]

Rows: "nearest" (plain rounding) and the precision's own calibration, each on the checkpoint as it is and rotated by
plexor_quant.calibration.rotation. Calibrated on the text of bench/calibration.py, in memory; activations are bfloat16.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

import torch
from calibration import DTYPE, put, standard_library
from torch.nn.functional import cross_entropy

from plexor.api import Catalog, Decoder, VocabEmbedding
from plexor.checkpoint.tokenizer import load_tokenizer
from plexor.runtime.loading import BuiltModel
from plexor.testing.architecture import load_model, run
from plexor_quant.calibration.grid import nearest
from plexor_quant.calibration.layers import calibrate
from plexor_quant.calibration.rotation import rotate
from plexor_quant.calibration.scheme import Scheme, find_scheme

SCORED = 1024


def main() -> None:
    arguments = _arguments()
    catalog = Catalog.load()
    path = catalog.resolve_model(arguments.model)
    encode = load_tokenizer(path).encode
    scored = encode(arguments.text.read_text(encoding="utf-8")[: arguments.characters], add_special_tokens=False)
    seen = encode(standard_library(), add_special_tokens=False)
    scheme = find_scheme(arguments.precision)
    dense = _perplexity(load_model(path, catalog, dtype=DTYPE), scored)
    print(f"dense: {dense:.3f}")
    for name, chosen in (("nearest", replace(scheme, rounding=nearest, factors=None)), ("calibrated", scheme)):
        for seed in (None, *range(arguments.seeds)):
            target = load_model(path, catalog, precision=arguments.precision, dtype=DTYPE)
            _fill(target, path, catalog, seen[: arguments.window * arguments.windows], arguments.window, chosen, seed)
            found = _perplexity(target, scored)
            print(
                f"{name}, {'as it is' if seed is None else f'rotated, seed {seed}'}: {found / dense - 1:+.2%}",
                flush=True,
            )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--characters", type=int, default=None, help="characters of the text (default: all)")
    parser.add_argument("--precision", default="w4a_fp8")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=2, help="rotations that are drawn")
    return parser.parse_args()


def _perplexity(built: BuiltModel, token_ids: list[int]) -> float:
    total = 0.0
    for start in range(0, len(token_ids) - 1, SCORED - 1):
        piece = token_ids[start : start + SCORED]
        logits = run(built, [piece], (len(piece),))[0][:-1]
        total += float(cross_entropy(logits.float(), torch.tensor(piece[1:]), reduction="sum").double())
    return math.exp(total / (len(token_ids) - 1))


def _fill(
    target: BuiltModel, path: Path, catalog: Catalog, tokens: list[int], window: int, scheme: Scheme, seed: int | None
) -> None:
    """Calibrate the checkpoint in float32, rotated before if a seed is given, and put what is kept into the target."""
    built = load_model(path, catalog)
    if seed is not None:
        rotate(built.module, built.build, seed)
        _untie(target)
    kept = calibrate(built.module, built.build, tokens, window, scheme, gain_dtype=DTYPE)
    put(target.module, built.module, kept)
    tables = dict(target.module.named_modules())
    for name, module in built.module.named_modules():
        if isinstance(module, VocabEmbedding):
            tables[name].get_buffer("weight").copy_(module.weight)


def _untie(target: BuiltModel) -> None:
    decoder = next(module for module in target.module.modules() if isinstance(module, Decoder))
    if decoder.head is None:
        decoder.head = VocabEmbedding(target.build, decoder.embedding.vocab_size, decoder.embedding.weight.shape[1])


if __name__ == "__main__":
    with torch.no_grad():
        main()
