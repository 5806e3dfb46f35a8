"""The reading kernel reads every number: its sums are torch's."""

import torch

from plexor.benchmark.stream import read_sums

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_every_number_is_read_once() -> None:
    numbers = torch.randint(-(2**20), 2**20, (6 * 128 * 3,), dtype=torch.int32, device=DEVICE)
    sums = read_sums(numbers, tile=128, tiles=3, num_warps=4)
    assert sums.tolist() == numbers.view(6, -1).sum(dim=1).tolist()
