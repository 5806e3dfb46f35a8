"""Times products of 16 to 256 rows on a GPU, cuBLAS beside our own: `python bench/linear.py [--quick] [--write DIR]`.

For the layers of published shapes: bandwidth of the library, of the best variant of split_linear.py and of the provider
that the kernel table chooses, counting the bytes of the weight. core/kernels/tuned holds what `--write` writes.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from plexor.extension import builtin
from plexor.kernels.measure import ROWS, Multiply, Timing, measure
from plexor.kernels.table import KernelTable
from plexor.kernels.tuning import Choice, Product, file_name, write_choices
from plexor.model.build import facts

LAYERS = {
    "8b qkv": ("linear", 6144, 4096),
    "8b o": ("linear", 4096, 4096),
    "8b gate_up": ("linear", 28672, 4096),
    "8b gated": ("gated_linear", 28672, 4096),
    "8b down": ("linear", 4096, 14336),
    "8b head": ("linear", 128256, 4096),
    "1b qkv": ("linear", 3072, 2048),
    "1b o": ("linear", 2048, 2048),
    "1b gate_up": ("linear", 16384, 2048),
    "1b gated": ("gated_linear", 16384, 2048),
    "1b down": ("linear", 2048, 8192),
    "1b head": ("linear", 128256, 2048),
}
"""Of Llama 3.1 8B and Llama 3.2 1B; a gated layer's library figure includes the kernel of the gate."""

QUICK_ROWS = (32, 64, 128, 256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the larger model's layers, four numbers of rows")
    parser.add_argument("--write", type=Path, metavar="DIR", help="merge the choices into this GPU's file there")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    started = time.perf_counter()
    layers = {name: sizes for name, sizes in LAYERS.items() if not arguments.quick or name.startswith("8b")}
    names = {Product(*sizes, arguments.dtype): name for name, sizes in layers.items()}
    rows = QUICK_ROWS if arguments.quick else ROWS
    choices: dict[str, dict[int, Choice]] = {}
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {arguments.dtype}; TB/s of the weight")
    for timing in measure(tuple(names), rows, torch.device("cuda"), others(arguments.dtype)):
        print(as_line(names[timing.product], timing), flush=True)
        choices.setdefault(str(timing.product), {})[timing.num_rows] = timing.choice
    if arguments.write:
        path = arguments.write / file_name(torch.cuda.get_device_name())
        write_choices(path, choices)
        print(f"wrote {path}")
    print(f"{time.perf_counter() - started:.0f} s")


def others(dtype: str) -> dict[str, Multiply]:
    """What the kernel table chooses here for a linear layer, where that is not Triton's; it decides for itself."""
    table = KernelTable(builtin.ops(), builtin.kernels())
    known = facts(torch.device("cuda"), getattr(torch, dtype), None, out_features=4096, in_features=4096)
    winner = table.explain("linear", known).winner
    return {} if winner == "triton" else {winner: table.bind("linear", known)}


def as_line(name: str, timing: Timing) -> str:
    """Microseconds and TB/s of the library, of the best variant and of the others, and which variant that is."""
    best = timing.best
    figures = {"cublas": timing.library, "split": timing.variants[best], **timing.others}
    texts = [
        f"{label} {seconds * 1e6:6.1f} us {timing.bandwidth(seconds) / 1e12:.2f}" for label, seconds in figures.items()
    ]
    tile = f"{best.rows}x{best.outputs}x{best.inputs} splits {best.splits} warps {best.warps} stages {best.stages}"
    return f"{name:<11} T {timing.num_rows:>3}  {' | '.join(texts)}  [{tile}]"


if __name__ == "__main__":
    main()
