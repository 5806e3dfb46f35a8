"""Draw the next token of each row without sorting: one program a row, thresholds by bisection over the logits' bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDTH = 4096


@triton.jit
def ordered_bits(x):
    """An unsigned integer for each float32 that compares as it does; zeros of both signs are one."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) == 0, bits | 0x80000000, bits ^ 0xFFFFFFFF)


@triton.jit
def load_logits(row, start, vocabulary, WIDTH: tl.constexpr):
    token = start + tl.arange(0, WIDTH)
    return tl.load(row + token, mask=token < vocabulary, other=float("-inf"))


@triton.jit
def mass_of(x, best, temperature):
    """The float64 share of each logit, relative to that of the largest."""
    return tl.exp(tl.div_rn(x, temperature) - tl.div_rn(best, temperature)).to(tl.float64)


@triton.jit
def raise_floor(row, vocabulary, best, temperature, floor, goal, COUNTED: tl.constexpr, WIDTH: tl.constexpr):
    """The largest threshold above which what is kept still reaches the goal, found bit by bit.

    What stays above the answer is: of the k largest, all (COUNTED, goal k); of the most probable, the fewest whose
    mass reaches the goal. Tokens not above `floor` have been dropped before.
    """
    threshold = floor * 0
    for step in range(32):
        candidate = threshold | (floor * 0 + 1 << (31 - step))
        above = tl.zeros((WIDTH,), dtype=tl.float64)
        for start in range(0, vocabulary, WIDTH):
            x = load_logits(row, start, vocabulary, WIDTH)
            bits = ordered_bits(x)
            counted = (bits > candidate) & (bits > floor) & (start + tl.arange(0, WIDTH) < vocabulary)
            if COUNTED:
                above += counted.to(tl.float64)
            else:
                above += tl.where(counted, mass_of(x, best, temperature), 0.0)
        threshold = tl.where(tl.sum(above) >= goal, candidate, threshold)
    return tl.maximum(threshold, floor)


@triton.jit
def kept_mass(x, best, temperature, min_p, floor, best_bits):
    """The mass of each logit, 0 where it has been dropped."""
    mass = mass_of(x, best, temperature)
    bits = ordered_bits(x)
    kept = ((bits > floor) | (bits == best_bits)) & (mass >= min_p)
    return tl.where(kept, mass, 0.0)


@triton.jit
def sum_kept(row, vocabulary, best, temperature, min_p, floor, best_bits, WIDTH: tl.constexpr):
    total = tl.zeros((WIDTH,), dtype=tl.float64)
    for start in range(0, vocabulary, WIDTH):
        total += kept_mass(load_logits(row, start, vocabulary, WIDTH), best, temperature, min_p, floor, best_bits)
    return tl.sum(total)


@triton.jit
def sample_kernel(
    logits, temperature, top_k, top_p, min_p, seeds, steps, ids, vocabulary, logits_stride, WIDTH: tl.constexpr
):
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * logits_stride
    heat = tl.load(temperature + index)
    count = tl.load(top_k + index)
    share = tl.load(top_p + index)
    least = tl.load(min_p + index).to(tl.float64)

    best = tl.load(row)
    choice = tl.load(top_k + index) * 0
    for start in range(0, vocabulary, WIDTH):
        x = load_logits(row, start, vocabulary, WIDTH)
        largest = tl.max(x)
        place = tl.min(tl.where(x == largest, start + tl.arange(0, WIDTH), vocabulary))
        choice = tl.where(largest > best, place, choice)
        best = tl.maximum(best, largest)
    if heat <= 0.0:
        tl.store(ids + index, choice.to(tl.int64))
        return

    best_bits = ordered_bits(best)
    floor = best_bits * 0
    if (count > 0) & (count < vocabulary):
        floor = raise_floor(row, vocabulary, best, heat, floor, count.to(tl.float64), True, WIDTH)
    if share < 1.0:
        survivors = sum_kept(row, vocabulary, best, heat, least * 0.0, floor, best_bits, WIDTH)
        floor = raise_floor(row, vocabulary, best, heat, floor, share.to(tl.float64) * survivors, False, WIDTH)

    seed = tl.load(seeds + index)
    step = tl.load(steps + index)
    nothing = (step & 0).to(tl.uint32)
    word, _, _, _ = tl.philox(seed, step.to(tl.uint32), (step >> 32).to(tl.uint32), nothing, nothing)
    uniform = (word >> 8).to(tl.float32) * 5.9604644775390625e-08
    goal = uniform.to(tl.float64) * sum_kept(row, vocabulary, best, heat, least, floor, best_bits, WIDTH)

    passed = goal * 0.0
    found = choice * 0 + vocabulary
    last = choice
    start = choice * 0
    while (start < vocabulary) & (found == vocabulary):
        mass = kept_mass(load_logits(row, start, vocabulary, WIDTH), best, heat, least, floor, best_bits)
        token = start + tl.arange(0, WIDTH)
        reached = (passed + tl.cumsum(mass, axis=0) > goal) & (mass > 0.0)
        found = tl.min(tl.where(reached, token, vocabulary))
        last = tl.maximum(last, tl.max(tl.where(mass > 0.0, token, 0)))
        passed += tl.sum(mass)
        start += WIDTH
    # Rounding may leave the sum a hair below a goal close to it: the last kept token is then the answer.
    tl.store(ids + index, tl.where(found == vocabulary, last, found).to(tl.int64))


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, steps: Tensor
) -> Tensor:
    """As plexor.kernels.reference.sample; never waits for the device."""
    num_rows, vocabulary = logits.shape
    ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows == 0:
        return ids
    sample_kernel[(num_rows,)](
        logits,
        temperature,
        top_k,
        top_p,
        min_p,
        seeds,
        steps,
        ids,
        vocabulary,
        logits.stride(0),
        WIDTH=min(WIDTH, triton.next_power_of_2(vocabulary)),
        num_warps=16,
    )
    return ids
