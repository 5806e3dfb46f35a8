"""Times the draw of tokens on a GPU and counts how often it is the reference's: `python bench/sample.py`.

Microseconds of one draw, the median of graph replays, for numbers of rows and cuts. Logits are normal: "peaked" as a
trained model's are (deviation 3, a few tokens stand out), "flat" as with random weights (deviation 1.3).
"""

from __future__ import annotations

import argparse
import statistics

import torch
from torch import Tensor

from plexor.kernels.reference.sample import sample
from plexor.kernels.triton.sample import Draw

CUTS = {
    "greedy": (0.0, 0, 1.0, 0.0),
    "temperature": (1.0, 0, 1.0, 0.0),
    "top_p": (0.8, 0, 0.95, 0.0),
    "top_k": (0.8, 50, 1.0, 0.0),
    "top_k, top_p": (0.8, 50, 0.95, 0.0),
    "min_p": (1.0, 0, 1.0, 0.05),
}
NUM_ROWS = (1, 8, 32, 64, 256)
NUM_LAUNCHES = 20
REPLAYS = 9
NUM_CHECKED = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    print(f"{torch.cuda.get_device_name()}, {arguments.vocabulary:,} {arguments.dtype} logits; us of a draw")
    print(f"{'':<22}" + "".join(f"{rows:>9}" for rows in NUM_ROWS) + "   rows of the last as in the reference")
    for shape in ("peaked", "flat"):
        for name, cut in CUTS.items():
            draw = Draw()
            times = [time_draw(draw, given(shape, rows, arguments.vocabulary, dtype, cut, 0)) for rows in NUM_ROWS]
            equal, total = agreement(draw, shape, arguments.vocabulary, dtype, cut)
            print(f"{shape + ', ' + name:<22}" + "".join(f"{time:9.1f}" for time in times) + f"   {equal} of {total}")


def given(
    shape: str, num_rows: int, vocabulary: int, dtype: torch.dtype, cut: tuple[float, int, float, float], step: int
) -> tuple[Tensor, ...]:
    """Arguments of a draw whose rows are all cut alike."""
    temperature, top_k, top_p, min_p = cut
    logits = torch.randn(num_rows, vocabulary, device="cuda") * (3.0 if shape == "peaked" else 1.3)
    if shape == "peaked":
        logits[:, :: vocabulary // 20] += 8.0
    return (
        logits.to(dtype),
        torch.full((num_rows,), temperature, device="cuda"),
        torch.full((num_rows,), top_k, dtype=torch.int32, device="cuda"),
        torch.full((num_rows,), top_p, device="cuda"),
        torch.full((num_rows,), min_p, device="cuda"),
        torch.arange(num_rows, device="cuda") * 1000003,
        torch.full((num_rows,), step, device="cuda"),
        torch.arange(num_rows, device="cuda"),
        torch.zeros(num_rows, dtype=torch.int64, device="cuda"),
    )


def agreement(
    draw: Draw, shape: str, vocabulary: int, dtype: torch.dtype, cut: tuple[float, int, float, float]
) -> tuple[int, int]:
    """Over several steps, how many rows have the reference's token, and how many there are."""
    equal = total = 0
    for step in range(NUM_CHECKED):
        arguments = given(shape, NUM_ROWS[-1], vocabulary, dtype, cut, step)
        equal += int((draw(*arguments) == sample(*arguments)).sum())
        total += NUM_ROWS[-1]
    return equal, total


def time_draw(draw: Draw, arguments: tuple[Tensor, ...]) -> float:
    """Microseconds, with the launches of a graph one after another."""
    draw(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(NUM_LAUNCHES):
            draw(*arguments)
    times: list[float] = []
    for _ in range(REPLAYS + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / NUM_LAUNCHES)
    return statistics.median(times[2:])


if __name__ == "__main__":
    main()
