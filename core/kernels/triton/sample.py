"""Draw the next token of each row without sorting, in three passes that many programs share.

    extremes_kernel   of each chunk of a row: the largest logit, where it is, and the smallest
    histogram_kernel  of rows with top_k or top_p: how many tokens, and how much mass, lie how far below the largest
    draw_kernel       the histogram leaves a few narrow bins open; their tokens are listed, and the program of a row
                      that gets there last finds the exact threshold among them, and then the token

A greedy row ends after the first pass. Masses are whole multiples of a small unit, so that sums are exact in any order:
the token does not depend on how a row was divided, which changes with the number of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from plexor.kernels.triton.pdl import launch_next, overlaps, wait

TILE = 2048
"""Logits that a program looks at together."""

NUM_PROGRAMS = 528
"""Programs of a pass, which its rows share: four for each multiprocessor of a large GPU."""

MAX_CHUNKS = 32
"""Programs of one row."""

NUM_BINS = 2048
"""Of the histogram, from the largest logit of a row down."""

MAX_LISTED = 4096
"""Tokens of open bins that are listed; where there are more, the whole row is searched, which is slow."""

LIST_TILE = 512


@triton.jit
def ordered_bits(x):
    """An unsigned integer for each float32 that compares as it does; zeros of both signs are one."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) == 0, bits | 0x80000000, bits ^ 0xFFFFFFFF)


@triton.jit
def load_tile(values, start, end, WIDTH: tl.constexpr):
    """Logits as float32; -inf beyond the end."""
    place = start + tl.arange(0, WIDTH)
    return tl.load(values + place, mask=place < end, other=float("-inf")).to(tl.float32)


@triton.jit
def bin_of(x, best, density, BINS: tl.constexpr):
    """0 for the largest logit, and never less for a smaller one."""
    return tl.minimum((best - x) * density, BINS - 1.0).to(tl.int32)


@triton.jit
def share_of(x, best, heat):
    """The float32 probability of each logit, relative to that of the largest."""
    return tl.exp(tl.div_rn(x, heat) - tl.div_rn(best, heat))


@triton.jit
def mass_of(x, frame, UNIT: tl.constexpr):
    """The share of each logit, as a whole number of units."""
    best, _, heat = frame
    return (share_of(x, best, heat) * UNIT).to(tl.int64)


@triton.jit
def kept_mass(x, frame, floor, least, UNIT: tl.constexpr):
    """The mass of each logit, 0 where it has been dropped; the largest never is."""
    best, _, heat = frame
    share = share_of(x, best, heat)
    kept = ((ordered_bits(x) > floor) | (x == best)) & (share >= least)
    return tl.where(kept, (share * UNIT).to(tl.int64), 0)


@triton.jit
def extremes_kernel(
    logits,
    largest,
    smallest,
    places,
    vocabulary,
    logits_stride,
    span,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_next(PDL)
    wait(PDL)
    chunk = tl.program_id(0)
    index = tl.program_id(1).to(tl.int64)
    row = logits + index * logits_stride
    end = tl.minimum(chunk * span + span, vocabulary)
    best = tl.full((WIDTH,), float("-inf"), tl.float32)
    least = tl.full((WIDTH,), float("inf"), tl.float32)
    place = chunk * span + tl.arange(0, WIDTH)
    ahead = load_tile(row, chunk * span, end, WIDTH)
    for start in range(chunk * span, end, WIDTH):
        x = ahead
        ahead = load_tile(row, start + WIDTH, end, WIDTH)
        place = tl.where(x > best, start + tl.arange(0, WIDTH), place)
        best = tl.maximum(best, x)
        least = tl.minimum(least, tl.where(x > float("-inf"), x, float("inf")))
    most = tl.max(best)
    slot = index * CHUNKS + chunk
    tl.store(largest + slot, most)
    tl.store(smallest + slot, tl.min(least))
    tl.store(places + slot, tl.min(tl.where(best == most, place, vocabulary)))


@triton.jit
def load_extremes(largest, smallest, places, index, num_chunks, BINS: tl.constexpr, CHUNKS: tl.constexpr):
    """A row's largest logit, where it first stands, and how many bins there are to a unit.

    The bins end at the largest of the chunks' smallest logits, which a few enormous negative ones do not move; the
    last chunk may be short and has no say. Where they end matters to speed alone.
    """
    chunk = tl.arange(0, CHUNKS)
    slot = index * CHUNKS + chunk
    most = tl.load(largest + slot, mask=chunk < num_chunks, other=float("-inf"))
    place = tl.load(places + slot, mask=chunk < num_chunks, other=0)
    least = tl.load(smallest + slot, mask=chunk < tl.maximum(num_chunks - 1, 1), other=float("inf"))
    best = tl.max(most)
    choice = tl.min(tl.where(most == best, place, 0x7FFFFFFF))
    lowest = tl.max(tl.where(least < float("inf"), least, float("-inf")))
    density = BINS / tl.where(best > lowest, best - lowest, float("inf"))
    # Neither 0 nor inf, so that no product with a distance is NaN.
    return best, choice, tl.minimum(tl.maximum(density, 1e-38), 1e38)


@triton.jit(do_not_specialize=["num_chunks"])
def histogram_kernel(
    logits,
    temperature,
    top_k,
    top_p,
    largest,
    smallest,
    places,
    counts,
    masses,
    vocabulary,
    logits_stride,
    span,
    num_chunks,
    UNIT: tl.constexpr,
    BINS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_next(PDL)
    wait(PDL)
    chunk = tl.program_id(0)
    index = tl.program_id(1).to(tl.int64)
    heat = tl.load(temperature + index)
    if (heat <= 0.0) | ((tl.load(top_k + index) <= 0) & (tl.load(top_p + index) >= 1.0)):
        return
    best, _, density = load_extremes(largest, smallest, places, index, num_chunks, BINS, CHUNKS)
    frame = (best, density, heat)
    end = tl.minimum(chunk * span + span, vocabulary)
    for start in range(chunk * span, end, WIDTH):
        x = load_tile(logits + index * logits_stride, start, end, WIDTH)
        place = index * BINS + bin_of(x, best, density, BINS)
        mass = mass_of(x, frame, UNIT)
        tl.atomic_add(counts + place, 1, mask=x > float("-inf"), sem="relaxed")
        tl.atomic_add(masses + place, mass, mask=mass > 0, sem="relaxed")


@triton.jit
def read_histogram(counts, masses, count, share, BINS: tl.constexpr):
    """What the histogram leaves open, and what lies above that.

    k_bin holds the k-th largest logit; p_first to p_last hold the least probable token that top_p keeps: more than
    one bin, since it is not known yet how much of k_bin survives. BINS stands for a cut that is not made.
    """
    bins = tl.arange(0, BINS)
    number = tl.load(counts + bins)
    mass = tl.load(masses + bins)
    k_bin = tl.where(count > 0, tl.sum((tl.cumsum(number, axis=0) < count).to(tl.int32)), BINS)
    number_above_k = tl.sum(tl.where(bins < k_bin, number, 0))
    mass_above_k = tl.sum(tl.where(bins < k_bin, mass, 0))
    mass_with_k = tl.sum(tl.where(bins <= k_bin, mass, 0))
    passed = tl.cumsum(mass, axis=0).to(tl.float64)
    wanted = share.to(tl.float64)
    p_first = tl.sum((passed < wanted * mass_above_k.to(tl.float64)).to(tl.int32))
    p_last = tl.sum((passed < wanted * mass_with_k.to(tl.float64)).to(tl.int32))
    p_first = tl.where(share < 1.0, p_first, BINS)
    p_last = tl.where(share < 1.0, p_last, BINS)
    mass_above_p = tl.sum(tl.where(bins < p_first, mass, 0))
    return k_bin, p_first, p_last, number_above_k, mass_above_k, mass_above_p


@triton.jit
def is_open(place, opened):
    k_bin, p_first, p_last, _, _, _ = opened
    return (place == k_bin) | ((place >= p_first) & (place <= p_last))


@triton.jit
def raise_floor(
    values,
    size,
    frame,
    bins,
    floor,
    above,
    goal,
    COUNTED: tl.constexpr,
    UNIT: tl.constexpr,
    BINS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The largest threshold over which tokens still reach the goal; it lies in the bins first to last.

    COUNTED: they reach it by their number, otherwise by their mass; `above` is what higher bins hold. Those not over
    `floor` have been dropped before. The interval between the least and the largest value of the bins is halved.
    """
    best, density, _ = frame
    first, last = bins
    low = tl.full((WIDTH,), 0xFFFFFFFF, tl.uint32)
    high = tl.full((WIDTH,), 0, tl.uint32)
    for start in range(0, size, WIDTH):
        x = load_tile(values, start, size, WIDTH)
        place = bin_of(x, best, density, BINS)
        sought = (x > float("-inf")) & (place >= first) & (place <= last)
        low = tl.minimum(low, tl.where(sought, ordered_bits(x), low))
        high = tl.maximum(high, tl.where(sought, ordered_bits(x), high))
    least = tl.min(low).to(tl.int64) - 1
    most = tl.max(high).to(tl.int64)
    while least < most:
        middle = (least + most + 1) // 2
        reach = tl.zeros((WIDTH,), tl.int64)
        for start in range(0, size, WIDTH):
            x = load_tile(values, start, size, WIDTH)
            place = bin_of(x, best, density, BINS)
            bits = ordered_bits(x)
            sought = (x > float("-inf")) & (place >= first) & (place <= last)
            sought &= (bits > middle.to(tl.uint32)) & (bits > floor)
            reach += sought.to(tl.int64) if COUNTED else tl.where(sought, mass_of(x, frame, UNIT), 0)
        reached = (above + tl.sum(reach)).to(tl.float64) >= goal
        least = tl.where(reached, middle, least)
        most = tl.where(reached, most, middle - 1)
    return tl.maximum(least.to(tl.uint32), floor)


@triton.jit
def sum_bin(values, size, frame, k_bin, floor, UNIT: tl.constexpr, BINS: tl.constexpr, WIDTH: tl.constexpr):
    """The mass of a bin's tokens over the floor."""
    best, density, _ = frame
    total = tl.zeros((WIDTH,), tl.int64)
    for start in range(0, size, WIDTH):
        x = load_tile(values, start, size, WIDTH)
        kept = (bin_of(x, best, density, BINS) == k_bin) & (ordered_bits(x) > floor)
        total += tl.where(kept, mass_of(x, frame, UNIT), 0)
    return tl.sum(total)


@triton.jit
def find_floor(values, size, frame, opened, count, share, UNIT: tl.constexpr, BINS: tl.constexpr, WIDTH: tl.constexpr):
    """The exact threshold: tokens whose ordered bits lie over it pass top_k and top_p."""
    k_bin, p_first, p_last, number_above_k, mass_above_k, mass_above_p = opened
    floor = (count * 0).to(tl.uint32)
    if k_bin < BINS:
        number = number_above_k.to(tl.int64)
        goal = count.to(tl.float64)
        floor = raise_floor(values, size, frame, (k_bin, k_bin), floor, number, goal, True, UNIT, BINS, WIDTH)
    if p_first < BINS:
        survivors = mass_above_k + sum_bin(values, size, frame, k_bin, floor, UNIT, BINS, WIDTH)
        goal = share.to(tl.float64) * survivors.to(tl.float64)
        bins = (p_first, p_last)
        floor = raise_floor(values, size, frame, bins, floor, mass_above_p, goal, False, UNIT, BINS, WIDTH)
    return floor


@triton.jit
def add_open(
    sums,
    values,
    tokens,
    size,
    frame,
    opened,
    floor,
    least,
    span,
    LISTED: tl.constexpr,
    UNIT: tl.constexpr,
    BINS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Add what is kept of the open bins to the sums of the chunks that it belongs to."""
    best, density, _ = frame
    for start in range(0, size, WIDTH):
        place = start + tl.arange(0, WIDTH)
        token = tl.load(tokens + place, mask=place < size, other=0) if LISTED else place
        x = load_tile(values, start, size, WIDTH)
        mass = kept_mass(x, frame, floor, least, UNIT)
        added = (mass > 0) & is_open(bin_of(x, best, density, BINS), opened)
        tl.atomic_add(sums + token // span, mass, mask=added, sem="relaxed")


@triton.jit
def uniform(seed, step):
    """As plexor.kernels.random.uniform."""
    nothing = (step & 0).to(tl.uint32)
    word, _, _, _ = tl.philox(seed, step.to(tl.uint32), (step >> 32).to(tl.uint32), nothing, nothing)
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def store_id(ids, tokens, index, slot, token):
    """A row's answer, also where its slot keeps it; -1 is none."""
    tl.store(ids + index, token.to(tl.int64))
    tl.store(tokens + slot, token.to(tl.int64), mask=slot >= 0)


@triton.jit(do_not_specialize=["num_chunks"])
def draw_kernel(
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    seeds,
    steps,
    slots,
    tokens_by_slot,
    ids,
    largest,
    smallest,
    places,
    counts,
    masses,
    sums,
    listed,
    tokens,
    num_listed,
    num_arrived,
    vocabulary,
    logits_stride,
    span,
    num_chunks,
    UNIT: tl.constexpr,
    BINS: tl.constexpr,
    CHUNKS: tl.constexpr,
    LISTED: tl.constexpr,
    LIST_WIDTH: tl.constexpr,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_next(PDL)
    wait(PDL)
    chunk = tl.program_id(0)
    index = tl.program_id(1).to(tl.int64)
    heat = tl.load(temperature + index)
    best, choice, density = load_extremes(largest, smallest, places, index, num_chunks, BINS, CHUNKS)
    home = tl.load(slots + index)
    if heat <= 0.0:
        if chunk == 0:
            store_id(ids, tokens_by_slot, index, home, choice)
        return
    row = logits + index * logits_stride
    frame = (best, density, heat)
    count = tl.load(top_k + index)
    share = tl.load(top_p + index)
    least = tl.load(min_p + index)
    counts += index * BINS
    masses += index * BINS
    sums += index * CHUNKS
    listed += index * LISTED
    tokens += index * LISTED
    opened = read_histogram(counts, masses, count, share, BINS)
    k_bin, p_first, _, _, _, _ = opened

    # What lies above all open bins is kept for sure, and what lies in one is listed.
    total = tl.zeros((WIDTH,), tl.int64)
    end = tl.minimum(chunk * span + span, vocabulary)
    for start in range(chunk * span, end, WIDTH):
        x = load_tile(row, start, end, WIDTH)
        place = bin_of(x, best, density, BINS)
        total += tl.where(place < tl.minimum(k_bin, p_first), kept_mass(x, frame, 0, least, UNIT), 0)
        undecided = ((x > float("-inf")) & is_open(place, opened)).to(tl.int32)
        number = tl.sum(undecided)
        if number > 0:
            slot = tl.atomic_add(num_listed + index, number, sem="relaxed") + tl.cumsum(undecided, axis=0) - 1
            fits = (undecided > 0) & (slot < LISTED)
            tl.store(listed + slot, x, mask=fits)
            tl.store(tokens + slot, start + tl.arange(0, WIDTH), mask=fits)
    tl.store(sums + chunk, tl.sum(total))
    tl.debug_barrier()
    if tl.atomic_add(num_arrived + index, 1) < num_chunks - 1:
        return

    number = tl.load(num_listed + index)
    floor = (number * 0).to(tl.uint32)
    if number > LISTED:
        floor = find_floor(row, vocabulary, frame, opened, count, share, UNIT, BINS, WIDTH)
        add_open(sums, row, tokens, vocabulary, frame, opened, floor, least, span, False, UNIT, BINS, WIDTH)
    elif number > 0:
        floor = find_floor(listed, number, frame, opened, count, share, UNIT, BINS, LIST_WIDTH)
        add_open(sums, listed, tokens, number, frame, opened, floor, least, span, True, UNIT, BINS, LIST_WIDTH)
    bins = tl.arange(0, BINS)
    tl.store(counts + bins, tl.zeros((BINS,), tl.int32))
    tl.store(masses + bins, tl.zeros((BINS,), tl.int64))
    tl.store(num_listed + index, 0)
    tl.store(num_arrived + index, 0)

    tl.debug_barrier()
    chunks = tl.arange(0, CHUNKS)
    mass = tl.load(sums + chunks, mask=chunks < num_chunks, other=0, cache_modifier=".cg")
    goal = uniform(tl.load(seeds + index), tl.load(steps + index)).to(tl.float64) * tl.sum(mass).to(tl.float64)
    # A sum of whole numbers exceeds the goal just when it exceeds the goal's whole part.
    wanted = goal.to(tl.int64)
    owner = tl.sum((tl.cumsum(mass, axis=0) <= wanted).to(tl.int32))
    passed = tl.sum(tl.where(chunks < owner, mass, 0))
    found = vocabulary
    start = owner * span
    end = tl.minimum(start + span, vocabulary)
    while (start < end) & (found == vocabulary):
        kept = kept_mass(load_tile(row, start, end, WIDTH), frame, floor, least, UNIT)
        reached = passed + tl.cumsum(kept, axis=0) > wanted
        found = tl.min(tl.where(reached, start + tl.arange(0, WIDTH), vocabulary))
        passed += tl.sum(kept)
        start += WIDTH
    # Only a row of NaN has no mass at all.
    store_id(ids, tokens_by_slot, index, home, tl.where(found == vocabulary, choice, found))


@dataclass(frozen=True, slots=True)
class Scratch:
    """What the passes hand on, a line for each row; counts, masses and both numbers are left at zero."""

    largest: Tensor
    smallest: Tensor
    places: Tensor
    counts: Tensor
    masses: Tensor
    sums: Tensor
    listed: Tensor
    tokens: Tensor
    num_listed: Tensor
    num_arrived: Tensor

    @classmethod
    def allocate(cls, num_rows: int, max_listed: int, device: torch.device) -> Scratch:
        def zeros(width: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(num_rows, width, dtype=dtype, device=device)

        return cls(
            largest=zeros(MAX_CHUNKS, torch.float32),
            smallest=zeros(MAX_CHUNKS, torch.float32),
            places=zeros(MAX_CHUNKS, torch.int32),
            counts=zeros(NUM_BINS, torch.int32),
            masses=zeros(NUM_BINS, torch.int64),
            sums=zeros(MAX_CHUNKS, torch.int64),
            listed=zeros(max_listed, torch.float32),
            tokens=zeros(max_listed, torch.int32),
            num_listed=zeros(1, torch.int32),
            num_arrived=zeros(1, torch.int32),
        )


class Draw:
    """As plexor.kernels.reference.sample; never waits for the device. Calls follow each other on one stream."""

    def __init__(self, tile: int = TILE, max_listed: int = MAX_LISTED) -> None:
        self._tile = tile
        self._max_listed = max_listed
        # Captured graphs hold on to what they were captured with, so a scratch that became too small is kept.
        self._scratches: list[Scratch] = []

    def __call__(
        self,
        logits: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        seeds: Tensor,
        steps: Tensor,
        slots: Tensor,
        tokens: Tensor,
    ) -> Tensor:
        num_rows, vocabulary = logits.shape
        ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
        if num_rows == 0:
            return ids
        scratch = self._scratch(num_rows, logits.device)
        extremes = (scratch.largest, scratch.smallest, scratch.places)
        width = min(self._tile, triton.next_power_of_2(vocabulary))
        num_tiles = triton.cdiv(vocabulary, width)
        span = width * triton.cdiv(num_tiles, max(1, min(MAX_CHUNKS, NUM_PROGRAMS // num_rows)))
        num_chunks = triton.cdiv(vocabulary, span)
        grid = (num_chunks, num_rows)
        unit = 2.0 ** (62 - vocabulary.bit_length())
        early = overlaps(logits.device)
        extremes_kernel[grid](
            logits,
            *extremes,
            vocabulary,
            logits.stride(0),
            span,
            CHUNKS=MAX_CHUNKS,
            WIDTH=width,
            PDL=early,
            num_warps=8,
            launch_pdl=early,
        )
        histogram_kernel[grid](
            logits,
            temperature,
            top_k,
            top_p,
            *extremes,
            scratch.counts,
            scratch.masses,
            vocabulary,
            logits.stride(0),
            span,
            num_chunks,
            UNIT=unit,
            BINS=NUM_BINS,
            CHUNKS=MAX_CHUNKS,
            WIDTH=width,
            PDL=early,
            num_warps=8,
            launch_pdl=early,
        )
        draw_kernel[grid](
            logits,
            temperature,
            top_k,
            top_p,
            min_p,
            seeds,
            steps,
            slots,
            tokens,
            ids,
            *extremes,
            scratch.counts,
            scratch.masses,
            scratch.sums,
            scratch.listed,
            scratch.tokens,
            scratch.num_listed,
            scratch.num_arrived,
            vocabulary,
            logits.stride(0),
            span,
            num_chunks,
            UNIT=unit,
            BINS=NUM_BINS,
            CHUNKS=MAX_CHUNKS,
            LISTED=self._max_listed,
            LIST_WIDTH=min(LIST_TILE, self._max_listed),
            WIDTH=width,
            PDL=early,
            num_warps=8,
            launch_pdl=early,
            maxnreg=128,  # two programs fit a multiprocessor, and nothing is spilled
        )
        return ids

    def _scratch(self, num_rows: int, device: torch.device) -> Scratch:
        if not self._scratches or self._scratches[-1].num_listed.shape[0] < num_rows:
            self._scratches.append(Scratch.allocate(triton.next_power_of_2(num_rows), self._max_listed, device))
        return self._scratches[-1]
