"""The library's sparse product, cuSPARSELt's, over a 2:4 weight that is put into its layout for each call.

The layout costs as much memory as the weight, so it is not kept: making it takes a read and a write of the weight, less
than is won against widening the weight for a dense product.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from plexor_quant.kernels.cuda.sparse24_products import CHUNK, PACKED_ROWS, packed, packs
from plexor_quant.sparse24_layout import compress, prune

MULTIPLE = 8
"""Rows of x come in multiples of it."""

MOST_SEARCHED = 4096
"""Rows for which the best algorithm is looked for; with more it is the same."""


def multiplies(x: Tensor, kept: Tensor, index: Tensor) -> bool:
    """Whether the library is there and takes these tensors."""
    return x.shape[0] > 0 and packs(x, kept, index) and _is_known(x.device)


def product(x: Tensor, kept: Tensor, index: Tensor) -> Tensor:
    """x [T, K] times what kept [N, K / 2] and index [N, K / 8] mean -> [T, N]."""
    num_rows, num_inputs = x.shape
    padded = functional.pad(x, (0, 0, 0, -num_rows % MULTIPLE)).contiguous()
    searched = min(1 << (padded.shape[0] - 1).bit_length(), MOST_SEARCHED)
    algorithm = _algorithm(x.device, x.dtype, kept.shape[0], num_inputs, searched)
    y: Tensor = torch._cslt_sparse_mm(packed(kept, index), padded.t(), transpose_result=True, alg_id=algorithm)
    return y[:num_rows]


@cache
def _is_known(device: torch.device) -> bool:
    """Whether the library is there and has the layout that is known here: it is another version's to change."""
    library: Any = torch._C._cusparselt if torch.backends.cusparselt.is_available() else None
    if not hasattr(library, "mm_search"):
        return False
    generator = torch.Generator().manual_seed(0)
    weight = prune(torch.randn(2 * PACKED_ROWS, 2 * CHUNK, generator=generator)).to(device, torch.bfloat16)
    theirs = torch._cslt_compress(weight).flatten()
    return torch.equal(theirs.view(torch.int16), packed(*compress(weight)).flatten().view(torch.int16))


@cache
def _algorithm(device: torch.device, dtype: torch.dtype, num_outputs: int, num_inputs: int, num_rows: int) -> int:
    """The fastest of the library's for these sizes, timed once in a process: its first choice takes twice as long.

    This waits for the device; of steps that are captured the graphs run the first one uncaptured.
    """
    library: Any = torch._C._cusparselt
    x = torch.ones(num_rows, num_inputs, dtype=dtype, device=device)
    kept = torch.ones(num_outputs, num_inputs // 2, dtype=dtype, device=device)
    index = torch.full((num_outputs, num_inputs // 8), 0x44, dtype=torch.uint8, device=device)
    found, *_ = library.mm_search(packed(kept, index), x.t(), None, None, None, True)
    return int(found)
