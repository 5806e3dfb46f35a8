"""A captured launch of the decode kernel serves the lengths that it finds when it is replayed."""

from __future__ import annotations

import pytest
import torch

from plexor.kernels.reference.paged_attention import paged_attention
from plexor.kernels.samples import Maker, attention_sample
from plexor.kernels.triton.paged_attention import PagedAttention


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("warm", [True, False])
def test_a_replay_reads_the_lengths_anew(warm: bool) -> None:
    device, dtype = torch.device("cuda"), torch.bfloat16
    pieces = [(1, 5000), (1, 700), (1, 64), (1, 1), (1, 2100)]
    sample = attention_sample(Maker(device, dtype, 31), "", pieces, (8, 2, 128), None, dtype, num_decodes=5)
    q, cache, pages, scale, _ = sample.args
    attend = PagedAttention()
    if warm:
        attend(q, cache, pages, scale, None)
    else:
        # Compiled, but by a layer of its own: this one's counters are made while the graph is captured.
        PagedAttention()(q, cache, pages, scale, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            out = attend(q, cache, pages, scale, None)
    for lengths in ((5000, 700, 64, 1, 2100), (4999, 0, 17, 1, 2048), (1, 1, 1, 1, 1), (129, 700, 2, 0, 2099)):
        pages.kv_length.copy_(torch.tensor(lengths))
        expected = paged_attention(q, cache, pages, scale, None)
        for _ in range(3):
            out.fill_(float("nan"))
            graph.replay()
            torch.testing.assert_close(out, expected, rtol=1.6e-2, atol=1.6e-2)
