"""Measures what a rotation of the residual stream gives a precision: perplexity of a text, with and without it.

    python bench/rotation.py MODEL --text FILE --calibrate FILE [--precision w4a_fp8] [--characters N] [--windows 16]

Rows: "nearest" (plain rounding) and the precision's own calibration, each on the checkpoint as it is and rotated by
plexor_quant.calibration.rotation. Everything stays in memory, as in bench/calibration.py; activations are bfloat16.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from plexor.api import Catalog, Decoder, GroupedLinear, Linear, RMSNorm, VocabEmbedding
from plexor.checkpoint.tokenizer import load_tokenizer
from plexor.runtime.loading import BuiltModel
from plexor.testing.architecture import load_model, run
from plexor_quant.calibration.grid import nearest
from plexor_quant.calibration.layers import calibrate
from plexor_quant.calibration.rotation import rotate
from plexor_quant.calibration.scheme import Scheme, find_scheme

DTYPE = torch.bfloat16
SCORED = 1024


def main() -> None:
    arguments = _arguments()
    catalog = Catalog.load()
    path = catalog.resolve_model(arguments.model)
    encode = load_tokenizer(path).encode
    scored = encode(arguments.text.read_text(encoding="utf-8")[: arguments.characters], add_special_tokens=False)
    seen = encode(arguments.calibrate.read_text(encoding="utf-8"), add_special_tokens=False)
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
    parser.add_argument("--calibrate", type=Path, required=True)
    parser.add_argument("--characters", type=int, default=None, help="characters of the text (default: all)")
    parser.add_argument("--precision", default="w4a_fp8")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
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
    modules = dict(target.module.named_modules())
    for name, module in built.module.named_modules():
        if isinstance(module, RMSNorm | VocabEmbedding):
            _copy(modules[name], module)
        elif name in kept:
            linear = modules[name]
            assert isinstance(linear, Linear | GroupedLinear)
            for key, tensor in kept[name].items():
                linear.stored[key].copy_(tensor)


def _copy(target: torch.nn.Module, source: RMSNorm | VocabEmbedding) -> None:
    assert isinstance(target, RMSNorm | VocabEmbedding)
    target.weight.copy_(source.weight)


def _untie(target: BuiltModel) -> None:
    decoder = next(module for module in target.module.modules() if isinstance(module, Decoder))
    if decoder.head is None:
        decoder.head = VocabEmbedding(target.build, decoder.embedding.vocab_size, decoder.embedding.weight.shape[1])


if __name__ == "__main__":
    with torch.no_grad():
        main()
