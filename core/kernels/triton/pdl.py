"""Programmatic dependent launch: a kernel starts while the one before it on the stream still drains.

A kernel launched so (`launch_pdl=True`) calls `launch_next` as soon as the next one may start, and `wait` before it
reads what an earlier kernel wrote or writes what an earlier one may still read. Every program waits, those that have
nothing to do too, so that "the one before is complete" also holds for all before that. Triton's interpreter knows
neither instruction: PDL is then False.

Before `wait` a kernel reads only what nothing writes while the model runs, such as weights, and what was complete when
the last kernel launched in the ordinary way began: such a kernel begins after all before it, while kernels launched
early may run ahead of one another by several. The layers read a step's tables (plexor.batch.Pages) that soon, so
between `advance`, which writes them, and the first layer lies a kernel launched in the ordinary way: the lookup of the
embeddings, which is torch's (plexor.model.embedding).

Keep that little: what is loaded before `wait` runs beside the kernel before, on the same multiprocessors. It is how a
product showed that gave stages of its ring back before its own loads had arrived: with attention's first tile fetched
so early, up to 476 of 1500 replays of a step were wrong (bench/NOTES.md, tests/gpu/test_replays.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait(PDL: tl.constexpr):
    """Go on when every earlier kernel is complete and what it wrote can be seen."""
    if PDL:
        gdc_wait()


@triton.jit
def launch_next(PDL: tl.constexpr):
    """Let the next kernel start when all programs of this one have come here or ended."""
    if PDL:
        gdc_launch_dependents()


def overlaps(device: torch.device) -> bool:
    """Whether kernels on the device can be launched so."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
