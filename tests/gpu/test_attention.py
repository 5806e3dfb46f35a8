"""A captured launch of a decode kernel serves the lengths that it finds when it is replayed, and clusters are right."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from plexor.kernels.reference.paged_attention import paged_attention
from plexor.kernels.samples import Maker, attention_sample
from plexor.kernels.triton.paged_attention import PagedAttention

LENGTHS = (0, 1, 15, 16, 17, 31, 33, 255, 256, 257, 5000)


def attention(clusters: bool) -> PagedAttention:
    """Triton's alone, or with clusters of blocks for few rows."""
    if not clusters:
        return PagedAttention()
    if find_spec("cuda") is None or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("clusters need cuda.bindings and compute capability 9.x")
    from plexor.kernels.cuda.paged_attention import PagedAttention as ClusterAttention

    return ClusterAttention()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("storage", ["bf16", "e4m3", "int8"])
@pytest.mark.parametrize(
    ("warps", "cluster", "shifts"), [(8, 16, 1), (8, 8, 2), (4, 8, 2), (8, 4, 3), (4, 2, 4), (8, 1, 2)]
)
@pytest.mark.parametrize("heads", [(32, 8, 128), (7, 1, 64), (6, 6, 128)], ids=str)
def test_clusters_agree_however_they_are_cut(
    storage: str, warps: int, cluster: int, shifts: int, heads: tuple[int, int, int]
) -> None:
    attention(clusters=True)
    from bench import decode_attention

    from plexor.kernels.cuda.attention_choice import Cut

    dtype = decode_attention.STORAGES[storage]
    spread = 256 // (heads[2] * dtype.itemsize)
    for window in (None, 100):
        for lengths in (LENGTHS, (257,)):
            cut = Cut(warps, cluster, min(shifts, len(lengths)), spread, 152)
            assert decode_attention.worst(cut, dtype, heads, window, lengths) <= 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("clusters", [False, True])
@pytest.mark.parametrize("warm", [True, False])
def test_a_replay_reads_the_lengths_anew(warm: bool, clusters: bool) -> None:
    device, dtype = torch.device("cuda"), torch.bfloat16
    pieces = [(1, 5000), (1, 700), (1, 64), (1, 1), (1, 2100)]
    sample = attention_sample(Maker(device, dtype, 31), "", pieces, (8, 2, 128), None, dtype, num_decodes=5)
    q, cache, pages, scale, _ = sample.args
    attend = attention(clusters)
    if warm:
        attend(q, cache, pages, scale, None)
    else:
        # Compiled, but by a layer of its own: this one's counters are made while the graph is captured.
        attention(clusters)(q, cache, pages, scale, None)
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
