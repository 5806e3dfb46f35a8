"""What `plexor bench` measures a CUDA device with: every way that it tries there works, and a profile has kernels."""

from pathlib import Path

import pytest
import torch

from plexor import Engine, EngineConfig
from plexor.benchmark.limits import Sizes, attention_rate, product_rates, read_rate
from plexor.benchmark.run import profile_steps
from plexor.benchmark.stream import read_sums
from plexor.benchmark.workloads import Workload

CUDA = torch.device("cuda")
SMALL = Sizes(read_bytes=1 << 22, width=256, tokens=160, calls=2)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def test_the_reading_kernel_reads_every_number() -> None:
    numbers = torch.randint(-(2**20), 2**20, (96 * 2048 * 4,), dtype=torch.int32, device=CUDA)
    assert read_sums(numbers, tile=2048, tiles=4, num_warps=8).tolist() == numbers.view(96, -1).sum(dim=1).tolist()
    assert read_rate(CUDA, SMALL) > 0


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="8-bit floats need 8.9"
)
def test_narrow_weights_have_a_rate_of_their_own() -> None:
    stored = {torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.uint8}
    rates = product_rates(CUDA, torch.bfloat16, stored, SMALL)
    assert set(rates) == stored
    assert rates[torch.uint8] == max(rates.values())
    assert len({rates[each] for each in (torch.bfloat16, torch.float8_e4m3fn, torch.int8)}) == 3


@pytest.mark.parametrize(("dtype", "head_size"), [(torch.bfloat16, 128), (torch.float32, 24)])
def test_attention_has_a_rate(dtype: torch.dtype, head_size: int) -> None:
    assert attention_rate(CUDA, dtype, 3, head_size, SMALL) > 0


def test_a_profile_finds_the_kernels_of_every_step(tiny: Path, tmp_path: Path) -> None:
    workload = Workload("small", "decode", requests=3, prompt_tokens=9, new_tokens=60)
    with Engine(config=EngineConfig(model=str(tiny), num_blocks=32, max_sequences=4)) as engine:
        summary = profile_steps(engine, workload, tmp_path)
    assert summary.num_steps == 8
    assert len(summary.gaps) == 7
    assert 0 < summary.busy <= summary.span
    assert all(kernel.calls >= 1 for kernel in summary.kernels)
    assert (tmp_path / "small.txt").read_text().startswith("8 steps in ")
